"""Settings: a dataclass holds the defaults, a YAML file what differs, `key=value` on the command line the last word.

Nested dataclasses are nested mappings in YAML and dots on the command line: `optimizer.learning_rate=1e-3`. Every value
is checked against its annotation; a key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from mmdlm.errors import InputError

T = TypeVar("T")


def load_config(cls: type[T], yaml_path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """An instance of the dataclass `cls`: its defaults, then the YAML file, then `key=value` strings, in order.

    The value of an override is read as YAML: `steps=10`, `lengths=[1,2]`, `policy={name: top_k}`, `vae=null`. A list or
    dict replaces the one before it; a nested dataclass is changed key by key.

    Raises InputError, with the file's or override's name, for a file that is missing or no mapping, an unknown key, a
    value of the wrong type, and a setting that has no default and is given nowhere.
    """
    values: dict[str, Any] = {}
    if yaml_path is not None:
        _merge(cls, values, _read(Path(yaml_path)), str(yaml_path))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise InputError(f"The setting {override!r} is not understood, expected key=value, for example steps=100.")
        changed: Any = _parse(value, f"The setting {override!r}")
        for part in reversed(key.strip().split(".")):
            changed = {part: changed}
        _merge(cls, values, changed, f"the setting {override!r}")
    return _build(cls, values, "")


def save_config(config: Any, path: str | Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back equal."""
    Path(path).write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"The settings file {path} cannot be read ({reason}): check its path.") from error
    values = _parse(text, f"The settings file {path}")
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InputError(f"{path} holds a {type(values).__name__}, expected settings, one `key: value` per line.")
    return values


def _parse(text: str, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{what} is not valid YAML ({reason}): quote values with special characters.") from error


def _merge(cls: Any, into: dict[str, Any], values: Mapping[Any, Any], source: str, prefix: str = "") -> None:
    """Write `values` over `into`, key by key where a setting is a dataclass of its own."""
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls) if field.init}
    for key, value in values.items():
        if key not in known:
            near = get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise InputError(
                f"There is no setting {prefix}{key} ({source}): "
                + (f"did you mean {prefix}{near[0]}?" if near else f"{prefix.rstrip('.') or cls.__name__} has none.")
            )
        inner = _inner_dataclass(hints[key])
        if inner is not None and isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                # What the default holds stays, where `value` does not say otherwise.
                start = into[key] if key in into else _default(known[key])
                into[key] = {f.name: getattr(start, f.name) for f in fields(start)} if is_dataclass(start) else {}
            _merge(inner, into[key], value, source, f"{prefix}{key}.")
        else:
            into[key] = value


def _default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _build(cls: type[T], values: Mapping[str, Any], prefix: str) -> T:
    hints = get_type_hints(cls)
    arguments = {}
    for field in fields(cast(Any, cls)):
        if field.name in values:
            arguments[field.name] = _convert(values[field.name], hints[field.name], f"{prefix}{field.name}")
        elif field.init and field.default is MISSING and field.default_factory is MISSING:
            raise InputError(f"The setting {prefix}{field.name} has no default and is not given: set it in the YAML.")
    return cls(**arguments)


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as `hint` wants it, or InputError. Only what loses nothing is converted: int to float, list to tuple."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, inside, hint, name)
    if hint is Any:
        return value
    if origin is Literal:
        # 1 == True in Python, and not here
        if not any(value == choice and type(value) is type(choice) for choice in inside):
            raise _wrong(value, f"one of {', '.join(map(str, inside))}", name)
        return value
    if is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(cast(type, hint), value, f"{name}.")
        if isinstance(value, cast(type, hint)):
            return value
    kind = origin or hint
    if kind in (list, tuple, Sequence) and isinstance(value, (list, tuple)):
        return _convert_sequence(value, kind, inside, hint, name)
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        each = inside or (Any, Any)
        return {_convert(k, each[0], name): _convert(v, each[1], f"{name}.{k}") for k, v in value.items()}
    if kind is float and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as a string, for want of a dot
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                raise _wrong(value, "a number", name) from None
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind in (int, str, bool, type(None)) and type(value) is kind:
        return value
    raise _wrong(value, _spelled(hint), name)


def _convert_union(value: Any, choices: tuple[Any, ...], hint: Any, name: str) -> Any:
    # An exact type first, so that `int | float` keeps 3 an int and `float | str` keeps text that looks like a number.
    for choice in sorted(choices, key=lambda choice: choice is not type(value)):
        try:
            return _convert(value, choice, name)
        except InputError as error:
            if _inner_dataclass(choice) is not None and isinstance(value, Mapping):
                raise error
    raise _wrong(value, _spelled(hint), name)


def _convert_sequence(value: Sequence[Any], kind: Any, inside: tuple[Any, ...], hint: Any, name: str) -> Any:
    if kind is tuple and inside and inside[-1] is not Ellipsis:
        if len(value) != len(inside):
            raise _wrong(list(value), _spelled(hint), name)
        each: Sequence[Any] = inside
    else:
        each = [inside[0] if inside else Any] * len(value)
    converted = [_convert(item, one, f"{name}[{i}]") for i, (item, one) in enumerate(zip(value, each, strict=True))]
    return tuple(converted) if kind is tuple else converted


def _inner_dataclass(hint: Any) -> Any:
    """The dataclass of a setting that is one, or may be one; else None."""
    return next((choice for choice in (hint, *get_args(hint)) if is_dataclass(choice)), None)


def _plain(value: Any) -> Any:
    """Only what a YAML file can hold without tags."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _spelled(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spelled(choice) for choice in get_args(hint))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint) or (hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint))


def _wrong(value: Any, expected: str, name: str) -> InputError:
    return InputError(f"The setting {name} is {value!r}, expected {expected}: change it.")

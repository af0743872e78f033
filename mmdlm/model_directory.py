"""A model directory on disk: what has to be in it, its sampling presets, its hash.

diffusers' layout: `model_index.json` names the class of every component, each component has a folder of that name,
weights are safetensors. Everything is looked at before anything is loaded, so that a wrong directory is one sentence
and not a traceback from three libraries down. No torch here: the command line asks these questions first.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmdlm.errors import InputError

INDEX = "model_index.json"
PRESETS = "generation_config.json"
FORMAT_KEY, FORMAT = "_mmdlm_format", 1  # raised when an older mmdlm could no longer read what is saved
COMPONENTS = ("model", "visual_tokenizer", "processor")
_WITH_WEIGHTS = ("model", "visual_tokenizer")
_TOKENIZER = "tokenizer.json"
_TABLES = ("config.json", "processor_config.json", _TOKENIZER, "tokenizer_config.json")  # read of every component


def check_model_directory(directory: Path) -> None:
    """Raises InputError when `directory` is no mmdlm model, was saved in another format, is incomplete or broken, or
    may not be read."""
    if not os.path.isdir(directory):  # False where Path would raise: a name that is too long
        raise InputError(f"There is no model directory at {directory}: check the path given to --model.")
    _check_readable(directory)
    if not (directory / INDEX).is_file():
        raise InputError(
            f"{directory} is no model directory, it has no {INDEX}: give the directory that save_pretrained wrote."
        )
    index = _read_json(directory / INDEX)
    for component in COMPONENTS:
        entry = index.get(component)
        # Only our own modules are imported for a component, whatever a stranger's index says.
        names = entry if isinstance(entry, list) and all(isinstance(name, str) for name in entry) else []
        if len(names) != 2 or not names[0].startswith("mmdlm."):
            raise InputError(
                f"{directory} is a model of {index.get('_class_name', 'another kind')}, its {component!r} is "
                f"{entry!r}, expected one of mmdlm's classes: give an mmdlm model, or convert this one first."
            )
        if not (directory / component).is_dir():
            raise InputError(f"{directory} is incomplete, it has no folder {component}: copy all of it again.")
        _check_readable(directory / component)
    found = index.get(FORMAT_KEY)
    if found != FORMAT:
        raise InputError(
            f"{directory} was saved by another version of mmdlm (format {found}, this version reads {FORMAT}): "
            "update mmdlm, or save the model again with this version."
        )
    for component in _WITH_WEIGHTS:
        _check_weights(directory / component)
    for component in COMPONENTS:
        _check_tables(directory / component)


def check_tokenizer(path: Path) -> None:
    """Raises InputError unless `path` is a tokenizer.json with a vocabulary; what else is in it, the library checks."""
    model = _read_json(path).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    # A table of words and ids; a unigram model has a list of words and scores.
    if not (isinstance(vocabulary, (dict, list)) and vocabulary):
        raise InputError(f"{path} is no tokenizer, it has no words in model.vocab: copy or download it again.")


@contextmanager
def whole_directory(directory: Path, *, variants: bool = False) -> Iterator[Path]:
    """A path to save a model at; it becomes `directory` when all went well, and else that stays what it was.

    A new directory gets its name in one move. Into one that is there, whose other files stay, the parts are moved one
    after the other, model_index.json last: a kill between these moves leaves no model, never the halves of two.
    `variants`: weights that were not written again stay too. Raises InputError where `directory` is a file.
    """
    directory = Path(os.path.abspath(directory))
    there = os.path.lexists(directory)
    if there and not directory.is_dir():
        raise InputError(f"{directory} is a file, expected a directory to save the model in: choose another name.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # One that is there may be a file system of its own, into which nothing can be renamed from outside.
    prefix, where = (".saving-", directory) if there else (".writing-", directory.parent)
    aside = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
    new = aside / directory.name  # the Hub names a repository after it
    try:
        yield new
        if there:
            _move_in(new, directory, Path(tempfile.mkdtemp(dir=aside)), variants)
            for abandoned in directory.glob(".saving-*"):  # by a process that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
        else:
            os.replace(new, directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def finish_model_directory(directory: Path) -> None:
    """After diffusers has saved: write the format number, and take out the path the model was once loaded from."""
    for path in (directory / INDEX, directory / "visual_tokenizer" / "config.json"):
        content = _read_json(path)
        content.pop("_name_or_path", None)
        if path.name == INDEX:
            content[FORMAT_KEY] = FORMAT
        _write_json(path, content)


def read_presets(directory: Path, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sampling presets of every task in `defaults`, overridden by the directory's own where it has any."""
    path = directory / PRESETS
    saved = _read_json(path) if path.is_file() else {}
    for task, preset in saved.items():
        if task in defaults and not isinstance(preset, dict):
            raise InputError(f"{path} has {preset!r} for {task!r}, expected a table of settings: mend the file.")
    return {task: {**preset, **saved.get(task, {})} for task, preset in defaults.items()}


def write_presets(directory: Path, presets: Mapping[str, Mapping[str, Any]]) -> None:
    _write_json(directory / PRESETS, presets)


def weight_names(directory: Path) -> set[str]:
    """The names of all tensors in a component's safetensors files."""
    names: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as weights:
            names.update(weights.keys())
    return names


def model_hash(directory: Path) -> str:
    """The first 16 hex digits of the SHA-256 over the weights and the text tokenizer: what the model is.

    Configurations are left out: saving a model again may rewrite them, and what the presets set is recorded elsewhere.
    """
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for path in sorted((directory / component).iterdir()):
            if path.suffix == ".safetensors" or path.name == _TOKENIZER:
                digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
                with path.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _move_in(new: Path, directory: Path, old: Path, variants: bool) -> None:
    """Moves what is in `new` into `directory` and what had its names into `old`; on failure everything back."""
    names = sorted((path.name for path in new.iterdir()), key=lambda name: name == INDEX)
    for name in names:
        part, before = new / name, directory / name
        if part.is_dir() and before.is_dir():
            for file in before.iterdir():  # of somebody else; weights of before would be read as the model's
                if file.is_file() and not (part / file.name).exists() and (variants or ".safetensors" not in file.name):
                    shutil.copy2(file, part)
    try:
        for name in reversed(names):
            if os.path.lexists(directory / name):
                os.replace(directory / name, old / name)
        for name in names:
            os.replace(new / name, directory / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(new / name):
                os.replace(directory / name, new / name)
            if os.path.lexists(old / name):
                os.replace(old / name, directory / name)
        raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _check_weights(component: Path) -> None:
    if not (component / "config.json").is_file():
        raise InputError(f"{component} is incomplete, it has no config.json: copy the whole model directory again.")
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise InputError(f"{component} has no safetensors weights, no other kind is read: save them as safetensors.")
    for path in files:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is broken or cut short ({str(error).splitlines()[0]}): copy or download it again."
            ) from error


def _check_tables(component: Path) -> None:
    """What transformers and diffusers would answer with a KeyError, or with an AttributeError from deep inside."""
    for name in _TABLES:
        path = component / name
        if not path.is_file():
            continue
        if name == _TOKENIZER:
            check_tokenizer(path)
            continue
        trunk = _read_json(path).get("trunk")
        if trunk is not None and not (isinstance(trunk, dict) and isinstance(trunk.get("model_type"), str)):
            raise InputError(
                f"{path} has a trunk without a model_type, expected the name of a decoder such as 'llama': copy or "
                "download it again."
            )


def _check_readable(directory: Path) -> None:
    # The right to list it and the right to enter it: without one of them files seem to be missing, or Path raises.
    if not os.access(directory, os.R_OK | os.X_OK):
        raise InputError(f"{directory} may not be read by you: change its permissions or copy it.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): copy the model directory again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a table: copy the model directory again.")
    return content

"""The command line of every program: `--config NAME_OR_FILE key=value ...`; `out` is tried before the work starts."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mmdlm.config import load_config
from mmdlm.errors import InputError

T = TypeVar("T")


def run_program(main: Callable[[list[str]], None]) -> None:
    """Runs a program on the command line's arguments; an InputError is one sentence and exit code 2, as in the CLI."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def config_from_arguments(cls: type[T], arguments: Sequence[str], *, program: str) -> T:
    """Builds the program's configuration; a bare NAME means the YAML of that name beside the program.

    Prints one sentence and exits with code 2 where an argument is wrong, since a person typed it, or where nothing can
    be written to the configuration's `out`.
    """
    try:
        rest, yaml_path = list(arguments), None
        if "--config" in rest:
            at = rest.index("--config")
            if at + 1 == len(rest):
                raise InputError("--config stands last, expected a name or a YAML file after it")
            yaml_path = _find(rest[at + 1], Path(program).parent)
            del rest[at : at + 2]
        flags = [item for item in rest if "=" not in item]
        if flags:
            raise InputError(f"got {flags[0]!r}, expected key=value (for example max_train_steps=100) or --config NAME")
        config = load_config(cls, yaml_path, [item.removeprefix("--") for item in rest])
        if isinstance(out := getattr(config, "out", None), str):
            check_out(Path(out))
        return config
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def check_out(out: Path) -> None:
    """InputError unless `out` is, or can become, a directory to write into; leaves nothing behind."""
    nearest = next(place for place in (out, *out.parents) if os.path.lexists(place))  # programs make what is missing
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(out)  # a name that is too long shows here
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise InputError(
            f"out is {out}, expected a directory to write into, but {nearest} takes no file ({error.strerror}): give "
            "another out."
        ) from error


def _find(name: str, folder: Path) -> Path:
    for candidate in (Path(name), folder / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    raise InputError(f"no configuration {name!r}: expected a YAML file or one of {', '.join(known) or 'none'}")

"""The files that benchmarks come in and results go out as: JSON, JSON lines, and answers matched by their ids.

A file that is broken, or answers that are not exactly those asked for, are one `InputError`: a score over whatever
happened to match would be a wrong number that looks right.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmdlm.errors import InputError
from mmdlm.picture_files import write_whole

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

_IDS = ("question_id", "questionId", "image_id", "id", "file_name", "filename", "image")
# The endings under which a benchmark's picture is looked for when its file names only the picture's number.
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """The content of a JSON file; InputError where there is none, or it is no JSON.

    unique_keys: InputError too for a key that comes twice in one table, of which JSON keeps the last in silence.
    """
    try:
        hook = partial(unique, source=path, what="key") if unique_keys else None
        return json.loads(read_text(path), object_pairs_hook=hook)
    except ValueError as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): copy or download it again.") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """One table for each line of a JSON lines file; empty lines are passed over."""
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path} has no JSON on line {number} ({error}): copy or download it again.") from error
        if not isinstance(row, dict):
            raise InputError(f"{path} has {line[:60]!r} on line {number}, expected a table in braces: mend the line.")
        rows.append(row)
    return rows


def write_json(path: Path, content: Any) -> None:
    """Write beside `path`, then rename. NaN and infinities are refused with ValueError: no other program reads them."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line for each row, in their order."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_whole(path, "".join(lines).encode())


def field(row: Mapping[str, Any], name: str, source: Path) -> Any:
    """`row[name]`; InputError naming the file where the row has no such field."""
    if not isinstance(row, dict) or name not in row:
        has = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)[:60]
        raise InputError(f"{source} has a row without {name!r} (it has {has}): give the benchmark's own file.")
    return row[name]


def text_field(row: Mapping[str, Any], name: str, source: Path) -> str:
    """`row[name]` as text; InputError where it is nothing, a list or a table, of which str() would make an answer."""
    value = field(row, name, source)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        which = next((f" of {row[key]!r}" for key in _IDS if key in row), "")
        raise InputError(f"{source} has {json.dumps(value)[:60]} as {name!r}{which}, expected a text: mend the row.")
    return str(value)


def id_field(row: Mapping[str, Any], name: str, source: Path) -> Any:
    """`row[name]`, a number or a text; InputError where it is anything else."""
    text_field(row, name, source)
    return row[name]


def unique(pairs: Iterable[tuple[Key, Value]], source: Path, what: str = "id") -> dict[Key, Value]:
    """The pairs as a table; InputError for an id that comes twice, since one of the two would be lost in silence."""
    table: dict[Key, Value] = {}
    for key, value in pairs:
        if key in table:
            raise InputError(f"{source} has the {what} {key!r} twice, expected each once: delete one of the rows.")
        table[key] = value
    return table


def answers_for(asked: Sequence[Key], answers: Mapping[Key, Value], source: Path | str) -> list[Value]:
    """The answers in the order of `asked`. Raises InputError unless exactly these were answered."""
    missing = [key for key in asked if key not in answers]
    if missing:
        raise InputError(
            f"{source} answers {len(asked) - len(missing)} of {len(asked)} questions, {missing[0]!r} for one is "
            "missing, expected all: answer them all, or score against the questions that were asked."
        )
    unknown = set(answers) - set(asked)
    if unknown:
        raise InputError(
            f"{source} answers {len(unknown)} questions that were not asked, {next(iter(unknown))!r} for one: "
            "give the results of these questions."
        )
    return [answers[key] for key in asked]


def find_picture(folder: Path, names: Sequence[str]) -> Path:
    """The picture of one of these names, with its ending or without; InputError where there is none."""
    for name in names:
        for ending in ("", *PICTURE_ENDINGS):
            if (folder / f"{name}{ending}").is_file():
                return folder / f"{name}{ending}"
    named = " or ".join(dict.fromkeys(names))
    raise InputError(f"There is no picture {named} in {folder}: give the folder of the benchmark's pictures.")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; InputError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text (byte {error.start}): give the file as it was published.") from error

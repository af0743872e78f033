"""The records of a source of paired data: of which kind it is, and those of folders; see `mmdlm.data.paired`.

Nothing here decodes a picture. Nothing outside the source is read: names are looked up by `picture_contents.inside`,
sub-folders that are symbolic links are not entered, and files that are no regular files are not opened.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mmdlm.data.paired_rows import Record
from mmdlm.data.picture_contents import SUFFIXES, file_bytes, inside
from mmdlm.errors import InputError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLITS = {  # what datasets takes for a split in the name of a folder or file
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
    "held_out": ("held_out", "heldout", "held-out"),
}
_TABLES = (".jsonl", ".csv", ".parquet", ".tar")
_HUB_NAME = re.compile(r"([\w.-]+)/[\w.-]+")
LONGEST_LINE = 4 * 2**20  # bytes of one row of metadata
_LARGEST_TEXT = 64 * 2**20  # bytes of a text file that is read as a whole


def find_records(source: str | Path, *, split: str = "train", need_text: bool = True) -> Iterator[Record]:
    """The records of one split of `source`; see `mmdlm.data.paired.open_pairs` for what it may be.

    need_text=False: a folder without metadata gives every picture of it. Raises InputError at once, not at the first
    record, where there is no such source or split.
    """
    path = Path(source)
    if not str(source):  # which Path takes for the working directory
        raise InputError("No data was named, expected a folder, a .parquet or .tar file, or a name on the Hub.")
    if os.path.isdir(path):
        return _directory(path, split, need_text)
    if os.path.isfile(path):
        if path.suffix not in _TABLES:
            raise InputError(f"{source} is no data, expected a folder or a {', '.join(_TABLES)} file: unpack it first.")
        _one_split(path, split)
        return _files(path.parent, [path], need_text)
    # A mistyped folder is not looked for on the net.
    owner = _HUB_NAME.fullmatch(str(source))
    if os.path.lexists(path) or owner is None or os.path.lexists(owner[1]):
        raise InputError(
            f"There is no data at {source}: give a folder, a .parquet or .tar file, or a name on the Hub, OWNER/NAME."
        )
    from mmdlm.data.paired_tables import hub_records

    return hub_records(str(source), split)


def splits(source: str | Path) -> list[str]:
    """The splits that a local source has, "train" first; a name on the Hub is looked at as "train" only."""
    path = Path(source)
    if not os.path.isdir(path):
        return ["train"]
    if (path / "dataset_dict.json").is_file():
        return list(json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    tables = [found.stem for kind in (".parquet", ".tar") for found in _with_suffix(path, kind)]
    return list(_split_folders(path)) or [n for n in SPLITS if any(_is_of(n, t) for t in tables)] or ["train"]


def _split_folders(path: Path) -> dict[str, Path]:
    """{split: its folder}, where all that the folder has is folders called as splits are.

    A folder called train beside one called car, or beside pictures, holds pictures of trains.
    """
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    found = {split: path / name for split, words in SPLITS.items() for name in folders if name.lower() in words}
    others = any(entry.name in METADATA or entry.name.lower().endswith(SUFFIXES) for entry in entries)
    return {} if others or len(found) != len(folders) else found


def _directory(path: Path, split: str, need_text: bool) -> Iterator[Record]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        from mmdlm.data.paired_tables import saved_records

        return saved_records(path, split)
    folders = _split_folders(path)
    own = folders.get(split)
    start = own or path
    tables = [found for kind in (".parquet", ".tar") for found in _with_suffix(start, kind)
              if found.name not in METADATA]
    metadata = _walk(start, lambda name: name in METADATA)
    if tables and not metadata:
        named = [found for found in tables if any(_is_of(name, found.stem) for name in SPLITS)]
        chosen = [found for found in named if _is_of(split, found.stem)] if named and not own else tables
        if not chosen or (split != "train" and not named and not own):
            raise InputError(f"{path} has no split {split!r}: its files are {', '.join(f.name for f in tables[:5])}.")
        return _files(path, chosen, need_text)
    if not own and (split != "train" or folders):
        known = ", ".join(splits(path))
        raise InputError(f"{path} has no split {split!r}, expected one of its own ({known}): name one of them.")
    if metadata:
        return _files(path, metadata, need_text, start)
    return _beside(path, start, need_text)


def _files(root: Path, files: Iterable[Path], need_text: bool, start: Path | None = None) -> Iterator[Record]:
    """The records of metadata, parquet and tar files, one after the other."""
    named: set[str] = set()
    for path in files:
        where = path.relative_to(root).as_posix()
        try:
            content = inside(root, root, where)
            if path.suffix == ".parquet":
                from mmdlm.data.paired_tables import parquet_records

                found = parquet_records(root, path)
            elif path.suffix == ".tar":
                from mmdlm.data.paired_tars import tar_records

                found = tar_records(root, path)
            elif path.suffix == ".jsonl":
                found = _json_lines(root, path)
            elif path.suffix == ".csv":
                found = _csv_rows(root, path, content())
            else:
                raise InputError(f"{path.name} is no metadata, expected .jsonl, .csv, .parquet or .tar")
            for record in found:
                named.add((path.parent / str(record.columns.get("file_name"))).as_posix())
                yield record
        except (InputError, OSError) as error:
            yield Record(where, reason=str(error))
    if start is not None:
        pictures = _walk(start, lambda name: name.lower().endswith(SUFFIXES))
        idle = [path for path in pictures if path.as_posix() not in named]
        if not need_text:
            yield from (_bare(root, path) for path in idle)
        elif idle:
            first = idle[0].relative_to(root).as_posix()
            note = f"{len(idle)} picture(s) of the folder stand in no row of the metadata, {first} for one"
            yield Record(start.relative_to(root).as_posix(), note=note)


def _json_lines(root: Path, path: Path) -> Iterator[Record]:
    name = path.relative_to(root).as_posix()
    with path.open("rb") as file:
        start = file.read(4)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            yield Record(name, reason="the file is UTF-16, expected UTF-8: save it again as UTF-8")
            return
        file.seek(3 if start[:3] == b"\xef\xbb\xbf" else 0)
        if file.tell():
            yield Record(f"{name}:1", note="the file begins with a byte order mark, which is left out")
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{name}:{number}"
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE + 1)
                yield Record(where, reason=f"the line is longer than {LONGEST_LINE} bytes")
            elif not line.strip():
                yield Record(where, note="the line is blank")
            else:
                yield _json_record(root, path.parent, where, line)


def _json_record(root: Path, folder: Path, where: str, line: bytes) -> Record:
    columns, reason = json_object(line)
    if columns is None:
        return Record(where, reason=reason)
    return Record(where, columns, partial(inside, root, folder), _key(root, folder, columns))


def json_object(content: bytes) -> tuple[dict[str, Any] | None, str]:
    """The object that `content` holds, without its empty columns; or None and the reason."""
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, f"it is not UTF-8 (byte 0x{content[error.start]:02x} at {error.start}): save it again as UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"it is no valid JSON ({str(error)[:80]})"
    if not isinstance(found, dict):
        kinds = {list: "a list", str: "text", bool: "true or false"}
        return None, f"it holds {kinds.get(type(found), 'a number or null')}, expected an object in braces"
    return {str(name): value for name, value in found.items() if value is not None}, ""


def _csv_rows(root: Path, path: Path, content: bytes) -> Iterator[Record]:
    name = path.relative_to(root).as_posix()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        yield Record(name, reason="the file is UTF-16, expected UTF-8: save it again as UTF-8")
        return
    if content.startswith(b"\xef\xbb\xbf"):
        yield Record(f"{name}:1", note="the file begins with a byte order mark, which is left out")
        content = content[3:]
    # Bytes that are not UTF-8 become lone surrogates, which the check of the caption names row by row.
    reader = csv.reader(io.StringIO(content.decode("utf-8", "surrogateescape"), newline=""))
    header: list[str] = []
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(f"{name}:{reader.line_num}", reason=f"the row cannot be read ({error})")
            continue
        where = f"{name}:{reader.line_num}"
        if not header:
            header = [cell.strip() for cell in cells]
        elif not any(cell.strip() for cell in cells):
            yield Record(where, note="the line is blank")
        elif len(cells) != len(header):
            yield Record(where, reason=f"the row has {len(cells)} cells, expected {len(header)}: quote commas")
        else:
            columns = {key: _cell(key, value) for key, value in zip(header, cells, strict=True)
                       if value or key == "text"}
            yield Record(where, columns, partial(inside, root, path.parent), _key(root, path.parent, columns))


def _cell(column: str, value: str) -> Any:
    """A CSV cell of a column that may hold a list, written as JSON; one answer needs no brackets."""
    if column in ("text", "question", "answers", "messages") and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return [value] if column == "answers" else value


def _beside(root: Path, start: Path, need_text: bool) -> Iterator[Record]:
    """Every picture below `start`, with the .txt of its name: one phrasing a line."""
    pictures = _walk(start, lambda name: name.lower().endswith(SUFFIXES))
    if not pictures:
        raise InputError(
            f"{start} has no pictures and no metadata, expected metadata.jsonl, metadata.csv, parquet or tar files, or "
            "pictures with a .txt beside each: check the folder."
        )
    return (_with_words(root, path, need_text) for path in pictures)


def _with_words(root: Path, path: Path, need_text: bool) -> Record:
    words = path.with_suffix(".txt").relative_to(root).as_posix()
    bare = _bare(root, path)
    if not os.path.lexists(root / words):
        return bare if not need_text else Record(bare.where, reason=f"there is no {Path(words).name} beside it")
    try:
        inside(root, root, words)
        content = file_bytes(os.path.realpath(root / words), 0, min(os.stat(root / words).st_size, _LARGEST_TEXT))
    except (InputError, OSError) as error:
        return Record(words, reason=str(error))
    text, reason = decoded(content)
    if text is None:
        return Record(words, reason=reason)
    lines = [line for line in text.splitlines() if line.strip()]
    columns = dict(bare.columns) | {"text": lines or ""}
    note = "the file begins with a byte order mark, which is left out" if content[:3] == b"\xef\xbb\xbf" else None
    return Record(words, columns, bare.fetch, bare.key, note=note)


def decoded(content: bytes) -> tuple[str | None, str]:
    """The text of a UTF-8 file, without its byte order mark; or None and the reason."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return None, "the file is UTF-16, expected UTF-8: save it again as UTF-8"
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        found = f"byte 0x{content[error.start]:02x} at {error.start}"
        return None, f"the file is not UTF-8 ({found}): save it again as UTF-8"


def _bare(root: Path, path: Path) -> Record:
    name = path.relative_to(root).as_posix()
    return Record(name, {"file_name": name}, partial(inside, root, root), name)


def _key(root: Path, folder: Path, columns: dict[str, Any]) -> str | None:
    """A picture's path below the root, which names it among all metadata files; None where it has no name."""
    name = columns.get("file_name")
    return os.path.normpath((folder / name).relative_to(root)) if isinstance(name, str) and "\0" not in name \
        and not os.path.isabs(name) else None  # fmt: skip


def _walk(start: Path, wanted: Any) -> list[Path]:
    """Everything below `start` whose name is wanted, sorted; linked folders and hidden ones are not entered."""
    found = []
    for folder, inner, names in os.walk(start, followlinks=False):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        # A folder that is called as a picture would be is told of as a picture that cannot be read.
        found += [Path(folder, name) for name in (*names, *inner) if wanted(name) and not name.startswith(".")]
    return sorted(found)


def _with_suffix(path: Path, suffix: str) -> list[Path]:
    """Files of that kind in the folder, or in its `data` folder as the Hub has it."""
    places = [path, *([path / "data"] if (path / "data").is_dir() and not (path / "data").is_symlink() else [])]
    return sorted(
        Path(entry.path) for place in places for entry in os.scandir(place)
        if entry.name.endswith(suffix) and not entry.name.startswith(".")
    )  # fmt: skip


def _one_split(path: Path, split: str) -> None:
    if split != "train" and not _is_of(split, path.stem):
        raise InputError(f"{path} is one file, which has no split {split!r}: name no split, or a folder that has.")


def _is_of(split: str, name: str) -> bool:
    """Whether a folder's or file's name is that of the split, as in "test" or "test-00000-of-00001"."""
    words = SPLITS.get(split, (split,))
    return any(re.fullmatch(rf"(.*[-_. ])?{re.escape(word)}([-_. ].*)?", name.lower()) for word in words)

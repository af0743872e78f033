"""Webdataset tars: the members of one sample share their name up to its first dot, as in `0001.jpg`, `0001.txt`.

`.txt` holds phrasings, one a line; `.json` the columns of `mmdlm.data.paired_rows`; a picture is the member with a
picture's suffix, `0001.mask.png` and `0001.source.png` are the mask and the source. Nothing is unpacked to the disk,
and links inside a tar are not followed: a sample is its regular members.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mmdlm.data.paired_rows import Record
from mmdlm.data.paired_sources import decoded, json_object
from mmdlm.data.picture_contents import SUFFIXES, Content, file_bytes
from mmdlm.errors import InputError

_LARGEST_WORDS = 4 * 2**20  # bytes of a .txt or .json member


def tar_records(root: Path, path: Path) -> Iterator[Record]:
    """The samples of one uncompressed tar below `root`, in its order."""
    where = path.relative_to(root).as_posix()
    sample: dict[str, Content] = {}
    name: str | None = None
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                base, suffix = _parts(member.name)
                if member.issym() or member.islnk():
                    yield Record(f"{where}/{member.name}", reason="the member is a link, expected a regular file")
                if not member.isreg() or not suffix or member.sparse is not None:
                    continue
                if base != name and name is not None:
                    yield _record(where, name, sample)
                    sample = {}
                name = base
                sample[suffix] = partial(file_bytes, str(path), member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield Record(where, reason=f"the tar is broken or compressed ({str(error)[:80]}), expected an uncompressed one")
    if name is not None:
        yield _record(where, name, sample)


def _record(where: str, name: str, sample: dict[str, Content]) -> Record:
    place = f"{where}/{name}"
    columns: dict[str, Any] = {}
    try:
        if "json" in sample:
            found, reason = json_object(_words(sample["json"]))
            if found is None:
                return Record(f"{place}.json", reason=reason)
            columns = {key: value for key, value in found.items() if not key.endswith("file_name")}
        if "txt" in sample:
            text, reason = decoded(_words(sample["txt"]))
            if text is None:
                return Record(f"{place}.txt", reason=reason)
            columns["text"] = [line for line in text.splitlines() if line.strip()] or ""
    except InputError as error:
        return Record(place, reason=str(error))
    for suffix, content in sample.items():
        kind, _, last = suffix.rpartition(".")
        if f".{last}" in SUFFIXES and kind in ("", "mask", "source"):
            columns.setdefault(kind or "image", content)
    return Record(place, columns, partial(_member, sample), place)


def _member(sample: dict[str, Content], name: object) -> Content:
    """A picture that a message names: by its suffix in the sample, as in "2.png" of 0001.2.png."""
    if not isinstance(name, str) or name not in sample:
        raise InputError(f"there is no {str(name)[:60]!r} in the sample, its members are {', '.join(sample)}")
    return sample[name]


def _words(content: Content) -> bytes:
    found = content()
    if len(found) > _LARGEST_WORDS:
        raise InputError(f"the member has {len(found)} bytes of words, expected at most {_LARGEST_WORDS}")
    return found


def _parts(name: str) -> tuple[str, str]:
    """("folder/0001", "mask.png") of folder/0001.mask.png."""
    path = PurePosixPath(name)
    base, _, suffix = path.name.partition(".")
    return (path.parent / base).as_posix(), suffix.lower()

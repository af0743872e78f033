"""A clean copy of paired data: the good rows, RGB pictures under plain names, one metadata.jsonl for each split."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from mmdlm.data.paired import PairedData
from mmdlm.data.paired_rows import Row, part_picture
from mmdlm.data.picture_contents import Content
from mmdlm.errors import InputError
from mmdlm.picture_reading import load_image

_ORIENTATION = 0x0112  # the EXIF tag of a camera's rotation
_LONGEST = 80  # characters of one part of a name


def write_clean(parts: Mapping[str, PairedData], out: Path, *, beside: tuple[str | Path, ...]) -> int:
    """Writes the rows of `parts` {split: data} to the new directory `out` and returns their number.

    PNG and JPEG files that are RGB and upright already are copied byte for byte, everything else becomes PNG. With
    several splits each is a sub-folder. It is written beside `out` and renamed. beside: the sources, which `out` may
    not lie in. Raises InputError where `out` exists, lies in a source, or cannot be written.
    """
    if os.path.lexists(out):
        raise InputError(f"{out} exists already, expected a new directory for the clean copy: choose another name.")
    real = Path(os.path.realpath(out))
    for source in beside:
        if os.path.isdir(source) and real.is_relative_to(os.path.realpath(source)):
            raise InputError(f"{out} lies in {source}, which is never written to: choose a place outside.")
    place = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        place.mkdir()
        for split, data in parts.items():
            _write_part(data, place if len(parts) == 1 else place / split)
        os.rename(place, out)
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): make room or choose another place.") from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return sum(map(len, parts.values()))


def _write_part(data: PairedData, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    files = _Files(folder)
    lines = [json.dumps(_columns(row, files), ensure_ascii=False) + "\n" for row in data.rows]
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _columns(row: Row, files: _Files) -> dict[str, Any]:
    """The row's line, after its pictures have been written."""
    name = _plain_name(row.key)
    columns: dict[str, Any] = {"file_name": files.add(row.image, name)}
    if row.texts:
        columns["text"] = row.texts[0] if len(row.texts) == 1 else row.texts
    if len(row.questions) == 1:
        columns["question"], columns["answers"] = row.questions[0]
    elif row.questions:
        columns["question"] = [question for question, _ in row.questions]
        columns["answers"] = [answers for _, answers in row.questions]
    if row.mask:
        columns["mask_file_name"] = files.add(row.mask, f"masks/{name}", grey=True)
    if row.source:
        columns["source_file_name"] = files.add(row.source, f"sources/{name}")
    if row.messages:
        columns["messages"] = [_message(message, row, files) for message in row.messages]
    return columns


def _message(message: Mapping[str, Any], row: Row, files: _Files) -> dict[str, Any]:
    content = message["content"]
    if not isinstance(content, list):
        return {"role": message["role"], "content": content}
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        else:
            name = part_picture(part)
            shown = {"image": files.add(row.pictures[name], _plain_name(name))} if name is not None else {}
            parts.append({"type": "image", **shown})
    return {"role": message["role"], "content": parts}


class _Files:
    """The pictures written to a folder: equal bytes once, no two names that differ in case only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[str, bool], str] = {}
        self.taken: set[str] = {"metadata.jsonl"}

    def add(self, content: Content, name: str, *, grey: bool = False) -> str:
        """Writes a picture under `name`, or nearly so, with the suffix of what it is; the name it got."""
        found = content()
        key = (hashlib.sha256(found).hexdigest(), grey)
        if key in self.known:
            return self.known[key]
        suffix = None if grey else _as_it_is(found)
        if suffix is None:
            buffer = io.BytesIO()
            decoded = load_image(found)
            (decoded.convert("L") if grey else decoded).save(buffer, "PNG")
            found, suffix = buffer.getvalue(), ".png"
        stem = re.sub(r"\.[A-Za-z]{3,4}$", "", name)
        chosen, count = stem + suffix, 1
        while chosen.casefold() in self.taken:
            count += 1
            chosen = f"{stem}-{count}{suffix}"
        self.taken.add(chosen.casefold())
        path = self.folder / chosen
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found)
        self.known[key] = chosen
        return chosen


def _as_it_is(content: bytes) -> str | None:
    """The suffix of a PNG or JPEG that is an upright opaque RGB picture already; None for all others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(content)) as header:
            plain = header.mode == "RGB" and "transparency" not in header.info
            upright = header.getexif().get(_ORIENTATION, 1) == 1
            return {"PNG": ".png", "JPEG": ".jpg"}.get(header.format or "") if plain and upright else None


def _plain_name(key: str) -> str:
    """A relative name of letters, digits, dots, dashes and spaces, from any key."""
    parts = [re.sub(r"[^\w. -]", "_", part).lstrip(". ")[-_LONGEST:] for part in key.split("/")]
    return "/".join(part for part in parts if part) or "picture"

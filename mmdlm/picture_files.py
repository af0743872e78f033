"""Pictures on disk: PNG with where it came from, sheets, pictures of the process, and nothing half-written.

A path is tried before the work starts (`check_writable`) and written at the end in one move (`write_whole`).
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, PngImagePlugin

from mmdlm.errors import InputError

STEP_MILLISECONDS, LAST_MILLISECONDS = 150, 1500


def check_writable(path: Path, suffix: str) -> None:
    """Raises InputError unless a file can be written at `path`, whose name ends in `suffix`; leaves nothing behind."""
    if path.suffix.lower() != suffix:
        raise InputError(f"{path} cannot be written, expected a name ending in {suffix}: rename it.")
    # os.path and not Path: names that are too long are no error there, they show when the file is tried below.
    if os.path.isdir(path):
        raise InputError(f"{path} is a directory, expected the name of a {suffix} file: add a file name.")
    if not os.path.isdir(path.parent):
        raise InputError(f"{path} cannot be written, there is no directory {path.parent}: create it first.")
    beside = _beside(path)
    try:
        # Permissions, a read-only disk and names that are too long all show here, and only here for root.
        beside.touch(exist_ok=True)
        beside.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another place.") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: whoever looks finds the old file or the whole new one. Raises InputError."""
    beside = _beside(path)
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): make room or choose another place.") from error
    finally:
        beside.unlink(missing_ok=True)


def numbered(path: Path, count: int) -> list[Path]:
    """`apple.png` for one picture; `apple-0.png`, `apple-1.png` ... for several."""
    if count == 1:
        return [path]
    digits = len(str(count - 1))
    return [path.with_name(f"{path.stem}-{index:0{digits}}{path.suffix}") for index in range(count)]


def png(picture: Image.Image, facts: Mapping[str, object]) -> bytes:
    """The bytes of a PNG that carries `facts` as text chunks; Pillow reads them back as `Image.open(path).text`."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in facts.items():
        chunks.add_itxt(key, str(value))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=chunks)
    return buffer.getvalue()


def gif(frames: Sequence[Image.Image]) -> bytes:
    """The bytes of an animation that stays on its last frame for a while and starts again."""
    buffer = io.BytesIO()
    durations = [STEP_MILLISECONDS] * (len(frames) - 1) + [LAST_MILLISECONDS]
    frames[0].save(buffer, "GIF", save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)
    return buffer.getvalue()


def sheet(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row after row, two white pixels apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for index, picture in enumerate(pictures):
        whole.paste(picture, (index % columns * (width + 2), index // columns * (height + 2)))
    return whole


def heat_map(shares: Sequence[Sequence[float]], side: int) -> Image.Image:
    """Rows of numbers in [0, 1] as a picture of `side` pixels a side: black is 0, through red and yellow white is 1."""
    colours = [bytes(round(255 * min(max(3 * share - band, 0.0), 1.0)) for band in range(3))
               for row in shares for share in row]
    small = Image.frombytes("RGB", (len(shares[0]), len(shares)), b"".join(colours))
    return small.resize((side, side), Image.Resampling.NEAREST)


def check_directory(path: Path) -> None:
    """Raises InputError unless `path` is, or can become, a directory to write files into; leaves nothing behind."""
    if os.path.isdir(path):
        check_writable(path / "step.png", ".png")
        return
    if os.path.lexists(path):
        raise InputError(f"{path} is a file, expected a directory: choose another name.")
    check_writable(path.with_name(path.name + ".png"), ".png")


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")

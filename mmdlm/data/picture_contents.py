"""Where a row's picture comes from: a file inside a folder, a part of a tar, a cell of a table; and what is seen of it.

A `Content` is a function without arguments that gives the bytes of a picture file now, or raises InputError. Names come
from strangers: `inside` turns a name into a content only where it stays in its folder, through symbolic links too.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmdlm.data.duplicates import difference_hash
from mmdlm.errors import InputError
from mmdlm.picture_reading import load_image

Content = Callable[[], bytes]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
LARGEST_FILE = 512 * 2**20  # bytes of one picture file
LEAST_SIDE = 8  # pixels; nothing can be learned from less


class Seen(NamedTuple):
    """What one look at a picture says: `hash` of its RGB pixels and size after every conversion (hex, sha256), the
    perceptual hash (`mmdlm.data.duplicates`), width and height in pixels, the file's own mode and format."""

    hash: str
    perceptual: bytes
    width: int
    height: int
    mode: str
    format: str


def inside(root: Path, folder: Path, name: object) -> Content:
    """The content of the file `name`, relative to `folder`, which lies in `root`; nothing is read yet.

    Raises InputError, with the reason in one sentence, for what is no relative name, leads outside `root` (by its
    name or through a symbolic link), is missing, or is no regular file.
    """
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"the file name is {_short(name)}, expected the name of a picture in the folder")
    if "\0" in name:
        raise InputError(f"the file name {_short(name)} has a null byte in it")
    if re.match(r"[A-Za-z][\w+.-]+://", name):
        raise InputError(f"{_short(name)} is an address, expected the name of a picture in the folder")
    if PurePosixPath(name).is_absolute() or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[\\/]|\\\\", name):
        raise InputError(f"{_short(name)} leads outside the folder, expected a name relative to it, without ..")
    path = folder / name
    try:
        real = Path(os.path.realpath(path, strict=True))
        if not real.is_relative_to(os.path.realpath(root)):
            raise InputError(f"{_short(name)} is a symbolic link that leads outside the folder")
        kind = os.stat(real).st_mode
    except OSError as error:
        if os.path.islink(path):
            raise InputError(f"{_short(name)} is a symbolic link that leads nowhere ({error.strerror})") from error
        raise InputError(f"there is no file {_short(name)} ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"the file name {_short(name)} cannot be looked up ({error})") from error
    if not stat.S_ISREG(kind):
        what = "a directory" if stat.S_ISDIR(kind) else "a pipe or a device"
        raise InputError(f"{_short(name)} is {what}, expected a picture file")
    return partial(file_bytes, str(real))


def file_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a regular file, or `size` of them from `offset` on; InputError where that cannot be had."""
    try:
        # Whatever was put there since it was looked up: no link is followed, no pipe waited for.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            wanted = status.st_size - offset if size is None else size
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{Path(path).name} is no regular file")
            if wanted > LARGEST_FILE:
                raise InputError(f"{Path(path).name} has {wanted} bytes, expected at most {LARGEST_FILE}")
            file.seek(offset)
            found = file.read(wanted)
    except OSError as error:
        raise InputError(f"{Path(path).name} cannot be read ({error.strerror})") from error
    if len(found) != wanted:
        raise InputError(f"{Path(path).name} is cut short")
    return found


def picture(content: Content) -> Image.Image:
    """The content as an upright RGB picture, see `mmdlm.picture_reading.load_image`. Raises InputError."""
    return load_image(content())


def look(content: Content) -> Seen:
    """Decodes a picture once. Raises InputError for what `load_image` refuses, and for pictures that are too small."""
    found = content()
    decoded = load_image(found)
    if min(decoded.size) < LEAST_SIDE:
        raise InputError(
            f"the picture has {decoded.width} x {decoded.height} pixels, expected at least {LEAST_SIDE} a side"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(found)) as header:
            mode, form = header.mode, header.format or ""
    return Seen(picture_hash(decoded), difference_hash(decoded), decoded.width, decoded.height, mode, form)


def picture_hash(decoded: Image.Image) -> str:
    """sha256 of an RGB picture's size and pixels, in hex: equal for equal pictures, however they are stored."""
    digest = hashlib.sha256(f"{decoded.width}x{decoded.height}".encode())
    digest.update(np.ascontiguousarray(np.asarray(decoded)).tobytes())
    return digest.hexdigest()


def _short(name: object) -> str:
    text = repr(name)
    return text if len(text) <= 80 else text[:60] + "..." + text[-12:]

"""Strangers' picture files: any size, any mode that Pillow reads -> upright RGB, square where asked.

What is transparent is laid on white, a camera's rotation is carried out, sixteen bits become eight. A file is trusted
with nothing: its size is read before its pixels are unpacked, and only raster formats are opened at all.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmdlm.errors import InputError

Picture = str | Path | bytes | Image.Image

# Raster formats only: Pillow's EPS reader would start Ghostscript on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FITS = ("pad", "crop", "squash")  # how a picture becomes a square, see `fit_square`
LARGEST_PICTURE = 64 * 2**20  # pixels; a decompression bomb states its size before it is unpacked
# What Pillow's readers raise on bad files: IndexError its GIF, RuntimeError its AVIF, TypeError its TIFF and its EXIF.
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError, TypeError, AttributeError, ArithmeticError,
    struct.error,
)  # fmt: skip


def fit_square(picture: Image.Image, side: int, fit: str = "pad") -> Image.Image:
    """An RGB picture -> one of side x side pixels.

    fit: "pad" keeps it whole, on a square in the median colour of its border; "crop" scales the shorter side to `side`
    and cuts out the centre, as Show-o and MMaDA do; "squash" scales both sides. All are bicubic. Raises InputError for
    another word.
    """
    if fit == "pad":
        return _padded(picture, side)
    if fit == "squash":
        return picture.resize((side, side), Image.Resampling.BICUBIC)
    if fit != "crop":
        raise InputError(f"picture_fit is {fit!r}, expected {', '.join(FITS[:-1])} or {FITS[-1]}.")
    shorter = min(picture.size)
    width, height = (side if length == shorter else int(side * length / shorter) for length in picture.size)
    # torchvision's rounding, half to even: another one would shift the cut by a pixel.
    left, top = round((width - side) / 2), round((height - side) / 2)
    scaled = picture.resize((width, height), Image.Resampling.BICUBIC)
    return scaled.crop((left, top, left + side, top + side))


def load_image(picture: Picture, *, largest: int = LARGEST_PICTURE) -> Image.Image:
    """A path, the bytes of a file or a Pillow picture -> an upright RGB picture; what is transparent becomes white.

    Raises InputError when there is no such file, when it is empty or broken or no picture, when it has more than
    `largest` pixels, and when it has several frames: which of them is meant is not for the machine to guess.
    """
    if isinstance(picture, Image.Image):
        return _upright_rgb(picture, "The picture")
    name = "The picture" if isinstance(picture, bytes) else str(picture)
    with _open(picture, name) as opened:
        width, height = opened.size
        if width * height > largest:
            raise InputError(
                f"{name} has {width} x {height} pixels, expected at most {largest / 2**20:.3g} megapixels: "
                "scale it down first."
            )
        try:
            # To count frames is to read on: here a GIF shows that it was cut behind its first one. A phone's MPO is a
            # JPEG with a second, smaller view behind it; its first picture is the picture.
            if getattr(opened, "is_animated", False) and opened.format != "MPO":
                raise InputError(
                    f"{name} is animated or has several pages, expected one still picture: "
                    "save the frame you mean as a PNG."
                )
            opened.load()
            return _upright_rgb(opened, name)
        except InputError:
            raise
        except _UNREADABLE as error:
            raise InputError(
                f"{name} starts like a picture but is broken or cut short ({_reason(error)}): save it again."
            ) from error


def _open(picture: str | Path | bytes, name: str) -> Image.Image:
    """Read the header only: size, mode and format are known, no pixel is unpacked yet."""
    if not isinstance(picture, bytes):
        if not os.path.exists(picture):  # False where Path would raise: a name that is too long
            raise InputError(f"There is no picture at {name}: check the path.")
        if not os.path.isfile(picture):
            raise InputError(f"{name} is no file: give the path of one picture.")
    if (len(picture) if isinstance(picture, bytes) else Path(picture).stat().st_size) == 0:
        raise InputError(f"{name} is empty, expected a picture: save or download it again.")
    with warnings.catch_warnings():
        # Our own limit speaks, in one sentence.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture, formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise InputError(
                f"{name} claims more pixels than can be unpacked, expected at most {LARGEST_PICTURE // 2**20} "
                "megapixels: scale it down first."
            ) from error
        except PermissionError as error:
            raise InputError(f"{name} may not be read by you: change its permissions or copy it.") from error
        except _UNREADABLE as error:
            raise InputError(
                f"{name} is no picture that can be read, expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}: "
                "convert it to PNG first."
            ) from error


def _upright_rgb(picture: Image.Image, name: str) -> Image.Image:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode == "F":
        raise InputError(f"{name} has floating-point pixels, expected 8 or 16 bits: convert it to PNG first.")
    if upright.mode.startswith("I"):
        # Pillow's own conversion of 16-bit greys cuts everything above 255 to white.
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        white = Image.new("RGBA", upright.size, "white")
        return Image.alpha_composite(white, upright).convert("RGB")
    return upright.convert("RGB")


def _padded(picture: Image.Image, side: int) -> Image.Image:
    """The whole picture on a `side` x `side` square filled with the median colour of its border."""
    if picture.size == (side, side):
        return picture
    width, height = picture.size
    if width == height:
        return picture.resize((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    levels = np.asarray(picture)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    red, green, blue = (int(level) for level in np.median(border, axis=0))
    return ImageOps.pad(picture, (side, side), Image.Resampling.BICUBIC, color=(red, green, blue))


def _reason(error: BaseException) -> str:
    """An exception's own words, short enough for the middle of a sentence."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.splitlines()[0][:120].rstrip(".")

"""Between people's files and the model's tensors: prompts to ids and back, pictures to pixels and back.

Codes are not here: pixels to codes is the visual tokenizer's work (`mmdlm.models.visual_tokenizer`), codes to ids is
the vocabulary's (`mmdlm.vocabulary`). Shape letters: B pictures, S = `image_size`, the side in pixels.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# diffusers finds how to load a component by looking for a base class in the component's own module:
# `ProcessorMixin` has to be a name of this module.
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from mmdlm.errors import InputError
from mmdlm.vocabulary import Vocabulary

Picture = str | Path | bytes | Image.Image

# Raster formats only: Pillow's EPS reader would start Ghostscript on a stranger's file.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FITS = ("pad", "crop", "squash")  # how a picture becomes a square, see `fit_square`
LARGEST_PICTURE = 64 * 2**20  # pixels; a decompression bomb states its size before it is unpacked
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error)  # what Pillow's readers raise on bad files


class MMDLMProcessor(ProcessorMixin):
    """The text tokenizer, the shared vocabulary and the picture size of one model.

    `vocabulary` may be given as a `Vocabulary` or as its `to_dict()`; `image_size` is the side in pixels of the
    square pictures the visual tokenizer was trained on; `picture_fit` says how a picture becomes such a square, see
    `fit_square`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None = None,
        vocabulary: Vocabulary | dict[str, Any] | None = None,
        image_size: int = 64,
        picture_fit: str = "pad",
    ) -> None:
        if vocabulary is None:
            raise InputError("MMDLMProcessor got no vocabulary, expected a Vocabulary or its to_dict(): pass one.")
        super().__init__(tokenizer=tokenizer)
        self.vocabulary = vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.from_dict(vocabulary)
        self.image_size = image_size
        if picture_fit not in FITS:
            raise InputError(f"picture_fit is {picture_fit!r}, expected {', '.join(FITS[:-1])} or {FITS[-1]}.")
        self.picture_fit = picture_fit

    def to_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes to processor_config.json."""
        saved: dict[str, Any] = super().to_dict()
        saved["vocabulary"] = self.vocabulary.to_dict()
        return saved

    def text_ids(self, text: str) -> list[int]:
        """The ids of `text`, without any special id; [] for the empty text.

        Raises InputError for lone surrogates, which no UTF-8 can hold (a shell argument that is not valid text).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"The text has bytes that are not valid UTF-8 at character {error.start}: type it again as plain text."
            ) from error
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def text(self, ids: Sequence[int] | Tensor) -> str:
        """The text of `ids` [L] up to the first eos; special ids are left out, broken UTF-8 becomes U+FFFD."""
        listed: list[int] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        if self.vocabulary.eos_id in listed:
            listed = listed[: listed.index(self.vocabulary.eos_id)]
        return str(self.tokenizer.decode(listed, skip_special_tokens=True)).strip()

    def pixels(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Pictures of any size and mode -> float32 [B, 3, S, S] in [-1, 1].

        A picture that is not square is made so as `picture_fit` says: "pad" keeps it whole, on a square in the colour
        of its border. Raises what `load_image` raises.
        """
        pictures = [images] if isinstance(images, (str, Path, bytes, Image.Image)) else list(images)
        squares = [fit_square(load_image(picture), self.image_size, self.picture_fit) for picture in pictures]
        rows = [np.asarray(square, dtype=np.float32) for square in squares]
        return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1.0

    def images(self, pixels: Tensor) -> list[Image.Image]:
        """Float [B, 3, H, W] in [-1, 1] -> B pictures. Values outside the range saturate, as in any 8-bit picture."""
        return [Image.fromarray(row) for row in to_levels(pixels).cpu().numpy()]


def to_levels(pixels: Tensor, *, truncate: bool = False) -> Tensor:
    """Float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; values outside the range saturate.

    truncate=True cuts the fraction off instead of rounding, as Show-o and MMaDA do: half a level darker on average.
    """
    pixels = pixels.detach().float().permute(0, 2, 3, 1)
    if truncate:
        return (((pixels + 1.0) / 2.0).clamp(0, 1) * 255.0).to(torch.uint8)
    return ((pixels + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


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
        # A phone's MPO is a JPEG with a second, smaller view behind it; its first picture is the picture.
        if getattr(opened, "is_animated", False) and opened.format != "MPO":
            raise InputError(
                f"{name} is animated or has several pages, expected one still picture: "
                "save the frame you mean as a PNG."
            )
        try:
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

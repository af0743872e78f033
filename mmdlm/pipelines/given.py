"""What is given of a picture: its pixels, what of it is to be filled, and how the filled one goes back into its place.

Shape letters: S = the model's side in pixels, h x w the grid of codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.processing import MMDLMProcessor, Picture, fit_square, load_image


class Given(NamedTuple):
    """A picture that is partly known."""

    picture: Image.Image  # RGB, of its own size
    hole: Image.Image  # L, of the same size: 255 where it is to be filled, else 0
    square: Image.Image  # RGB [S, S], what the tokenizer sees
    cells: Tensor  # bool [h, w]: codes with a pixel to be filled


def given_picture(
    picture: Picture,
    mask: Picture | None,
    extend: Sequence[int] | None,
    *,
    processor: MMDLMProcessor,
    cell: int,
) -> Given:
    """A picture with a mask (white is to be filled; None: nothing is), or with borders to be drawn around it.

    extend: pixels to add on the left, top, right and bottom. cell: pixels of a code's side.
    Raises InputError where the mask has another size than the picture or nothing white, where both are given, and
    where the picture with its borders is not of the model's size or a border is no multiple of `cell`.
    """
    known, side = load_image(picture), processor.image_size
    hole = Image.new("L", known.size, 0)
    if mask is not None and extend is not None:
        raise InputError("Got a mask and an extension, expected one of them: fill inside and outside in turn.")
    if mask is not None:
        drawn = load_image(mask)
        if drawn.size != known.size:
            raise InputError(
                f"The mask has {drawn.width} x {drawn.height} pixels, the picture {known.width} x {known.height}, "
                "expected the same: draw the mask over the picture."
            )
        hole = drawn.convert("L").point(lambda level: 255 if level >= 128 else 0)
        if hole.getbbox() is None:
            raise InputError("The mask has no white pixel, expected white where the picture is to be filled.")
    if extend is not None:
        known, hole = _extended(known, extend, side, cell)
    square, inside = fit_square(known, side, processor.picture_fit), _fitted_mask(hole, side, processor.picture_fit)
    blocks = torch.from_numpy(np.array(inside)).view(side // cell, cell, side // cell, cell)
    return Given(known, hole, square, (blocks > 0).any(dim=3).any(dim=1))


def put_back(given: Given, filled: Image.Image, fit: str) -> Image.Image:
    """`filled` [S, S] in the holes of the given picture; every other pixel is the given one, bit for bit."""
    size, side = given.picture.size, filled.width
    if size == (side, side):
        scaled = filled
    elif fit == "squash" or size[0] == size[1]:
        scaled = filled.resize(size, Image.Resampling.BICUBIC)
    elif fit == "pad":
        width, height = ImageOps.contain(given.picture, (side, side)).size
        left, top = round((side - width) / 2), round((side - height) / 2)
        scaled = filled.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    else:
        raise InputError(
            f"The picture has {size[0]} x {size[1]} pixels and this model sees a square cut out of it, expected a "
            "square to keep its pixels: cut it yourself first."
        )
    return Image.composite(scaled, given.picture, given.hole)


def _extended(picture: Image.Image, extend: Sequence[int], side: int, cell: int) -> tuple[Image.Image, Image.Image]:
    """The picture within borders in the colour of its own border, and the mask of the borders."""
    if len(extend) != 4 or min(extend) < 0 or not any(extend) or any(border % cell for border in extend):
        raise InputError(
            f"The extension is {','.join(map(str, extend))}, expected four multiples of {cell} pixels, for example "
            f"{4 * cell},0,{4 * cell},0 for left, top, right, bottom."
        )
    left, top, right, bottom = extend
    size = picture.width + left + right, picture.height + top + bottom
    if size != (side, side):
        room = side - left - right, side - top - bottom
        mend = f"scale it to {room[0]} x {room[1]} first" if min(room) > 0 else "extend it less"
        raise InputError(
            f"The picture of {picture.width} x {picture.height} pixels is {size[0]} x {size[1]} with its extension, "
            f"expected {side} x {side}, all that this model's grid holds: {mend}."
        )
    levels = np.asarray(picture)
    border = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
    red, green, blue = (int(level) for level in np.median(border, axis=0))
    wider, hole = Image.new("RGB", size, (red, green, blue)), Image.new("L", size, 255)
    wider.paste(picture, (left, top))
    hole.paste(0, (left, top, left + picture.width, top + picture.height))
    return wider, hole


def _fitted_mask(hole: Image.Image, side: int, fit: str) -> Image.Image:
    """The mask as the picture is fitted: a pixel is open where any part of it is."""
    if hole.size == (side, side):
        return hole
    if fit == "pad":  # the tokenizer's own border around the picture stays
        return ImageOps.pad(hole, (side, side), Image.Resampling.BOX, color=0)
    return fit_square(hole.convert("RGB"), side, fit).convert("L").point(lambda level: 255 if level >= 8 else 0)

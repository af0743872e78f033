"""What is given of one row of a fill: parts of a picture, parts of a text, and how sure each is.

Shape letters: L positions, A places for words, h x w the grid of codes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmdlm.pipelines.given import Given
from mmdlm.sequence import IMAGE, Canvas


class PartialRow(NamedTuple):
    """What is given of one row; h x w codes, A places for words."""

    given: Given | None
    codes: Tensor  # int64 [h, w]
    opened: Tensor  # bool [h, w]: codes to be drawn, whose value means nothing
    words: Tensor  # int64 [A], masks in the holes
    free: Tensor  # bool [A]: to be filled
    open: Tensor  # bool [A]: where the text may end
    pattern: Tensor  # int64 [A]: n in the n-th hole with a pattern, from 1; else 0
    patterns: list[str]
    choices: list[dict[str, float]]
    confidence: Tensor  # float [h, w]
    sure: Tensor  # float [A]


def varied(row: PartialRow, strength: float, generator: torch.Generator) -> PartialRow:
    """A share of a row's codes masked at random: of those under the mask, where there is one."""
    assert row.given is not None
    among = row.opened if bool(row.opened.any()) else torch.ones_like(row.opened)
    places = among.flatten().nonzero().flatten()
    count = math.ceil(strength * len(places))
    luck = torch.rand(len(places), generator=generator, dtype=torch.float64, device=generator.device).cpu()
    opened = torch.zeros_like(row.opened).flatten()
    opened[places[luck.argsort()[:count]]] = True
    opened = opened.view(row.opened.shape)
    # pixels are kept cell by cell, so in the picture as the tokenizer sees it
    square = row.given.square
    cells = Image.fromarray(opened.numpy().astype("uint8") * 255)
    hole = cells.resize(square.size, Image.Resampling.NEAREST)
    return row._replace(opened=opened, given=Given(square, hole, square, opened), confidence=(~opened).float())


def hidden(canvas: Canvas, opened: Tensor, mask_id: int) -> Canvas:
    """The canvas [L] with masks at its picture's open codes."""
    ids = canvas.ids.clone()
    at = canvas.modality == IMAGE
    ids[at] = torch.where(opened.flatten(), mask_id, ids[at])
    return canvas._replace(ids=ids)

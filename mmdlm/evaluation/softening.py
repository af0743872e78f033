"""Wear on clean renders, as a visual tokenizer leaves it: blur, blockiness, grain, a slight shift of colours.

A judge that has only seen clean renders would take the softness of a decoded picture for a fault of the drawing.
Shape letters: N pictures, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 4  # pixels of a block: a cell of the world, and of a tokenizer that makes pictures four times smaller


def soften(pixels: Tensor, *, generator: torch.Generator, share: float = 0.8) -> Tensor:
    """Each of the pictures [N, 3, H, W] in [-1, 1] worn by chance, a share of about `share` of them; as many back.

    H and W are multiples of 4. Values may leave [-1, 1] a little, as a decoder's do.
    """
    count, _, height, width = pixels.shape

    def amount(most: float) -> Tensor:
        drawn = torch.rand((count, 1, 1, 1), generator=generator) * most
        return drawn * (torch.rand((count, 1, 1, 1), generator=generator) < share)

    factor = (0.4, 0.5, 0.65)[int(torch.randint(3, (), generator=generator))]
    small = F.interpolate(pixels, scale_factor=factor, mode="bilinear", antialias=True)
    blurred = F.interpolate(small, (height, width), mode="bicubic")
    worn = pixels + amount(1.0) * (blurred - pixels)
    # Blocks: their mean instead of what is in them, and errors that whole blocks share, as wrong codes make them.
    blocks = F.avg_pool2d(worn, _BLOCK)
    worn = worn + amount(0.4) * (_enlarged(blocks) - worn)
    worn = worn + amount(0.12) * _enlarged(torch.randn(blocks.shape, generator=generator))
    worn = worn + amount(0.1) * torch.randn(worn.shape, generator=generator)
    gain = 1 + 0.08 * (2 * torch.rand((count, 3, 1, 1), generator=generator) - 1)
    return worn * gain + 0.06 * (2 * torch.rand((count, 3, 1, 1), generator=generator) - 1)


def _enlarged(blocks: Tensor) -> Tensor:
    return blocks.repeat_interleave(_BLOCK, 2).repeat_interleave(_BLOCK, 3)

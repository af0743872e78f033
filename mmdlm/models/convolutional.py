"""The blocks that visual tokenizers are built of, ours and the published ones alike.

Residual blocks (arXiv 1512.03385 in the form of VQGAN, arXiv 2012.09841), attention over the cells of a small grid,
and the adaptive GroupNorm of MAGVIT-v2 (arXiv 2310.05737, section 3.2). Shape letters: B pictures, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip: [B, C_in, h, w] -> [B, C_out, h, w].

    groups: of both norms; None for as many as `group_norm` chooses. bias: whether the convolutions have one.
    """

    def __init__(self, channels_in: int, channels_out: int, *, groups: int | None = None, bias: bool = True):
        super().__init__()
        self.norm1 = group_norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=bias)
        self.norm2 = group_norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=bias)
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1, bias=bias)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class CellBlock(nn.Module):
    """A residual block that looks at one cell at a time: LayerNorm over channels and two 1x1 convolutions.

    [B, C_in, h, w] -> [B, C_out, h, w]. No cell sees another, neither by convolution nor by a norm's statistics.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, 2 * channels_out, 1)
        self.conv2 = nn.Conv2d(2 * channels_out, channels_out, 1)
        self.skip = nn.Identity() if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.movedim(1, -1)).movedim(-1, 1)
        return self.skip(x) + self.conv2(F.silu(self.conv1(h)))


class GridAttention(nn.Module):
    """Every cell looks at every other with one head of C channels, around a skip: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels: int, *, groups: int | None = None):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query, self.key = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.value, self.out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (layer(h).flatten(2).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(seen.transpose(1, 2).reshape(x.shape))


class CodeModulation(nn.Module):
    """Normalises features and rescales them by what the codes say (the decoder's adaptive GroupNorm of MAGVIT-v2).

    x [B, C, h, w], codes [B, d, h', w'] -> [B, C, h, w]; the style is the codes' mean and spread over the grid.

    groups, eps: of the norm. unbiased: whether the spread divides by one less than the number of cells, as
    Open-MAGVIT2 does: a grid of a single cell has no spread then.
    """

    def __init__(
        self, channels: int, bits: int, *, groups: int | None = None, eps: float = 1e-5, unbiased: bool = False
    ):
        super().__init__()
        self.unbiased = unbiased
        self.norm = nn.GroupNorm(groups or _groups(channels), channels, eps=eps, affine=False)
        self.scale, self.shift = nn.Linear(bits, channels), nn.Linear(bits, channels)
        nn.init.zeros_(self.scale.weight)
        nn.init.ones_(self.scale.bias)
        nn.init.zeros_(self.shift.weight)
        nn.init.zeros_(self.shift.bias)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        flat = vectors.flatten(2)
        spread = (flat.var(-1, unbiased=self.unbiased) + 1e-6).sqrt()
        return self.scale(spread)[..., None, None] * self.norm(x) + self.shift(flat.mean(-1))[..., None, None]


def group_norm(channels: int, groups: int | None = None) -> nn.GroupNorm:
    """GroupNorm over `groups`; None for the most groups up to 32 that divide the channels and hold at least 4 each."""
    return nn.GroupNorm(groups or _groups(channels), channels, eps=1e-6)


def _groups(channels: int) -> int:
    """The most groups up to 32 that divide the channels and hold at least 4 of them each (or all there are)."""
    return next(
        n for n in (32, 24, 16, 12, 8, 6, 4, 3, 2, 1) if channels % n == 0 and channels // n >= min(4, channels)
    )

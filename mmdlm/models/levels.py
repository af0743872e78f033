"""The published tokenizers' encoder and decoder: levels of residual blocks, halved or doubled in between.

Both are VQGAN's (arXiv 2012.09841) around MAGVIT-v2's lookup-free quantizer (arXiv 2310.05737), and differ in what
`Layout` says: `magvitv2` is Show-o's and MMaDA's (arXiv 2408.12528, 2505.15809), `open_magvit2` is Open-MAGVIT2's
(arXiv 2409.04410). Unlike our own coders (`mmdlm.models.visual_tokenizer`) a level widens in its first block, in both
directions, and there is a middle behind the coarsest level.

Shape letters: B pictures, d code channels (bits), h = H/f, w = W/f with f = 2^(levels - 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import silu

from mmdlm.models.convolutional import CodeModulation, GridAttention, ResidualBlock, group_norm

GROUPS = 32  # of every norm; the published layouts know no other number


@dataclass(frozen=True)
class Layout:
    """What tells one published coder from another.

    convolution_bias: whether the residual blocks and the encoder's first convolution have a bias.
    middle_attention: the middle is a block, attention and a block; otherwise as many blocks as the coarsest level has.
    padded_right: halving pads one column right and one row below, otherwise one on every side.
    nearest: doubling repeats every cell and convolves, otherwise convolves to four times the channels and unfolds them.
    code_projection: a 1x1 convolution stands between coder and codes on both sides.
    code_modulation: adaptive GroupNorm before every level of the decoder.
    """

    convolution_bias: bool
    middle_attention: bool
    padded_right: bool
    nearest: bool
    code_projection: bool
    code_modulation: bool


MAGVITV2 = Layout(
    convolution_bias=True,
    middle_attention=True,
    padded_right=True,
    nearest=True,
    code_projection=True,
    code_modulation=False,
)
OPEN_MAGVIT2 = Layout(
    convolution_bias=False,
    middle_attention=False,
    padded_right=False,
    nearest=False,
    code_projection=False,
    code_modulation=True,
)
LAYOUTS = {"magvitv2": MAGVITV2, "open_magvit2": OPEN_MAGVIT2}


class LevelEncoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> code channels [B, d, H/f, W/f], unbounded.

    widths, blocks: channels and residual blocks of every level, finest first. stem_width: channels before the first.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], stem_width: int, bits: int, layout: Layout):
        super().__init__()
        self.stem = nn.Conv2d(3, stem_width, 3, padding=1, bias=layout.convolution_bias)
        self.levels = nn.ModuleList(
            _level(before, width, count, layout)
            for (before, width), count in zip(pairwise([stem_width, *widths]), blocks, strict=True)
        )
        self.downs = nn.ModuleList(_halving(width, layout) for width in widths[:-1])
        self.middle = _middle(widths[-1], blocks[-1], layout)
        self.norm = group_norm(widths[-1], GROUPS)
        side = 3 if layout.code_projection else 1
        self.out = nn.Conv2d(widths[-1], bits, side, padding=side // 2)
        self.projection = nn.Conv2d(bits, bits, 1) if layout.code_projection else nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels)
        for index, level in enumerate(self.levels):
            x = level(x)
            x = self.downs[index](x) if index < len(self.downs) else x
        return self.projection(self.out(silu(self.norm(self.middle(x)))))


class LevelDecoder(nn.Module):
    """Code vectors [B, d, h, w] -> pixels [B, 3, h*f, w*f], not clamped. The last layer's weight is `out.weight`.

    widths, blocks: of every level, finest first as the encoder's. The levels are kept in the order they run in,
    coarsest first.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int], bits: int, layout: Layout):
        super().__init__()
        coarsest_first = [widths[-1], *reversed(widths)]
        self.projection = nn.Conv2d(bits, bits, 1) if layout.code_projection else nn.Identity()
        self.stem = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.middle = _middle(widths[-1], blocks[-1], layout)
        self.modulations = nn.ModuleList(
            # Open-MAGVIT2's variance is unbiased; ours is not.
            CodeModulation(before, bits, groups=GROUPS, eps=1e-6, unbiased=True)
            if layout.code_modulation
            else nn.Identity()
            for before in coarsest_first[:-1]
        )
        self.levels = nn.ModuleList(
            _level(before, width, count, layout)
            for (before, width), count in zip(pairwise(coarsest_first), reversed(blocks), strict=True)
        )
        self.ups = nn.ModuleList(_doubling(width, layout) for width in coarsest_first[1:-1])
        self.norm, self.out = group_norm(widths[0], GROUPS), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.middle(self.stem(self.projection(vectors)))
        for index, level in enumerate(self.levels):
            modulation = self.modulations[index]
            x = modulation(x, vectors) if isinstance(modulation, CodeModulation) else x
            x = level(x)
            # Vectors looked up from codes lie channels-last, and so does what is made of them. Unfolding ends that in
            # the published code; the CPU's GroupNorm rounds otherwise there, by 2e-3 behind an all but flat channel.
            x = self.ups[index](x).contiguous() if index < len(self.ups) else x
        return self.out(silu(self.norm(x)))


def _level(before: int, width: int, count: int, layout: Layout) -> nn.Sequential:
    return nn.Sequential(
        *[
            ResidualBlock(before if block == 0 else width, width, groups=GROUPS, bias=layout.convolution_bias)
            for block in range(count)
        ]
    )


def _middle(width: int, count: int, layout: Layout) -> nn.Sequential:
    if not layout.middle_attention:
        return _level(width, width, count, layout)
    first, last = _level(width, width, 2, layout)
    return nn.Sequential(first, GridAttention(width, groups=GROUPS), last)


def _halving(width: int, layout: Layout) -> nn.Sequential:
    padding = (0, 1, 0, 1) if layout.padded_right else (1, 1, 1, 1)
    return nn.Sequential(nn.ZeroPad2d(padding), nn.Conv2d(width, width, 3, stride=2))


def _doubling(width: int, layout: Layout) -> nn.Sequential:
    if layout.nearest:
        return nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))

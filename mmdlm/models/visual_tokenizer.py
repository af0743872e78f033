"""The visual tokenizer: convolutional encoder and decoder around a lookup-free quantizer (MAGVIT-v2, arXiv 2310.05737).

A picture [3, H, W] becomes a grid of codes [H/f, W/f] and back. f is `stem_patch` (a space-to-depth stem, its mirror a
pixel shuffle: cheap on small pictures) times two for every level after the first (strided convolution down, pixel
shuffle up, as in the paper). The published tokenizers are the same model with another `layout` (`mmdlm.models.levels`).

Shape letters: B pictures, d code channels (bits), h = H/f, w = W/f.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.models.convolutional import CellBlock, CodeModulation, ResidualBlock, group_norm
from mmdlm.models.levels import LAYOUTS, Layout, LevelDecoder, LevelEncoder
from mmdlm.models.lfq import FiniteScalarQuantizer, LookupFreeQuantizer, Quantized, split_codes

# Bits of a codebook -> FSQ's levels for about as many codes: for 8, 10, 12, 14 and 16 those of arXiv 2309.15505, table
# 1, for the others in its manner, five to eight levels each.
FSQ_LEVELS = {
    6: (8, 8), 7: (5, 5, 5), 8: (8, 6, 5), 9: (8, 8, 8), 10: (8, 5, 5, 5), 11: (8, 8, 6, 5), 12: (7, 5, 5, 5, 5),
    13: (8, 8, 5, 5, 5), 14: (8, 8, 8, 6, 5), 15: (8, 8, 8, 8, 8), 16: (8, 8, 8, 5, 5, 5), 17: (8, 8, 8, 8, 6, 5),
    18: (8, 8, 8, 8, 8, 8),
}  # fmt: skip


class Reconstruction(NamedTuple):
    """A training pass: `pixels` [B, 3, H, W] (not clamped: the loss keeps its gradient) and the quantizer's output."""

    pixels: Tensor
    quantized: Quantized


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> code channels [B, d, H/f, W/f], unbounded.

    With `by_cell` a code depends on its own f x f pixels and on nothing else.
    """

    def __init__(self, widths: list[int], blocks: int, stem_patch: int, bits: int, by_cell: bool):
        super().__init__()
        self.unshuffle = nn.PixelUnshuffle(stem_patch)
        wide = stem_patch == 1 and not by_cell
        self.stem = nn.Conv2d(3 * stem_patch**2, widths[0], 3 if wide else 1, padding=int(wide))
        block_type: type[nn.Module] = CellBlock if by_cell else ResidualBlock
        levels: list[nn.Module] = []
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            if level:
                kernel, padding = (2, 0) if by_cell else (3, 1)
                levels.append(nn.Conv2d(before, before, kernel, stride=2, padding=padding))
            levels += [block_type(before if block == 0 else width, width) for block in range(blocks)]
        self.levels = nn.Sequential(*levels)
        self.norm = nn.Identity() if by_cell else group_norm(widths[-1])
        self.out = nn.Conv2d(widths[-1], bits, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.out(F.silu(self.norm(self.levels(self.stem(self.unshuffle(pixels))))))


class Decoder(nn.Module):
    """Code vectors [B, d, h, w] -> pixels [B, 3, h*f, w*f], not clamped. The last layer's weight is `out.weight`."""

    def __init__(self, widths: list[int], blocks: int, stem_patch: int, bits: int, modulated: bool):
        super().__init__()
        self.stem = nn.Conv2d(bits, widths[-1], 3, padding=1)
        self.levels, self.ups, self.modulations = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(widths))):
            width = widths[level]
            self.modulations.append(CodeModulation(width, bits) if modulated else nn.Identity())
            self.levels.append(nn.Sequential(*[ResidualBlock(width, width) for _ in range(blocks)]))
            if level:
                wider = nn.Conv2d(width, 4 * widths[level - 1], 3, padding=1)
                self.ups.append(nn.Sequential(wider, nn.PixelShuffle(2)))
        self.norm, self.out = group_norm(widths[0]), nn.Conv2d(widths[0], 3 * stem_patch**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(stem_patch)

    def forward(self, vectors: Tensor) -> Tensor:
        x = self.stem(vectors)
        for index, level in enumerate(self.levels):
            modulation = self.modulations[index]
            x = modulation(x, vectors) if isinstance(modulation, CodeModulation) else x
            x = level(x)
            x = self.ups[index](x) if index < len(self.ups) else x
        return self.shuffle(self.out(F.silu(self.norm(x))))


class LFQTokenizer(ModelMixin, ConfigMixin):
    """Pictures <-> codes. `save_pretrained` / `from_pretrained` are diffusers'.

    Args:
        sample_size: side of the pictures it was trained on, in pixels (it takes any multiple of `downsample`).
        codebook_bits: d; 2^d codes (6 to 18).
        encoder_widths / decoder_widths: channels per level, finest first; both of the same length.
        encoder_blocks / decoder_blocks: residual blocks per level; one number for all, or (published layouts only) one
            for each level, finest first.
        layout: "patched" (ours), or a published one, "magvitv2" or "open_magvit2": see `mmdlm.models.levels`. Those
            have no patches, no cell encoder, and modulation by the codes as their layout says.
        stem_width: channels before the first level of a published layout; None for those of the first level.
        code_factors: bits of the factors that a large code is written in, such as (6, 12); see `split_codes`.
            FSQ has none.
        stem_patch: side of the space-to-depth patches, a power of two.
        cell_encoder: every code depends on its own f x f pixels alone, so that a thing keeps its codes wherever it
            stands and whatever is behind it. A convolutional encoder looks around, and its GroupNorm looks at the whole
            picture: it rebuilds better, and its codes are harder to predict.
        busy_entropy: the entropy terms count only cells with something in them. Where most of a picture is a flat
            background, evenness over all cells cannot be had, and asking for it leaves most codes unused.
        code_modulation: MAGVIT-v2's adaptive GroupNorm in the decoder.
        quantizer: "lfq", or "fsq" (vector-quantize-pytorch's finite scalar quantisation) with `fsq_levels`; None for
            those that its paper gives for about 2^codebook_bits codes (FSQ_LEVELS).
        entropy_temperature, entropy_group_bits, bit_order: see `mmdlm.models.lfq`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        codebook_bits: int = 10,
        encoder_widths: tuple[int, ...] = (64, 128),
        decoder_widths: tuple[int, ...] = (64, 128),
        encoder_blocks: int | tuple[int, ...] = 2,
        decoder_blocks: int | tuple[int, ...] = 2,
        stem_patch: int = 2,
        cell_encoder: bool = False,
        busy_entropy: bool = False,
        code_modulation: bool = False,
        quantizer: str = "lfq",
        fsq_levels: tuple[int, ...] | None = None,
        entropy_temperature: float = 0.01,
        entropy_group_bits: int | None = None,
        bit_order: str = "big",
        layout: str = "patched",
        stem_width: int | None = None,
        code_factors: tuple[int, ...] | None = None,
    ):
        super().__init__()
        if len(encoder_widths) != len(decoder_widths):
            raise ValueError(
                f"encoder_widths has {len(encoder_widths)} levels and decoder_widths {len(decoder_widths)}, "
                "expected as many"
            )
        self.quantize: LookupFreeQuantizer | FiniteScalarQuantizer
        if quantizer == "lfq":
            self.quantize = LookupFreeQuantizer(
                codebook_bits, temperature=entropy_temperature, group_bits=entropy_group_bits, order=bit_order
            )
        elif quantizer == "fsq" and (fsq_levels or codebook_bits in FSQ_LEVELS):
            self.quantize = FiniteScalarQuantizer(list(fsq_levels or FSQ_LEVELS[codebook_bits]))
        else:
            raise ValueError(
                f"quantizer is {quantizer!r} with fsq_levels {fsq_levels} and codebook_bits {codebook_bits}, expected "
                f"'lfq', or 'fsq' with levels or {min(FSQ_LEVELS)} to {max(FSQ_LEVELS)} bits"
            )
        bits = self.quantize.bits
        if code_factors is not None and quantizer == "lfq" and sum(code_factors) != bits:
            raise ValueError(f"code_factors {tuple(code_factors)} have {sum(code_factors)} bits, expected {bits}")
        self.encoder: Encoder | LevelEncoder
        self.decoder: Decoder | LevelDecoder
        if layout == "patched":
            if not (isinstance(encoder_blocks, int) and isinstance(decoder_blocks, int) and stem_width is None):
                raise ValueError(
                    f"encoder_blocks is {encoder_blocks}, decoder_blocks {decoder_blocks}, stem_width {stem_width}, "
                    "expected one number of blocks for all levels and no stem_width for the patched layout"
                )
            self.encoder = Encoder(list(encoder_widths), encoder_blocks, stem_patch, bits, cell_encoder)
            self.decoder = Decoder(list(decoder_widths), decoder_blocks, stem_patch, bits, code_modulation)
        else:
            shape, levels = _published_layout(layout, stem_patch, cell_encoder, code_modulation), len(encoder_widths)
            first = stem_width or encoder_widths[0]
            self.encoder = LevelEncoder(encoder_widths, _per_level(encoder_blocks, levels), first, bits, shape)
            self.decoder = LevelDecoder(decoder_widths, _per_level(decoder_blocks, levels), bits, shape)

    @property
    def downsample(self) -> int:
        """f: pixels per code along one side."""
        return int(self.config["stem_patch"] * 2 ** (len(self.config["encoder_widths"]) - 1))

    @property
    def codebook_size(self) -> int:
        return self.quantize.codebook_size

    def forward(self, pixels: Tensor) -> Reconstruction:
        """One training pass over pixels [B, 3, H, W] in [-1, 1]."""
        counted = busy_cells(pixels, self.downsample) if self.config["busy_entropy"] else None
        quantized = self.quantize(self._encode(pixels), counted)
        return Reconstruction(self.decoder(quantized.vectors), quantized)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> codes int64 [B, H/f, W/f]; ValueError where f does not divide H and W."""
        return self.quantize(self._encode(pixels)).codes

    @torch.no_grad()
    def decode(self, codes: Tensor, *, clamp: bool = True) -> Tensor:
        """codes int64 [B, h, w] -> pixels [B, 3, h*f, w*f] clamped to [-1, 1]; ValueError for a code out of range.

        clamp=False leaves what the last convolution gives, as the published decoders do.
        """
        pixels = self.decoder(self.quantize.vectors(codes).to(self.dtype))
        return pixels.clamp(-1, 1) if clamp else pixels

    def factors(self, codes: Tensor) -> tuple[Tensor, ...]:
        """codes int64 [...] -> one int64 [...] per factor of `code_factors`; ValueError where there are none."""
        if self.config["code_factors"] is None or self.config["quantizer"] != "lfq":
            raise ValueError("this tokenizer has no code_factors: give them in its config, such as (6, 12) for 18 bits")
        return split_codes(codes, self.config["code_factors"], self.config["bit_order"])

    def _encode(self, pixels: Tensor) -> Tensor:
        check_size(pixels, self.downsample)
        return self.encoder(pixels)


def check_size(pixels: Tensor, side: int) -> None:
    """ValueError when pixels [B, 3, H, W] are not whole cells of side x side."""
    height, width = pixels.shape[-2:]
    if height % side or width % side:
        raise ValueError(f"picture is {width} x {height} pixels, expected multiples of {side}: resize or pad it first")


def busy_cells(pixels: Tensor, side: int, least: float = 0.02) -> Tensor:
    """Which side x side cells of pixels [B, 3, H, W] in [-1, 1] are not of one colour: bool [B, H/side, W/side].

    A cell is busy when one channel's values span at least `least`. A batch without any counts all its cells.
    """
    spread = F.max_pool2d(pixels, side) + F.max_pool2d(-pixels, side)
    busy = spread.amax(1) >= least
    return busy if bool(busy.any()) else torch.ones_like(busy)


def saved_tokenizer(directory: str | Path) -> LFQTokenizer:
    """The tokenizer that was saved in `directory`; InputError where there is none, another one, or a broken one.

    A name that is no directory is never looked up on the Hub, as `from_pretrained` alone would.
    """
    if not (Path(directory) / "config.json").is_file():
        raise InputError(
            f"{directory} holds no visual tokenizer, expected a directory with config.json and safetensors: give "
            "RUN/visual_tokenizer or MODEL/visual_tokenizer."
        )
    try:
        kind = LFQTokenizer.load_config(directory).get("_class_name", "LFQTokenizer")
        if kind != "LFQTokenizer":
            raise InputError(f"{directory} holds a {kind}, expected an LFQTokenizer: give another tokenizer.")
        found, said = LFQTokenizer.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        missing = said["missing_keys"]  # which diffusers starts at random, with a warning
        if missing:
            raise ValueError(f"{len(missing)} weights are missing, {sorted(missing)[0]} for one")
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".:")
        raise InputError(f"The visual tokenizer in {directory} is broken ({why}): copy or train it again.") from error
    return found


def _published_layout(name: str, stem_patch: int, cell_encoder: bool, code_modulation: bool) -> Layout:
    """The layout called `name`; ValueError for an unknown one, and for settings that it has otherwise."""
    if name not in LAYOUTS:
        raise ValueError(f"layout is {name!r}, expected 'patched', {', '.join(map(repr, LAYOUTS))}")
    expected = LAYOUTS[name].code_modulation
    if (stem_patch, cell_encoder, code_modulation) != (1, False, expected):
        raise ValueError(
            f"stem_patch is {stem_patch}, cell_encoder {cell_encoder} and code_modulation {code_modulation}, "
            f"expected 1, False and {expected} for the layout {name}"
        )
    return LAYOUTS[name]


def _per_level(blocks: int | Sequence[int], levels: int) -> list[int]:
    counts = [blocks] * levels if isinstance(blocks, int) else list(blocks)
    if len(counts) != levels:
        raise ValueError(f"blocks are given for {len(counts)} levels, expected {levels} as there are widths")
    return counts

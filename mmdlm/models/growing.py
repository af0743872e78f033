"""Trained models made larger without losing what they know: new parts begin as if they were not there (Net2Net,
arXiv 1511.05641).

A visual tokenizer gets more bits a code and more residual blocks: its new bits say nothing to the decoder yet, its new
blocks add nothing, so it rebuilds pictures as before, to the bit but for rounding. A mask predictor gets the longer
codes: each takes the rows of the code that its first bits are, so all that a shorter code became are as likely as each
other, and as likely together as it was.

d bits before, D after; K = 2^d codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmdlm.models.lfq import bits_to_codes, codes_to_bits
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.vocabulary import Vocabulary

GROWING = ("codebook_bits", "encoder_blocks", "decoder_blocks")  # what of a tokenizer may become more


def first_bits(codes: Tensor, before: int, after: int, order: str = "big") -> Tensor:
    """The codes of `before` bits that codes of `after` bits begin with: int64 [...] -> int64 [...]."""
    return bits_to_codes(codes_to_bits(codes, after, order)[..., :before], order)


@torch.no_grad()
def grow_tokenizer(known: LFQTokenizer, larger: LFQTokenizer) -> None:
    """Writes the weights of `known` into `larger`, a fresh tokenizer of the same shape but for more of GROWING.

    The encoder's rows of the new bits stay as they were drawn; what the decoder reads of those bits is 0, and so is
    what a new block adds. Raises ValueError where `larger` differs otherwise, or has less.
    """
    state, filled = larger.state_dict(), set()
    deeper = [model.config["encoder_blocks"] + 1 for model in (known, larger)]  # with the convolution between levels
    for name, value in known.state_dict().items():
        kind, part, *rest = name.split(".")
        if (kind, part) == ("encoder", "levels"):
            level, place = divmod(int(rest[0]) + 1, deeper[0])
            name = ".".join([kind, part, str(level * deeper[1] + place - 1), *rest[1:]])
        room = state.get(name)
        corner = tuple(slice(0, size) for size in value.shape)
        may_grow = name in ("decoder.stem.weight", "encoder.out.weight", "encoder.out.bias")
        if room is None or room[corner].shape != value.shape or (room.shape != value.shape and not may_grow):
            found = "none" if room is None else tuple(room.shape)
            raise ValueError(f"The larger tokenizer's {name} is {found}, expected at least {tuple(value.shape)}.")
        if name == "decoder.stem.weight":
            room.zero_()
        room[corner] = value
        filled.add(name)
    for name in state.keys() - filled:  # of new blocks: the skip stays, what is added to it is 0
        if name.split(".")[-2] == "conv2":
            state[name].zero_()
    larger.load_state_dict(state)


@torch.no_grad()
def grown_predictor(
    known: MaskPredictor, vocabulary: Vocabulary, *, pieces: Sequence[Sequence[int]], code_bits: int
) -> MaskPredictor:
    """`known` with the ids of `vocabulary`, a new model: what stands for an id begins as what stood for it before.

    pieces: for every text id of `vocabulary` the old ids whose mean its rows begin as, itself or how it was spelled
    before (arXiv 2112.14569). code_bits: of the new codes, whose first bits are the old ones. Raises ValueError for
    fewer bits, for a model whose codes have no bit structure, and for ids without pieces.
    """
    before = known.config.code_bits
    if not before or code_bits < before:
        raise ValueError(f"The model's codes have {before} bits, expected some, and at most the new ones' {code_bits}.")
    if len(pieces) != vocabulary.text_size or not all(pieces) or vocabulary.text_size != vocabulary.image_start:
        raise ValueError(f"There are pieces for {len(pieces)} ids, expected one or more for each of the text's.")
    settings = known.config.to_dict() | {"vocabulary": vocabulary.to_dict(), "code_bits": code_bits}
    larger = MaskPredictor(MaskPredictorConfig(**settings))
    codes = first_bits(torch.arange(vocabulary.image_size), before, code_bits, known.config.bit_order)
    images = known.vocabulary.image_ids(codes)
    state = larger.state_dict()
    for name, value in known.state_dict().items():
        if name in ("trunk.embed_tokens.weight", "head.weight"):
            text = torch.stack([value[list(ids)].mean(0) for ids in pieces])
            state[name] = torch.cat([text, value[images]])
        elif name in ("bits_in", "bits_out"):  # the new bits mean nothing yet
            state[name] = torch.cat([value, value.new_zeros(code_bits - before, value.shape[1])])
        else:
            state[name] = value
    larger.load_state_dict(state)
    return larger

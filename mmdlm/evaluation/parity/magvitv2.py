"""Cases of the `magvitv2` tokenizer (Show-o, MMaDA): features, codes, pixels, arbitrary codes, training losses."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mmdlm.convert import load_visual_tokenizer, magvitv2
from mmdlm.evaluation.parity import Case, Check, close, equal
from mmdlm.evaluation.parity.visual import published_weights, tolerance
from mmdlm.models.visual_tokenizer import LFQTokenizer


def checks(case: Case) -> Iterator[Check]:
    """Everything recorded, squares and other pictures; the reference's lists of codes [B, h*w] are grids here."""
    tokenizer = load_visual_tokenizer(case.directory)
    assert isinstance(tokenizer, LFQTokenizer)
    tensors = case.tensors
    features, pixels = tolerance(case, "encoder_out"), tolerance(case, "pixels")
    with torch.no_grad():
        for prefix in ("", "rect_"):
            if f"{prefix}pixels" not in tensors:
                continue
            recorded = tensors[f"{prefix}encoder_out"]
            yield close(f"{prefix}encoder_out", tokenizer.encoder(tensors[f"{prefix}pixels"]), recorded, **features)
            codes = tokenizer.encode(tensors[f"{prefix}pixels"])
            yield equal(f"{prefix}codes", codes.flatten(1), tensors[f"{prefix}codes"])
            grid = tensors[f"{prefix}codes"].view(-1, *recorded.shape[-2:])
            decoded = tokenizer.decode(grid, clamp=False)
            yield close(f"{prefix}decoded", decoded, tensors[f"{prefix}decoded"], **pixels)
        yield equal("quantized", tokenizer.quantize(tensors["encoder_out"]).vectors, tensors["quantized"])
        if "random_codes" in tensors:
            side = math.isqrt(tensors["random_codes"].shape[1])
            grid = tensors["random_codes"].view(-1, side, side)
            yield equal("random_codebook_entry", tokenizer.quantize.vectors(grid), tensors["random_codebook_entry"])
            decoded = tokenizer.decode(grid, clamp=False)
            yield close("random_decoded", decoded, tensors["random_decoded"], **pixels)
        yield from _losses(case, tokenizer)
    yield published_weights(case, magvitv2.from_mmdlm(tokenizer.state_dict()))


def _losses(case: Case, tokenizer: LFQTokenizer) -> Iterator[Check]:
    """The reference's loss terms from ours: its commitment has a second, weighed copy, its entropies are per bit."""
    found = tokenizer.quantize.train()(case.tensors["encoder_out"])
    tokenizer.eval()
    assert found.entropies is not None
    within = tolerance(case, "losses")
    commitment = magvitv2.COMMITMENT_WEIGHT * found.commitment
    yield close("quantizer_loss", commitment, case.tensors["quantizer_loss"], **within)
    difference = (found.entropies.per_sample - found.entropies.codebook) / tokenizer.quantize.bits
    yield close("entropy_loss", magvitv2.ENTROPY_WEIGHT * difference, case.tensors["entropy_loss"], **within)

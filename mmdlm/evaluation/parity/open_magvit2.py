"""Cases of Open-MAGVIT2's tokenizer: features, codes whole and factorised, pixels, training losses."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmdlm.convert import load_visual_tokenizer, open_magvit2
from mmdlm.convert.visual import read_configuration
from mmdlm.evaluation.parity import Case, Check, close, equal
from mmdlm.evaluation.parity.visual import published_weights, tolerance
from mmdlm.models.visual_tokenizer import LFQTokenizer


def checks(case: Case) -> Iterator[Check]:
    """Everything recorded, squares and other pictures; the reference's flat lists of codes are grids here."""
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
            yield equal(f"{prefix}indices_flat", codes.flatten(), tensors[f"{prefix}indices_flat"])
            grid = tensors[f"{prefix}indices_flat"].view(-1, *recorded.shape[-2:])
            decoded = tokenizer.decode(grid, clamp=False)
            yield close(f"{prefix}decoded", decoded, tensors[f"{prefix}decoded"], **pixels)
        yield equal("quantized", tokenizer.quantize(tensors["encoder_out"]).vectors, tensors["quantized"])
        if "factorized_pre" in tensors:
            codes = tensors["indices_flat"]
            for name, factor in zip(("pre", "post"), tokenizer.factors(codes), strict=True):
                yield equal(f"factorized_{name}", factor, tensors[f"factorized_{name}"])
        if "random_codes" in tensors:
            entry = tensors["random_codebook_entry"]
            grid = tensors["random_codes"].view(-1, *entry.shape[-2:])
            yield equal("random_codebook_entry", tokenizer.quantize.vectors(grid), entry)
            decoded = tokenizer.decode(grid, clamp=False)
            yield close("random_decoded", decoded, tensors["random_decoded"], **pixels)
        yield from _losses(case, tokenizer)
    averaged = open_magvit2.uses_average(read_configuration(case.directory))
    yield published_weights(case, open_magvit2.from_mmdlm(tokenizer.state_dict()), averaged=averaged)


def _losses(case: Case, tokenizer: LFQTokenizer) -> Iterator[Check]:
    """The terms of LFQ's loss in training, weighed as the configuration says."""
    found = tokenizer.quantize.train()(case.tensors["encoder_out"])
    tokenizer.eval()
    assert found.entropies is not None
    within, weights = tolerance(case, "losses"), open_magvit2.arguments(read_configuration(case.directory))
    sample, batch = weights.get("sample_minimization_weight", 1.0), weights.get("batch_maximization_weight", 1.0)
    total = sample * found.entropies.per_sample - batch * found.entropies.codebook
    for name, value in (
        ("train_per_sample_entropy", found.entropies.per_sample),
        ("train_codebook_entropy", found.entropies.codebook),
        ("train_entropy_aux_loss", total),
        ("train_commitment", found.commitment),
    ):
        yield close(name, value, case.tensors[name], **within)

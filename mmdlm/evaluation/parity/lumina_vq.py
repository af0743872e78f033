"""Cases of the VQ tokenizer that Lumina-DiMOO uses: latents, codes, pixels. Recorded pixels are in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmdlm.convert import load_visual_tokenizer, lumina_vq
from mmdlm.evaluation.parity import Case, Check, close, equal
from mmdlm.evaluation.parity.visual import published_weights, tolerance
from mmdlm.models.vq_tokenizer import VQTokenizer


def checks(case: Case) -> Iterator[Check]:
    """Everything recorded; pixels are taken to our [-1, 1] and back."""
    tokenizer = load_visual_tokenizer(case.directory)
    assert isinstance(tokenizer, VQTokenizer)
    tensors, pixels = case.tensors, tolerance(case, "pixels")
    with torch.no_grad():
        for prefix in ("", "rect_"):
            if f"{prefix}pixels" not in tensors:
                continue
            ours, codes = tensors[f"{prefix}pixels"] * 2 - 1, tensors[f"{prefix}codes"]
            latents = tensors[f"{prefix}latents"]
            yield close(f"{prefix}latents", tokenizer.latents(ours), latents, **tolerance(case, "latents"))
            yield equal(f"{prefix}codes", tokenizer.encode(ours), codes)
            decoded = (tokenizer.decode(codes, clamp=False) + 1) / 2
            yield close(f"{prefix}decoded", decoded, tensors[f"{prefix}decoded"], **pixels)
            if f"{prefix}decoded_clipped" in tensors:
                clipped = (tokenizer.decode(codes) + 1) / 2
                yield close(f"{prefix}decoded_clipped", clipped, tensors[f"{prefix}decoded_clipped"], **pixels)
    yield published_weights(case, lumina_vq.from_mmdlm(tokenizer.state_dict()))

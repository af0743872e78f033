"""Attention of packed rows, one document after the other: no place is multiplied with one that it does not see.

With a dense mask (`mmdlm.attention.documents`) a row of ten documents costs ten times the attention it needs. The slow
twin is that mask under "sdpa". B rows, H heads, L positions, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mmdlm.models.mask_predictor import MaskPredictor

BY_DOCUMENT = "documents"  # the name under which transformers knows it


def attend_by_document(model: MaskPredictor) -> None:
    """Lets `model` take int document ids [B, 1, 1, L] as its attention mask, equal ids beside each other.

    Any other mask goes on as under "sdpa". Raises ValueError for a model that folds pictures, whose places it counts
    otherwise.
    """
    if model.config.image_fold > 1:
        raise ValueError("attention by document knows no folded places: use mmdlm.attention.documents")
    AttentionInterface.register(BY_DOCUMENT, documents_attention)
    model.trunk.set_attn_implementation(BY_DOCUMENT)


def documents_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """query, key, value [B, H, L, D], attention_mask int [B, 1, 1, L] -> ([B, L, H, D], None), transformers' form."""
    kwargs["is_causal"] = False
    if attention_mask is None or attention_mask.dtype == torch.bool or attention_mask.is_floating_point():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rows = []
    for row, documents in enumerate(attention_mask[:, 0, 0]):
        lengths = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
        parts = zip(*(part[row : row + 1].split(lengths, dim=2) for part in (query, key, value)), strict=True)
        seen = [sdpa_attention_forward(module, *part, None, **kwargs)[0] for part in parts]
        rows.append(torch.cat(seen, dim=1))
    return torch.cat(rows), None

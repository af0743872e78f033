"""A mask, True where a place may be seen, as each of transformers' attention implementations takes it.

Shape letters: B rows, Q queries, M keys, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def mask_of_kind(seen: Tensor, implementation: str | None, hidden: Tensor) -> Any:
    """A mask bool or float [B, 1, 1 or Q, M] as the attention implementation takes it; hidden [B, Q, D] of the queries.

    Raises ValueError where it takes none of this shape or type.
    """
    batch, queries = hidden.shape[:2]
    length = seen.shape[3]
    if seen.is_floating_point():
        if implementation in ("sdpa", "eager"):
            return seen.to(hidden.dtype).expand(batch, 1, queries, length)
        raise ValueError(
            f"{implementation} takes no float mask, which is added to the scores: use attn_implementation='sdpa'"
        )
    if implementation in ("sdpa", "documents"):  # the latter: `mmdlm.models.packed_attention`
        return seen
    if implementation == "eager":
        return torch.zeros_like(seen, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows = seen.expand(batch, 1, queries, length)
        return create_block_mask(
            lambda b, h, q, k: rows[b, 0, q, k], batch, None, queries, length, device=str(seen.device)
        )
    if seen.shape[2] == 1 and queries == length:  # flash attention drops padding, and knows no other mask
        return seen[:, 0, 0].expand(batch, length)
    raise ValueError(
        f"{implementation} takes padding only, got a mask {tuple(seen.shape)}: use attn_implementation='sdpa'"
    )

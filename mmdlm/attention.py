"""Who sees whom: boolean masks, True = may be seen, [B, 1, queries, keys] as scaled_dot_product_attention takes them.

None means that everybody sees everybody, and is worth returning: a mask tensor keeps attention off its fastest kernels.
B rows, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full(valid: Tensor) -> Tensor | None:
    """Everybody sees every valid place. valid bool [B, L] -> None where all are valid, else bool [B, 1, 1, L]."""
    if valid.dim() != 2 or valid.dtype != torch.bool:
        raise ValueError(f"full got valid {valid.dtype} {tuple(valid.shape)}, expected bool [B, L].")
    return None if bool(valid.all()) else valid[:, None, None, :]


def documents(document_ids: Tensor) -> Tensor:
    """Places see their own document only: several short rows packed into one. int [B, L] -> bool [B, 1, L, L].

    Give padding an id of its own, such as -1: it then sees itself, and no softmax runs over nothing.
    """
    _check(document_ids, "document_ids")
    return (document_ids[:, :, None] == document_ids[:, None, :]).unsqueeze(1)


def block_causal(block_ids: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """Places see their own block and all earlier ones. int [B, L], block_ids rising -> bool [B, 1, L, L].

    Blocks of block diffusion (BD3-LM, arXiv:2503.09573): each is denoised with what lies before it known.
    With document_ids int [B, L] also only their own document, whose blocks may start again from 0.
    """
    _check(block_ids, "block_ids")
    seen = (block_ids[:, :, None] >= block_ids[:, None, :]).unsqueeze(1)
    return seen if document_ids is None else seen & documents(document_ids)


def noisy_clean(block_ids: Tensor, *, document_ids: Tensor | None = None) -> Tensor:
    """The mask of block training on [x_t, x0], noisy row before clean row (BD3-LM, arXiv:2503.09573).

    A noisy place sees its own noisy block and the clean blocks before it, so one pass trains every block as it will be
    sampled; a clean place sees clean blocks up to its own. int [B, L] -> bool [B, 1, 2L, 2L]; document_ids int [B, L]
    as in `block_causal`.
    """
    _check(block_ids, "block_ids")
    query, key = block_ids[:, :, None], block_ids[:, None, :]
    to_noisy = torch.cat([query == key, torch.zeros_like(query == key)], dim=1)
    to_clean = torch.cat([query > key, query >= key], dim=1)
    seen = torch.cat([to_noisy, to_clean], dim=2).unsqueeze(1)
    return seen if document_ids is None else seen & documents(torch.cat([document_ids, document_ids], dim=1))


def _check(ids: Tensor, name: str) -> None:
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"{name} is {ids.dtype} {tuple(ids.shape)}, expected integers [B, L].")

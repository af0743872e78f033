"""Asking about a written token without showing it: a mask in its place that nobody else sees.

WINO (arXiv:2507.18578, 3.2) verifies drafted tokens so: for each a mask of the same position is appended to the row; it
sees everything but the token it stands for, and nothing sees it. One forward then drafts the masked places and verifies
the written ones. In a trunk of several layers the other places have seen the token already, so what the shadow says is
near to, but not quite, what the model would say of a row where the token is masked; in one layer it is exactly that.

Shape letters: B rows, L positions, W asked places, S shadows of the row that has most, V columns of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdlm.sampling.denoise import Predictor


def shadowed(
    model: nn.Module,
    *,
    mask_id: int,
    editable: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
) -> Predictor:
    """`full` with a shadow for every asked place that is editable and written; for `revoke` and `with_edits`.

    editable: bool [B, L], as denoise gets it: what is given needs no shadow. attention_mask: None or bool [B, L] or
    [B, 1, 1, L] (True = may be seen); the others as for `full`. ValueError for another mask, for image places of a
    model that folds them, and for a model with prediction_offset: their places have no token of their own in the trunk.
    """
    config = model.config
    if getattr(config, "prediction_offset", 0):
        raise ValueError("a model with prediction_offset predicts from the place before: it cannot be shadowed")

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        rows, length = ids.shape
        # asked and written: its token is hidden from its shadow; what fills a row up to the widest is not editable
        hidden = (ids.gather(1, where) != mask_id) & editable.gather(1, where)
        order = (~hidden).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(hidden.sum(dim=1).max())]
        place, real = where.gather(1, order), hidden.gather(1, order)  # [B, S]
        folds = getattr(config, "image_fold", 1) > 1
        if folds and grid is not None and bool((grid[..., 0].gather(1, place)[real] >= 0).any()):
            raise ValueError("this model folds image places: only text places can be shadowed")
        count = place.shape[1]
        positions = torch.arange(length, device=ids.device).expand(rows, length)
        positions = positions if position_ids is None else position_ids
        with_masks = torch.cat([ids, torch.full_like(place, mask_id)], dim=1)
        seen = _who_sees_whom(ids, attention_mask, place, real)
        wider = None
        if grid is not None:
            beside = grid.gather(1, place.unsqueeze(-1).expand(rows, count, 2))
            wider = torch.cat([grid, beside.fill_(-1) if folds else beside], dim=1)
        # a written place is asked at its shadow instead
        rank = (hidden.long().cumsum(dim=1) - 1).clamp(min=0)
        asked = torch.where(hidden, length + rank, where)
        with torch.no_grad():
            return model(
                with_masks,
                attention_mask=seen if count or attention_mask is not None else None,
                position_ids=torch.cat([positions, positions.gather(1, place)], dim=1),
                grid=wider,
                where=asked,
                columns=columns,
            ).logits

    return predict


def _who_sees_whom(ids: Tensor, attention_mask: Tensor | None, place: Tensor, real: Tensor) -> Tensor:
    """bool [B, 1, L + S, L + S]: tokens see tokens; a shadow sees itself and all tokens but the one of its place."""
    (rows, length), count = ids.shape, place.shape[1]
    seen = torch.ones_like(ids, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool or attention_mask.numel() != ids.numel():
            raise ValueError(f"attention_mask is {attention_mask.dtype} {tuple(attention_mask.shape)} for ids "
                             f"{tuple(ids.shape)}, expected bool [B, L] or [B, 1, 1, L]")
        seen = attention_mask.view(rows, length)
    table = torch.zeros(rows, length + count, length + count, dtype=torch.bool, device=ids.device)
    table[:, :, :length] = seen.unsqueeze(1)
    own = torch.arange(length, device=ids.device) == place.unsqueeze(-1)  # [B, S, L]
    table[:, length:, :length] &= ~(own & real.unsqueeze(-1))
    at = torch.arange(length, length + count, device=ids.device)
    table[:, at, at] = True
    return table.unsqueeze(1)

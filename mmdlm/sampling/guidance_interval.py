"""Guidance on part of the steps: where it helps, and at no cost where it does not (arXiv:2404.07724).

Shape letters: B rows, L positions, W asked places, V columns of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Predictor


def within(
    guided: Predictor, plain: Predictor, interval: tuple[float, float], *, editable: Tensor, mask_id: int
) -> Predictor:
    """`guided` for rows whose share of masked places among `editable` bool [B, L] lies in (low, high], else `plain`.

    The share is the noise level t: 1 at the first pass, towards 0 at the last; (0, 1) is guidance throughout, which is
    `guided` itself. Only what some row needs is computed: outside the interval a pass costs one branch. Raises
    InputError unless 0 <= low < high <= 1.
    """
    low, high = check_interval(interval)
    if (low, high) == (0.0, 1.0):
        return guided
    places = editable.sum(dim=1).clamp(min=1)

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        share = (editable & (ids == mask_id)).sum(dim=1) / places
        inside = (share > low) & (share <= high)
        # a row that is done has no share and no say
        if not bool(inside.any()):
            return plain(ids, where)
        logits = guided(ids, where)
        if bool((inside | (share == 0)).all()):
            return logits
        return torch.where(inside.view(-1, 1, 1), logits, plain(ids, where).to(logits))

    return predict


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """(low, high) as floats. InputError unless 0 <= low < high <= 1."""
    try:
        low, high = interval
        if 0 <= low < high <= 1:
            return float(low), float(high)
    except (TypeError, ValueError):
        pass  # no two numbers
    raise InputError(f"guidance_interval is {interval!r}, expected LOW,HIGH with 0 <= LOW < HIGH <= 1, the shares of "
                     "masked tokens between which guidance is used: 0,1 is all steps.")

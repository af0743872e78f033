"""How much is masked at time t, and how much a masked place then weighs in the loss.

Time t is in (0, 1]; 1 is all masked. alpha(t) is the share kept, alpha(1) = 0 and alpha(t) -> 1 for t -> 0. The weight

    weight(t) = -alpha'(t) / (1 - alpha(t))                  (MDLM, arXiv:2406.07524, its continuous-time bound)

makes the mean loss over uniform t an upper bound of -log p(x0), the same bound for every schedule. Each weight below is
a closed form without a 0/0 near t = 0 or t = 1. With weight 1 instead (MaskGIT, arXiv:2202.04200) the loss is no bound
but spares training the few, heavy samples of small t; pictures are usually trained so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError


class Schedule(NamedTuple):
    """alpha and weight take t of any shape and float dtype, values in (0, 1], and return the same shape and dtype."""

    name: str
    alpha: Callable[[Tensor], Tensor]  # share kept, in [0, 1)
    weight: Callable[[Tensor], Tensor]  # of a masked place in the loss, >= 0


def polynomial(exponent: float, name: str | None = None) -> Schedule:
    """alpha = (1 - t)^p: exponent p = 1 is linear, 2 and 3 are MaskGIT's square and cubic (masked share 1 - (1 - t)^p).

    Raises ValueError for p < 1, whose weight is infinite at t = 1.
    """
    if not exponent >= 1:
        raise ValueError(f"The exponent of a polynomial schedule is {exponent}, expected at least 1.")

    def alpha(t: Tensor) -> Tensor:
        return (1 - t) ** exponent

    def weight(t: Tensor) -> Tensor:
        # 1 - (1 - t)^p without cancellation; at t = 1 log1p is -inf and the masked share exactly 1.
        masked_share = -torch.expm1(exponent * torch.log1p(-t))
        return exponent * (1 - t) ** (exponent - 1) / masked_share

    return Schedule(name or f"polynomial_{exponent:g}", alpha, weight)


def _linear_alpha(t: Tensor) -> Tensor:
    return 1 - t


def _linear_weight(t: Tensor) -> Tensor:
    return 1 / t


def _cosine_alpha(t: Tensor) -> Tensor:
    # 1 - cos(pi/2 (1 - t)) = 2 sin^2(pi/4 (1 - t)), which is exactly 0 at t = 1.
    return 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2


def _cosine_weight(t: Tensor) -> Tensor:
    # Masked share m = sin(pi t / 2), weight m' / m = (pi/2) / tan(pi t / 2). In float32 tan(pi/2) is negative, so the
    # upper half is written from t = 1, where the weight is exactly 0.
    low = 1 / torch.tan(math.pi / 2 * t)
    high = torch.tan(math.pi / 2 * (1 - t))
    return math.pi / 2 * torch.where(t < 0.5, low, high)


def unweighted(schedule: Schedule) -> Schedule:
    """The same masking with weight 1 everywhere: MaskGIT's loss (arXiv:2202.04200), no likelihood bound."""
    return Schedule(f"unweighted_{schedule.name}", schedule.alpha, torch.ones_like)


def by_modality(modality: Tensor, *, text: Schedule, image: Schedule) -> Schedule:
    """One schedule per place: `text` where modality [B, L] is 0, `image` where it is 1 (MMaDA, arXiv:2505.15809).

    Its alpha and weight take t [B, 1] or [B, L] and return [B, L].
    """
    is_image = modality == 1

    def alpha(t: Tensor) -> Tensor:
        return torch.where(is_image, image.alpha(t), text.alpha(t))

    def weight(t: Tensor) -> Tensor:
        return torch.where(is_image, image.weight(t), text.weight(t))

    return Schedule(f"text_{text.name}_image_{image.name}", alpha, weight)


# LLaDA (arXiv:2502.09992): masked share t, weight 1/t.
linear = Schedule("linear", _linear_alpha, _linear_weight)
# MaskGIT's masked share cos(pi/2 (1 - t)), with the weight of the bound.
cosine = Schedule("cosine", _cosine_alpha, _cosine_weight)
# What MaskGIT, Show-o and MMaDA train pictures with: cosine, weight 1.
maskgit = unweighted(cosine)._replace(name="maskgit")
square = polynomial(2, "square")
cubic = polynomial(3, "cubic")

_NAMED = {schedule.name: schedule for schedule in (linear, cosine, maskgit, square, cubic)}
_NAMED |= {schedule.name: schedule for schedule in map(unweighted, (linear, square, cubic))}


def schedule_by_name(name: str) -> Schedule:
    """The schedule a YAML names: linear, cosine, square, cubic; maskgit (cosine, weight 1), unweighted_linear, ...

    Raises InputError for any other name, with the nearest one.
    """
    if name not in _NAMED:
        near = get_close_matches(str(name), _NAMED, n=1, cutoff=0.0)
        raise InputError(
            f"There is no schedule {name!r}, expected one of {', '.join(_NAMED)}: did you mean {near[0]!r}?"
        )
    return _NAMED[name]


def sample_t(
    batch: int,
    *,
    generator: torch.Generator | None = None,
    low_discrepancy: bool = True,
    minimum: float = 0.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """One uniform time per row: float32 [B, 1] in [minimum, 1], never 0.

    With `low_discrepancy` each of B equal strata is hit once (MDLM, arXiv:2406.07524: a loss of lower variance),
    in random order, so that each row alone is uniform whatever the order of tasks in the batch. `minimum`
    leaves out the smallest times, whose weight 1/t is large. For one time per block: sample_t(B * N).view(B, N).
    """
    if batch < 0 or not 0 <= minimum < 1:
        raise ValueError(f"sample_t got batch {batch} and minimum {minimum}, expected at least 0 and [0, 1).")
    home = generator.device if generator is not None else device
    t = 1 - torch.rand(batch, generator=generator, device=home)  # rand is in [0, 1), a time in (0, 1]
    if low_discrepancy and batch:
        t = (torch.randperm(batch, generator=generator, device=home) + t) / batch
    # Never through 1 - t: near 0 that would round the smallest times to 0, whose weight is infinite.
    return (minimum + (1 - minimum) * t).unsqueeze(1).to(device or home)

"""What training hides: x0 and a time t -> x_t. Masked (absorbing) diffusion, MDLM arXiv:2406.07524, LLaDA 2502.09992.

Any place may be corruptible, so one batch mixes text-to-image, captioning, questions, plain text and joint rows. x_t is
x0, bit for bit, wherever a place is not corruptible. B rows, L positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmdlm.schedules import Schedule


class Corrupted(NamedTuple):
    """What the model sees and what it is asked."""

    x_t: Tensor  # int64 [B, L]
    supervised: Tensor  # bool [B, L]: in the loss; here: masked
    weight: Tensor  # float [B, L]: of each place in the loss, 0 where not supervised


def mask(
    x0: Tensor,
    t: Tensor,
    *,
    corruptible: Tensor,
    mask_id: int,
    schedule: Schedule,
    generator: torch.Generator | None = None,
    at_least_one: bool = False,
    exact: bool | Literal["released"] = False,
) -> Corrupted:
    """Replace corruptible places by the mask, each with probability 1 - alpha(t).

    LLaDA's and MMaDA's text: the linear schedule at t = (1 - eps) u + eps, u uniform and eps 1e-3, so that no weight
    1/t is above 1000: `sample_t(..., minimum=1e-3)`.

    x0 int [B, L]; t float [B, 1] (one per row) or [B, L] (one per block or modality), values in (0, 1]; corruptible
    bool [B, L].

    exact: mask round(n (1 - alpha(t))) of a row's n corruptible places, chosen uniformly (MaskGIT arXiv:2202.04200,
        Show-o arXiv:2408.12528). Needs one masked share per row. "released": the places that Show-o's and MMaDA's
        programs choose with the same noise, where argsort(noise), taken for a rank, is below the count; as uniform, and
        only for rows that are corruptible throughout.
    at_least_one: a row that has corruptible places but none masked gets one, uniformly chosen where t is the same for
        the row. It then counts with the weight of its t, so the mean loss is slightly above the bound: short answers
        at small t are seen more often than the schedule says. Off, such rows are empty and the bound is exact.

    Raises ValueError for wrong shapes or dtypes, for t outside (0, 1], and when x0 holds the mask at a corruptible
    place, which would make the mask a target.
    """
    _check(x0, t, corruptible, mask_id)
    share = 1 - schedule.alpha(t)  # [B, 1] or [B, L]
    home = generator.device if generator is not None else x0.device
    noise = torch.rand(x0.shape, generator=generator, device=home).to(x0.device)
    if exact:
        if share.shape[1] != 1:
            raise ValueError("exact masking got one masked share per place, expected one per row: t [B, 1].")
        count = (corruptible.sum(1, keepdim=True) * share).round().long().clamp(min=int(at_least_one))
        # Rank of each place among its row's corruptible places in random order; the others rank last.
        order = noise.masked_fill(~corruptible, 2.0).argsort(dim=1, stable=True)
        if exact == "released" and not bool(corruptible.all()):
            raise ValueError("exact='released' got places that are not corruptible, expected none: use exact=True.")
        masked = ((order if exact == "released" else order.argsort(dim=1, stable=True)) < count) & corruptible
    else:
        masked = (noise < share) & corruptible
    if at_least_one:
        # Where nothing is masked all noise is above the share, and which place has the least is uniform.
        first = noise.masked_fill(~corruptible, 2.0).argsort(dim=1, stable=True)[:, :1]
        alone = torch.zeros_like(masked).scatter(1, first, True) & corruptible
        masked = torch.where(masked.any(1, keepdim=True), masked, alone)
    weight = schedule.weight(t).expand(x0.shape).masked_fill(~masked, 0.0)
    return Corrupted(x0.masked_fill(masked, mask_id), masked, weight)


def complement(
    x0: Tensor, first: Corrupted, *, corruptible: Tensor, mask_id: int, weight: Tensor | None = None
) -> Corrupted:
    """Mask exactly the corruptible places that `first` left, so that the pair supervises every place once.

    Complementary masks of Fast-dLLM v2 (arXiv:2509.26328). `weight` float [B, 1] or [B, L] is that of the new masks;
    None is 1, as published. For the linear schedule's bound pass 1/(1 - t): 1 - t is the complement's time.
    """
    masked = corruptible & ~first.supervised
    weight = torch.ones_like(first.weight) if weight is None else weight.expand(x0.shape)
    return Corrupted(x0.masked_fill(masked, mask_id), masked, weight.masked_fill(~masked, 0.0))


def _check(x0: Tensor, t: Tensor, corruptible: Tensor, mask_id: int) -> None:
    if x0.dim() != 2 or corruptible.shape != x0.shape or corruptible.dtype != torch.bool:
        raise ValueError(
            f"mask got x0 {tuple(x0.shape)} and corruptible {corruptible.dtype} {tuple(corruptible.shape)}, "
            "expected x0 [B, L] and corruptible bool [B, L]."
        )
    if t.dim() != 2 or t.shape[0] != x0.shape[0] or t.shape[1] not in (1, x0.shape[1]) or not t.is_floating_point():
        raise ValueError(
            f"mask got t {t.dtype} {tuple(t.shape)}, expected floats [B, 1] or [B, L] for x0 {tuple(x0.shape)}."
        )
    if not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError(f"mask got t from {float(t.min())} to {float(t.max())}, expected times in (0, 1].")
    if bool(((x0 == mask_id) & corruptible).any()):
        raise ValueError(f"x0 holds the mask {mask_id} at a corruptible place, which is no target: give clean ids.")

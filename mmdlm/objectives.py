"""What training minimises and what evaluation reports: the weighted cross entropy of masked places.

    loss = sum over supervised places of weight * -log p(x0 | x_t), divided by a normalizer
                                                (MDLM arXiv:2406.07524, LLaDA arXiv:2502.09992)

B rows, L positions, W asked positions, N supervised places, V ids, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdlm.corruption import Corrupted, mask
from mmdlm.errors import InputError
from mmdlm.schedules import linear

Predict = Callable[[Tensor, Tensor], Tensor]  # ids [B, L], where [B, W] -> logits [B, W, V]
Normalizer = Literal["tokens", "rows"] | float | Tensor
_LOGITS_AT_A_TIME = 2**25  # 128 MiB in float32; smaller pieces make the matrix products slower


def supervised_places(supervised: Tensor) -> Tensor:
    """Where to ask the model: bool [B, L] -> int64 [B, W], W the largest number of supervised places of a row.

    Rising in each row; rows with fewer are filled up with places that are not supervised, each at most once, so a loss
    over `where` needs no further mask. W is at least 1.
    """
    width = max(int(supervised.sum(1).max()), 1)
    chosen = (~supervised).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return chosen.sort(dim=1).values


def denoising_loss(
    logits: Tensor,
    x0: Tensor,
    corrupted: Corrupted,
    normalizer: Normalizer = "tokens",
    *,
    where: Tensor | None = None,
    first_id: int = 0,
) -> Tensor:
    """The weighted cross entropy of the supervised places: a scalar, in float32 or better.

    logits: [B, L, V]; or [B, W, V] of the places `where` int [B, W] (no place twice), which then decides what is in the
        loss; or [N, V], one row per supervised place in reading order. Column 0 is the id `first_id`.
    x0: int [B, L], clean.
    normalizer: "tokens" divides the sum by the number of supervised places in the loss (0 of them: loss 0); "rows" by
        B; a number or scalar tensor by itself (gradient accumulation, several processes); a tensor [B] divides each
        row's sum by its own entry, then takes the mean over rows (answer lengths, as LLaDA fine-tunes).

    Raises ValueError for shapes that do not fit and for a target outside the columns.
    """
    targets, supervised, weight = x0, corrupted.supervised, corrupted.weight
    if where is not None:
        targets, supervised, weight = (part.gather(1, where) for part in (targets, supervised, weight))
    rows = supervised.nonzero()[:, 0]
    targets, weight = targets[supervised] - first_id, weight[supervised]
    # Before the cast to float32: only rows that count are copied.
    chosen = logits[supervised] if logits.dim() == 3 and logits.shape[:2] == supervised.shape else logits
    if chosen.shape[:-1] != targets.shape:
        raise ValueError(
            f"denoising_loss got logits {tuple(logits.shape)} for {len(targets)} supervised places of "
            f"{tuple(supervised.shape)}, expected [B, L, V], [B, W, V] with where, or [N, V]."
        )
    _check_targets(targets, chosen.shape[-1], first_id)
    losses = F.cross_entropy(_at_least_float32(chosen), targets, reduction="none")
    losses = losses * weight.to(losses.dtype)
    if isinstance(normalizer, Tensor) and normalizer.dim() == 1:
        if normalizer.shape != x0.shape[:1]:
            raise ValueError(f"The normalizer has {len(normalizer)} entries, expected one per row: {len(x0)}.")
        return (losses / normalizer.to(losses)[rows]).sum() / len(x0)
    if normalizer == "tokens":
        return losses.sum() / max(len(targets), 1)
    if normalizer == "rows":
        return losses.sum() / len(x0)
    if isinstance(normalizer, str):
        raise ValueError(f"The normalizer is {normalizer!r}, expected 'tokens', 'rows', a number or a tensor.")
    return losses.sum() / normalizer


class Bound(NamedTuple):
    """An estimate of the upper bound of -log p(x0), in nats per row."""

    nats: Tensor  # float [B]
    standard_error: Tensor  # float [B], of the estimate; on the safe side, for the counts are stratified


@torch.no_grad()
def likelihood_bound(
    predict: Predict,
    x0: Tensor,
    *,
    corruptible: Tensor,
    mask_id: int,
    samples: int = 128,
    generator: torch.Generator | None = None,
    first_id: int = 0,
) -> Bound:
    """How unlikely the corruptible places of x0 [B, L] are, given the others: at most this many nats, per row.

    The mean over `samples` masks of n/l * sum over masked places of -log p(x0 | x_t), with l of a row's n corruptible
    places masked, l uniform in 1 to n and stratified over the samples (LLaDA arXiv:2502.09992, eq. 6). It has the
    expectation of the bound over time, which is the same for every schedule; but there the square of the weight 1/t
    has no finite mean, here it has. The expectation is -log p(x0) itself for a model whose conditionals are those of
    one distribution. `predict` is called once per sample; logits column 0 is the id `first_id`.

    Raises InputError for fewer than two samples.
    """
    if samples < 2:
        raise InputError(f"The likelihood bound got {samples} samples, expected at least 2 for its standard error.")
    home = generator.device if generator is not None else x0.device
    places = corruptible.sum(1, keepdim=True).clamp(min=1)  # a row without any has nothing masked, and 0 nats
    total = torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
    squares = torch.zeros_like(total)
    for sample in range(samples):
        u = 1 - torch.rand(len(x0), 1, generator=generator, device=home).to(x0.device)
        share = ((sample + u) / samples * places).ceil() / places  # l/n: for the linear schedule also t, and 1/weight
        corrupted = mask(
            x0, share, corruptible=corruptible, mask_id=mask_id, schedule=linear, generator=generator, exact=True
        )
        where = supervised_places(corrupted.supervised)
        logits = predict(corrupted.x_t, where)
        targets, supervised, weight = (part.gather(1, where) for part in (x0, *corrupted[1:]))
        _check_targets(targets[supervised] - first_id, logits.shape[-1], first_id)
        targets = (targets - first_id).masked_fill(~supervised, 0)
        losses = F.cross_entropy(_at_least_float32(logits).flatten(0, 1), targets.flatten(), reduction="none")
        # where, not a product: a filled-up place may have an infinite loss, and 0 * inf is no number
        nats = torch.where(supervised, losses.view_as(weight).double() * weight, 0.0).sum(1)
        total, squares = total + nats, squares + nats**2
    mean = total / samples
    # Rounding may leave a variance of 0 slightly negative.
    variance = (squares / samples - mean**2).clamp(min=0) * samples / (samples - 1)
    return Bound(mean, (variance / samples).sqrt())


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, *, chunk: int | None = None
) -> Tensor:
    """sum over n of weights[n] * cross_entropy(hidden[n] @ weight.T, targets[n]), never holding all logits at once.

    hidden float [N, D]; weight float [V, D], the head; targets int [N] in [0, V); weights float [N]. Returns a
    scalar in float32 or better; divide by the normalizer outside. `chunk` rows of logits exist at a time (None: 4096,
    or as many as have 2^25 logits), and the gradients are made in the same pass, so nothing is computed twice and
    nothing [N, V] waits for the backward pass (as Liger's kernel, arXiv:2410.10989). Gradients flow to hidden and
    weight, once; none to weights. The slow twin is `denoising_loss(hidden @ weight.T, ...)`.
    """
    return linear_cross_entropy_with_nats(hidden, weight, targets, weights, chunk=chunk)[0]


class Taught(NamedTuple):
    """What a teacher says at N places: softmax(hidden @ weight.T), with nothing for the columns `absent` (from, to)."""

    hidden: Tensor  # float [N, D]
    weight: Tensor  # float [V, D]
    absent: tuple[int, int] = (0, 0)

    def odds(self, part: slice) -> Tensor:
        """Its probabilities [n, V] in float32 or better."""
        logits = _at_least_float32(self.hidden[part] @ self.weight.T)
        logits[:, slice(*self.absent)] = -torch.inf
        return logits.softmax(dim=-1)


def linear_cross_entropy_with_nats(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    taught: Taught | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy`, and the cross entropy of every target, float [N] in nats, without gradient.

    taught: then the sum is over the cross entropies with a teacher's distribution, not with the targets (distillation,
    arXiv:1503.02531, at temperature 1; against forgetting arXiv:1606.09282); the nats are still the targets'.
    """
    if hidden.dim() != 2 or targets.shape != hidden.shape[:1] or weights.shape != targets.shape:
        raise ValueError(
            f"linear_cross_entropy got hidden {tuple(hidden.shape)}, targets {tuple(targets.shape)} and weights "
            f"{tuple(weights.shape)}, expected [N, D], [N] and [N]."
        )
    if chunk is None:
        chunk = max(min(_LOGITS_AT_A_TIME // len(weight), 4096), 1)
    if chunk < 1:
        raise ValueError(f"linear_cross_entropy got chunk {chunk}, expected at least 1.")
    _check_targets(targets, weight.shape[0], 0)
    if torch.is_autocast_enabled(hidden.device.type):
        # A custom function is opaque to autocast: cast as it would for a matrix product.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # forward makes the gradients of what requires them
    with torch.autocast(hidden.device.type, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, targets, weights, taught, chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, taught: Taught | None, chunk: int
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=precise)
        nats = hidden.new_empty(len(hidden), dtype=precise)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight, dtype=precise) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = (hidden[part] @ weight.T).to(precise).log_softmax(dim=-1)
            target, share = targets[part, None], weights[part, None].to(precise)
            of_target = log_p.gather(1, target)
            nats[part] = -of_target[:, 0]
            odds = None if taught is None else taught.odds(part)
            total -= ((of_target if odds is None else (odds * log_p).sum(1, keepdim=True)) * share).sum()
            if to_hidden is None and to_weight is None:
                continue
            # d(cross entropy)/d(logits) = p - what is to be said: onehot(target), or the teacher's odds
            slope = log_p.exp_()
            if odds is None:
                slope.scatter_add_(1, target, torch.full_like(share, -1.0))
            else:
                slope -= odds
            slope = slope.mul_(share).to(hidden.dtype)
            if to_hidden is not None:
                to_hidden[part] = slope @ weight
            if to_weight is not None:
                to_weight += slope.T @ hidden[part]
        ctx.gradients = to_hidden, None if to_weight is None else to_weight.to(weight.dtype)
        ctx.mark_non_differentiable(nats)
        return total, nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        to_hidden, to_weight = (None if part is None else part * gradient.to(part.dtype) for part in ctx.gradients)
        return to_hidden, to_weight, None, None, None, None


def _check_targets(targets: Tensor, columns: int, first_id: int) -> None:
    if targets.numel() and not bool(((targets >= 0) & (targets < columns)).all()):
        raise ValueError(
            f"Targets are from {int(targets.min()) + first_id} to {int(targets.max()) + first_id}, expected ids of the "
            f"logits' columns [{first_id}, {first_id + columns})."
        )


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

"""Draws: how a token is chosen from the logits of one place, and how sure the choice is.

A draw returns the columns chosen and the probability the model gave them: the softmax over all returned columns at
temperature 1, whatever the draw's own temperature, in float32 or better.

Randomness belongs to rows. Row b takes exactly as many numbers from its own generator as it has asked places, in order
of position, so that a row draws the same tokens alone, in any batch and behind any padding.

Shape letters: B rows, W asked places, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmdlm.errors import InputError

NUMBERS_AT_ONCE = 1 << 22  # of float64; more than a whole row of most models, and never a full vocabulary's canvas

# (logits [B, W, V], where [B, W], asked [B, W] bool, one generator per row) -> columns [B, W], confidence [B, W]
Draw = Callable[[Tensor, Tensor, Tensor, list[torch.Generator]], tuple[Tensor, Tensor]]


def greedy(
    logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """The likeliest column of each place and its probability; the lower id where two are equal."""
    top, columns = logits.max(dim=-1)
    return columns, _probability(top, logits, asked)


def categorical(*, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Draw:
    """A draw from softmax(logits / temperature), cut to the `top_k` likeliest columns (ties with the last one stay)
    and then to the smallest set that holds the share `top_p`.

    `temperature` >= 0, where 0 is `greedy`; `top_k` >= 1; `top_p` in (0, 1]; InputError otherwise.
    Gumbel-max: argmax(logits / temperature + g), arXiv:1611.00712.
    """
    if temperature < 0:
        raise InputError(f"temperature is {temperature}, expected 0 (greedy) or more: use 1 for the model's own odds")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, expected 1 or more: leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected a share in (0, 1]: leave it out to keep every token")
    if temperature == 0:
        return greedy

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        scores = logits / temperature
        if top_k is not None and top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
        if top_p is not None and top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            shares = ordered.softmax(dim=-1)
            surplus = shares.cumsum(dim=-1) - shares >= top_p  # the column that crosses the share stays
            scores = scores.masked_fill(surplus.scatter(-1, order, surplus), -torch.inf)
        columns = gumbel_argmax(scores, generators, asked)
        chosen = logits.gather(-1, columns.unsqueeze(-1)).squeeze(-1)
        return columns, _probability(chosen, logits, asked)

    return draw


def _probability(chosen: Tensor, logits: Tensor, asked: Tensor) -> Tensor:
    """softmax(logits) at the chosen column, as 1 / sum(exp(logit - chosen)).

    exp(chosen - logsumexp) would lose the digits that a large logit spends before its point; this form needs neither
    float64 nor the softmax itself. Where the sum overflows the probability is below 1e-38, and 0 is returned.
    """
    return (logits - chosen.unsqueeze(-1)).exp_().sum(dim=-1).reciprocal().masked_fill(~asked, 0.0)


def row_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None, rows: int, device: torch.device
) -> list[torch.Generator]:
    """One generator per row.

    A sequence is used as it is and must have `rows` members (ValueError). One generator is split: it gives one seed
    per row, in order, and so moves on by `rows` numbers: two calls with it differ, and the first rows of a larger
    batch equal those of a smaller one. None splits torch's global generator.
    """
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != rows:
            raise ValueError(f"got {len(generator)} generators for {rows} rows: pass one per row, or a single one")
        return list(generator)
    if generator is not None:
        device = generator.device
    # one call per seed: a single call for all rows may consume the generator in another order on another device
    seeds = [int(torch.randint(2**63 - 1, (), generator=generator, device=device)) for _ in range(rows)]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def uniform(generators: Sequence[torch.Generator], asked: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64 [B, W]: row b's first asked.sum() places from generator b, the rest 0."""
    noise = torch.zeros(asked.shape, dtype=torch.float64, device=asked.device)
    for row, count in enumerate(asked.sum(dim=1).tolist()):
        noise[row, :count] = _rand(generators[row], count)
    return noise


def gumbel(generators: Sequence[torch.Generator], asked: Tensor, columns: int | None = None) -> Tensor:
    """Standard Gumbel noise, float32 [B, W] or [B, W, columns], taken row by row as in `uniform`.

    Drawn in float64, one row at a time and of that 32 MB: float32 has 24 random bits, which cuts the tail off and
    sharpens the distribution that is sampled (arXiv:2409.02908). The number kept needs no more than float32.
    """
    shape = asked.shape if columns is None else (*asked.shape, columns)
    noise = torch.zeros(shape, dtype=torch.float32, device=asked.device)
    at_once = max(NUMBERS_AT_ONCE // (columns or 1), 1)
    for row, count in enumerate(asked.sum(dim=1).tolist()):
        for start in range(0, count, at_once):
            some = _rand(generators[row], min(at_once, count - start), *shape[2:])
            noise[row, start : start + len(some)] = _to_gumbel(some)
    return noise


def gumbel_argmax(
    scores: Tensor, generators: Sequence[torch.Generator], asked: Tensor, *, narrow: bool = True
) -> Tensor:
    """The column of the largest score + Gumbel noise at each place, the first of equals; the noise is `gumbel`'s.

    `narrow`: on the CPU and in float32, noise is computed where it can decide only. The uniform numbers are taken all
    the same, but of most columns no logarithm: what lies below a place's best score by more than the place's largest
    noise cannot win. False is the slow twin; the columns are the same.
    """
    if not (narrow and scores.dtype == torch.float32 and scores.device.type == "cpu"):
        return (scores + gumbel(generators, asked, scores.shape[-1])).argmax(dim=-1)
    columns = torch.empty(asked.shape, dtype=torch.long)
    at_once = max(NUMBERS_AT_ONCE // scores.shape[-1], 1)
    for row, count in enumerate(asked.sum(dim=1).tolist()):
        for start in range(0, count, at_once):
            stop = min(start + at_once, count)
            luck = _rand(generators[row], stop - start, scores.shape[-1]).to(scores.device)
            columns[row, start:stop] = _lucky(scores[row, start:stop], luck)
        columns[row, count:] = scores[row, count:].argmax(dim=-1)
    return columns


def _lucky(scores: Tensor, luck: Tensor) -> Tensor:
    """`gumbel_argmax` of one row: scores float32 [n, V] and uniform numbers float64 [n, V], both of the CPU; [n]."""
    level, lines = scores.detach().contiguous().numpy(), np.arange(len(scores))
    likeliest = level.argmax(axis=1)
    most = _to_gumbel(luck.amax(dim=1)).numpy()
    floor = level[lines, likeliest] + _to_gumbel(luck[torch.from_numpy(lines), torch.from_numpy(likeliest)]).numpy()
    with np.errstate(invalid="ignore"):  # of infinite scores, which then are no numbers here
        # somewhat lower than that, for no rounding of a sum may lose a winner
        floor = floor - most - (1e-6 + 4e-6 * (np.abs(floor) + np.abs(most)))
    can = level >= floor[:, None]
    if 8 * np.count_nonzero(can) > level.size or not can.any(axis=1).all():  # too flat to save anything, or no numbers
        return (scores + _to_gumbel(luck)).argmax(dim=1)
    able = np.flatnonzero(can)
    line = able // level.shape[1]
    begins = np.flatnonzero(np.diff(line, prepend=-1))
    found = level.reshape(-1)[able] + _to_gumbel(luck.view(-1)[torch.from_numpy(able)]).numpy()
    winners = np.flatnonzero(found == np.maximum.reduceat(found, begins)[line])
    first = winners[np.flatnonzero(np.diff(line[winners], prepend=-1))]
    return torch.from_numpy(able[first] % level.shape[1])


def _to_gumbel(luck: Tensor) -> Tensor:
    """Uniform numbers, float64 and overwritten -> standard Gumbel noise, float32."""
    return luck.log_().neg_().log_().neg_().float()


def _rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)

"""SDAR's draw and its three rules (arXiv:2510.06303), for getting its released program's tokens.

It counts a block's tokens from the block's length, not from its masks, and takes for a confidence the probability after
temperature, top-k and top-p, so that top_k=1 is sure of everything.

Shape letters: B rows, W asked places, S places of a block, V columns of the logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Decision, Policy, View
from mmdlm.sampling.draws import Draw
from mmdlm.sampling.policies import top_k as surest


def filtered(
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    block_length: int | None = None,
    generator: torch.Generator | None = None,
) -> Draw:
    """The likeliest column, or one drawn, and its probability under softmax(logits / temperature) cut to the `top_k`
    likeliest columns (0: all) and then to `top_p` (the column that goes past it stays).

    With `block_length` one torch.multinomial call per pass draws for every place of the block, [B * S, V], from
    `generator`; what it draws where nothing is asked is lost. Without it the likeliest is taken. `temperature` above 0,
    `top_k` >= 0, `top_p` in (0, 1]; InputError otherwise.
    """
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}, expected more than 0: use the draw greedy instead of 0")
    if top_k < 0:
        raise InputError(f"top_k is {top_k}, expected 0 (all) or more: change top_k")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, expected a share in (0, 1]: use 1 to keep every token")

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        scores = logits / temperature
        if 0 < top_k < scores.shape[-1]:
            scores = scores.masked_fill(scores < scores.topk(top_k, dim=-1).values[..., -1:], -torch.inf)
        if top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True, stable=True)
            past = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
            past = torch.cat([torch.zeros_like(past[..., :1]), past[..., :-1]], dim=-1)
            scores = scores.masked_fill(past.scatter(-1, order, past), -torch.inf)
        odds = scores.softmax(dim=-1)
        columns = odds.argmax(dim=-1)
        if block_length is not None:
            rows, slot = torch.arange(len(odds), device=odds.device).unsqueeze(1).expand_as(where), where % block_length
            whole = odds.new_ones(len(odds), block_length, odds.shape[-1])
            whole[rows[asked], slot[asked]] = odds[asked]
            columns = torch.multinomial(whole.flatten(0, 1), 1, generator=generator).view(len(odds), -1).gather(1, slot)
        return columns, odds.gather(-1, columns.unsqueeze(-1)).squeeze(-1).masked_fill(~asked, 0.0)

    return draw


def static(*, block_length: int) -> Policy:
    """low_confidence_static: the n surest places, `block_length` shared out over the steps, the first ones getting the
    remainder, however many of the block's places are masked."""

    def policy(view: View) -> Decision:
        return surest()(view._replace(n_start=torch.full_like(view.n_start, block_length)))

    return policy


def dynamic(tau: float, *, block_length: int) -> Policy:
    """low_confidence_dynamic: every place surer than `tau` if they are at least the n of `static`, else those n."""
    plan = static(block_length=block_length)
    if not 0 <= tau <= 1:
        raise InputError(f"tau is {tau}, expected a confidence in [0, 1]: change tau in the policy's settings")

    def policy(view: View) -> Decision:
        sure = view.masked & (view.confidence > tau)
        enough = sure.sum(dim=1) >= _planned(view, block_length)
        return Decision(torch.where(enough.unsqueeze(1), sure, plan(view).write))

    return policy


def sequential(*, block_length: int) -> Policy:
    """sequential: the n places from the first mask on, n as in `static`, those of them that are masked."""

    def policy(view: View) -> Decision:
        end = view.where.masked_fill(~view.masked, int(view.where.max()) + 1).amin(dim=1) + _planned(view, block_length)
        return Decision(view.masked & (view.where < end.unsqueeze(1)))

    return policy


def _planned(view: View, block_length: int) -> Tensor:
    steps = view.steps.clamp(min=1)
    return block_length // steps + (view.step < block_length % steps).long()

"""Lumina-DiMOO's rule and draw for pictures (arXiv:2510.06308), for getting its released program's tokens.

    policy=maskgit_of_masks(temperature=..., generator=g)
    draw=gumbel_of_masks(temperature=..., generator=g)

Both take their numbers for the whole batch from one generator: first Gumbel noise for every column of every masked
place, then one number for every masked place.

Shape letters: B rows, W asked places, N masked places of all rows, V columns of the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Policy, View
from mmdlm.sampling.draws import Draw, greedy
from mmdlm.sampling.policies import maskgit


def gumbel_of_masks(*, temperature: float, generator: torch.Generator | None = None) -> Draw:
    """argmax logits / temperature + g, g Gumbel noise [N, V] float32 with 1e-20 added inside both logarithms.

    At temperature 0 `greedy`, which draws nothing. The confidence is the softmax at temperature 1. `temperature` >= 0,
    InputError otherwise; `generator`: None is torch's global one.
    """
    if temperature < 0:
        raise InputError(f"temperature is {temperature}, expected 0 (greedy) or more: change temperature")
    if temperature == 0:
        return greedy

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        noise = torch.zeros_like(logits)
        noise[asked] = _gumbel((int(asked.sum()), logits.shape[-1]), logits, generator)
        columns = (logits / temperature + noise).argmax(dim=-1)
        odds = logits.softmax(dim=-1).gather(-1, columns.unsqueeze(-1)).squeeze(-1)
        return columns, odds.masked_fill(~asked, 0.0)

    return draw


def maskgit_of_masks(*, temperature: float = 0.0, generator: torch.Generator | None = None) -> Policy:
    """Keep floor(n_start * cos(pi / 2 * r)) places masked, at least one and fewer than now, r the share of passes made
    (0 in the last), in float32.

    `policies.maskgit(decay="constant")` but for rounding, for the ranking's noise, [N], and for its being drawn at
    temperature 0 too.
    """

    def noise(view: View) -> Tensor:
        luck = torch.zeros_like(view.confidence)
        luck[view.masked] = _gumbel((int(view.masked.sum()),), luck, generator)
        return luck

    def keep(view: View) -> Tensor:
        made = ((view.step + 1).double() / view.steps.clamp(min=1)).float()
        count = torch.floor(view.n_start * torch.cos(made * math.pi / 2)).long().clamp(min=1)
        return count.minimum(view.masked.sum(dim=1) - 1).masked_fill(view.step + 1 >= view.steps, 0)

    return maskgit(choice_temperature=temperature, decay="constant", keep=keep, noise=noise)


def _gumbel(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    luck = torch.zeros(shape, device=like.device).uniform_(0, 1, generator=generator)
    return -(-(luck + 1e-20).log() + 1e-20).log()

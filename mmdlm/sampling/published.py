"""What the released samplers do in their own way, as callables for the one loop. Nobody needs it to sample well: it is
for getting a published program's tokens from its seed.

The released programs draw once for the whole batch and the whole canvas, from torch's generator or one that is given;
our own draws take a row's numbers from the row's generator. So a row drawn here depends on its neighbours.

    LLaDA, MMaDA text, Fast-dLLM   draw=gumbel_together(...), policy=random_together(top_k(), ...)
    MMaDA pictures                 draw=multinomial_together(...), policy=maskgit(..., noise=gumbel_of_places(...),
                                   keep=rounded_counts(...))

Shape letters: B rows, L positions, W asked places, N places of the picture, V columns of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Decision, Policy, Predictor, View
from mmdlm.sampling.draws import Draw, greedy

# ---------------------------------------------------------------- text


def gumbel_together(*, temperature: float, length: int, generator: torch.Generator | None = None) -> Draw:
    """argmax exp(logits) / (-log u)^temperature with u uniform, float64 [B, L, V], drawn once per pass.

    LLaDA's, MMaDA's and Fast-dLLM's draw (arXiv:2502.09992, after arXiv:2409.02908). `length` is L, `temperature` >= 0;
    0 is `greedy` and draws nothing. `generator`: None is torch's global one. The confidence is the softmax at
    temperature 1, as for every draw.
    """
    if temperature < 0:
        raise InputError(f"temperature is {temperature}, expected 0 (greedy) or more: use 1 for the model's own odds")
    if temperature == 0:
        return greedy

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        shape = (logits.shape[0], length, logits.shape[-1])
        noise = torch.rand(shape, generator=generator, dtype=torch.float64, device=logits.device)
        noise = noise.gather(1, where.unsqueeze(-1).expand(*where.shape, logits.shape[-1]))
        columns = (logits.double().exp() / (-noise.log()) ** temperature).argmax(dim=-1)
        return columns, _softmax_at(columns, logits, asked)

    return draw


def random_together(policy: Policy, *, length: int, generator: torch.Generator | None = None) -> Policy:
    """`policy` with a uniform number for each place's confidence, float32 [B, L], drawn once per pass.

    LLaDA's random remasking; a pass draws it after the tokens' own noise.
    """

    def random_policy(view: View) -> Decision:
        luck = torch.rand((view.x.shape[0], length), generator=generator, device=view.x.device)
        return policy(view._replace(confidence=luck.gather(1, view.where)))

    return random_policy


def forbidden(predict: Predictor, columns: Sequence[int]) -> Predictor:
    """`predict` with these columns at -inf: tokens that are never drawn (LLaDA's logits_eos_inf)."""

    def predict_others(ids: Tensor, where: Tensor) -> Tensor:
        logits = predict(ids, where)
        return logits.index_fill(-1, torch.tensor(list(columns), device=logits.device), -torch.inf)

    return predict_others


def unsure(draw: Draw, columns: Sequence[int]) -> Draw:
    """`draw`, but the confidence is a softmax without these columns, and 0 where one of them was drawn.

    LLaDA's confidence_eos_eot_inf: the end of the text may be drawn, but is written after everything else.
    """

    def draw_unsure(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        chosen, _ = draw(logits, where, asked, generators)
        shut = logits.index_fill(-1, torch.tensor(list(columns), device=logits.device), -torch.inf)
        return chosen, _softmax_at(chosen, shut, asked)

    return draw_unsure


# ---------------------------------------------------------------- pictures


def multinomial_together(places: Tensor, *, generator: torch.Generator | None = None) -> Draw:
    """torch.multinomial over the softmax, [B * N, V] in one call per pass, whether a place is asked or not.

    MMaDA's draw for pictures (arXiv:2505.15809). `places` [N]: the picture's positions, rising, the same in each row.
    Places that are not asked take their share of the numbers and get nothing.
    """

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        odds = logits.softmax(dim=-1)
        slot = torch.searchsorted(places, where.contiguous()).clamp(max=len(places) - 1)
        row = torch.arange(len(logits), device=logits.device).unsqueeze(1).expand_as(slot)
        all_odds = torch.ones(len(logits), len(places), logits.shape[-1], dtype=odds.dtype, device=odds.device)
        all_odds[row[asked], slot[asked]] = odds[asked]
        columns = torch.multinomial(all_odds.flatten(0, 1), 1, generator=generator).view(len(logits), -1)
        columns = columns.gather(1, slot)
        return columns, odds.gather(-1, columns.unsqueeze(-1)).squeeze(-1).masked_fill(~asked, 0.0)

    return draw


def gumbel_of_places(places: Tensor, *, generator: torch.Generator | None = None) -> Callable[[View], Tensor]:
    """Gumbel noise for `maskgit(noise=...)`: float32 [B, N] of uniform numbers in one call per pass, cut at 1e-20.

    MMaDA's, which draws it even at temperature 0. `places` as in `multinomial_together`. Returns [B, W].
    """

    def noise(view: View) -> Tensor:
        luck = torch.zeros(len(view.x), len(places), device=view.x.device).uniform_(0, 1, generator=generator)
        gumbel = -(-luck.clamp(min=1e-20).log()).clamp(min=1e-20).log()
        return gumbel.gather(1, torch.searchsorted(places, view.where.contiguous()).clamp(max=len(places) - 1))

    return noise


def rounded_counts(schedule: str, places: int) -> Callable[[View], Tensor]:
    """How many places stay masked, for `maskgit(keep=...)`: max(1, min(masked - 1, floor(places * share(r)))).

    MMaDA's count (arXiv:2505.15809), r the share of the passes made: `places` is all of the picture's, those that were
    given included; the product is rounded in float32, which at a whole number may lose one (16 cos(pi / 3) -> 7); and
    one place always stays, so that a row with a single mask draws it again at each pass. `schedule`: cosine, linear,
    sigmoid, or pow and an exponent. InputError for another.
    """
    share = _share(schedule)

    def keep(view: View) -> Tensor:
        made = ((view.step + 1).double() / view.steps.clamp(min=1)).float()
        count = torch.floor(places * share(made)).long()
        return count.minimum(view.masked.sum(dim=1) - 1).clamp(min=1)

    return keep


def _share(schedule: str) -> Callable[[Tensor], Tensor]:
    """The masked share after the share r of the passes, in the order of float32 operations that decides a floor."""
    if schedule == "cosine":
        return lambda r: torch.cos(r * math.pi * 0.5)
    if schedule == "linear":
        return lambda r: (1 - r).clamp(min=1e-6, max=1.0)
    if schedule == "sigmoid":  # from -3 to 3 at temperature 1, arXiv:2212.11972
        low, high = torch.sigmoid(torch.tensor(-3.0)), torch.sigmoid(torch.tensor(3.0))
        return lambda r: ((high - torch.sigmoid(r * 6 - 3)) / (high - low)).clamp(min=1e-6, max=1.0)
    try:
        exponent = float(schedule.removeprefix("pow")) if schedule.startswith("pow") else math.nan
    except ValueError:
        exponent = math.nan
    if not exponent > 0:
        raise InputError(f"schedule is {schedule!r}, expected cosine, linear, sigmoid or pow and a number, as pow2.5.")
    return lambda r: (1.0 - r**exponent).clamp(min=1e-6, max=1.0)


def _softmax_at(columns: Tensor, logits: Tensor, asked: Tensor) -> Tensor:
    odds = logits.softmax(dim=-1).gather(-1, columns.unsqueeze(-1)).squeeze(-1)
    return odds.masked_fill(~asked, 0.0)

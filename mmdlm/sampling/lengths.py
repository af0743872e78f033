"""Answers as long as they need to be: DAEDAL's two stages (arXiv:2508.00819) and the cut at the end of text.

    fit_length     before denoising: an all-masked answer grows until the model is sure that it ends within it
    grow           while denoising: where the model is least sure and no end is in sight, one mask becomes several
    trim_at_eos    after it: what stands behind the first end of text is no answer

An answer is the end of its row: columns from `prompt_length` on. Rows have lengths of their own; a place that a row
does not have holds ABSENT, at the start of a short prompt and at the end of a short answer, and `ragged` hides it from
the model. So a row is answered alike alone and in any batch.

Shape letters: B rows, P columns of the prompt, L columns of the canvas, G = L - P of the answer, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm import attention
from mmdlm.errors import InputError
from mmdlm.sampling.denoise import ABSENT, Decision, Predictor, State, View, denoise
from mmdlm.sampling.draws import Draw, greedy


class Fitted(NamedTuple):
    """Where `grow` and `denoise` start."""

    x: Tensor  # int64 [B, L]: prompts, then masks (and end-of-text ids, with `tail`), then ABSENT
    lengths: Tensor  # int64 [B]: places of the answer
    ends: Tensor  # float [B]: how sure the model was, at the end of the first stage, that the answer ends within it


def ragged(model: nn.Module, *, grid: Tensor | None = None, stop: int | None = None) -> Predictor:
    """One forward of rows of unlike lengths: nobody sees an ABSENT place, positions count from a row's first place.

    `grid` int64 [B, P or L, 2]: the model's, of the canvas before it grows; what comes behind is text. `stop`: only ids
    below it, so that no text is answered with image codes (`vocabulary.text_columns[1]`).
    """
    columns = None if stop is None else (0, stop)

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        present = ids != ABSENT
        position_ids = (present.cumsum(dim=1) - 1).clamp(min=0)
        wider = grid if grid is None else F.pad(grid, (0, 0, 0, ids.shape[1] - grid.shape[1]), value=-1)
        with torch.no_grad():
            return model(
                ids.masked_fill(~present, 0),
                attention_mask=attention.full(present),
                position_ids=position_ids,
                grid=wider,
                where=where,
                columns=columns,
            ).logits

    return predict


def end_confidence(logits: Tensor, answer: Tensor, *, eos_id: int, window: int) -> Tensor:
    """How sure the model is that the text has ended by the end of the answer: float [B] in [0, 1].

    The probability of `eos_id` at the last `window` places of the answer where it is the likeliest id, summed and
    divided by `window` even where there are fewer such places (arXiv:2508.00819, 3.2, as released). logits [B, G, V],
    answer bool [B, G]: which of these places belong to the row's answer. Written places count too.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    ending = answer & (logits.argmax(dim=-1) == eos_id)
    last = ending & (ending.flip(1).cumsum(dim=1).flip(1) <= window)
    probability = (logits[..., eos_id] - logits.logsumexp(dim=-1)).exp()
    return torch.where(last, probability, 0.0).sum(dim=1) / window


def fit_length(
    predict: Predictor,
    prompt: Tensor,
    *,
    mask_id: int,
    eos_id: int,
    initial_length: int = 64,
    longest: int = 2048,
    expansion: int = 8,
    eos_threshold: float = 0.5,
    window: int = 32,
    tail: int = 0,
) -> Fitted:
    """The first stage: `expansion` masks more for every row whose `end_confidence` is below `eos_threshold`, until
    none is, or the answer has `longest` places.

    prompt int64 [B, P], short ones ABSENT at their start. `window` >= 1 of `end_confidence`. `tail`: so many places
    more, within `longest`, that hold `eos_id` from the start (the released code adds window // 2 of them).

    Raises InputError for settings out of range and for a prompt that is padded at its end. arXiv:2508.00819, 3.2.
    """
    _check(initial_length=initial_length, longest=longest, expansion=expansion, window=window)
    if initial_length > longest:
        raise InputError(f"initial_length is {initial_length}, expected at most longest, {longest}: lower it")
    if tail < 0:
        raise InputError(f"tail is {tail}, expected 0 or more: leave it out for none")
    if prompt.dim() != 2 or prompt.shape[1] == 0 or bool((prompt[:, -1] == ABSENT).any()):
        raise InputError(f"the prompt is {tuple(prompt.shape)}, expected [B, P], short rows filled up with {ABSENT} at "
                         "their start: pad it on the left")
    lengths = torch.full_like(prompt[:, 0], initial_length)
    while True:
        x = _canvas(prompt, lengths, lengths, mask_id, eos_id)
        answer = x[:, prompt.shape[1] :] != ABSENT
        where = torch.arange(prompt.shape[1], x.shape[1], device=x.device).expand_as(answer)
        ends = end_confidence(predict(x, where), answer, eos_id=eos_id, window=window)
        short = (ends < eos_threshold) & (lengths < longest)
        if not bool(short.any()):
            break
        lengths = torch.where(short, (lengths + expansion).clamp(max=longest), lengths)
    total = (lengths + tail).clamp(max=longest)
    return Fitted(_canvas(prompt, lengths, total, mask_id, eos_id), total, ends)


def grow(
    predict: Predictor,
    x: Tensor,
    *,
    prompt_length: int,
    mask_id: int,
    eos_id: int,
    longest: int = 2048,
    block: int | None = None,
    threshold: float = 0.9,
    low: float = 0.1,
    expansion: int = 8,
    eos_threshold: float = 0.9,
    window: int = 32,
    cut: bool = False,
    keep_masks: bool = False,
) -> Iterator[State]:
    """The second stage: `denoise`, where a mask may become several. Yields its States, whose L grows.

    A pass writes, in a row's block, every place whose confidence is above `threshold`, or the surest one. Of the masks
    left there the least sure, if its confidence is below `low`, becomes `expansion` masks, unless the row's
    `end_confidence` reaches `eos_threshold` or its answer has `longest` places. arXiv:2508.00819, 3.3.

    x int64 [B, L]: `Fitted.x`, or any canvas whose columns from `prompt_length` on are the answer. `block`: as in
    `denoise`; the blocks are counted anew after an insertion, so that its block keeps its length and what stood behind
    moves on. Drawn greedily. `predict` meets ABSENT places and growing rows: `ragged`, or one that can do the same.

    As the released code does, and only by name: `cut` inserts all of `expansion` and drops what this pushes past
    `longest` at the row's end, be it written or not (else only what there is room for is inserted); `keep_masks` lets
    the mask token take part in the prediction, and places where it is the likeliest wait (else its column is shut).

    Raises InputError for settings out of range.
    """
    _check(longest=longest, expansion=expansion, window=window)
    present = x != ABSENT
    editable = present & (torch.arange(x.shape[1], device=x.device) >= prompt_length)
    most = int(editable.sum(dim=1).max())
    if most > longest:
        raise InputError(f"an answer has {most} places, expected at most longest, {longest}: raise longest")
    room = ends = torch.empty(0)  # [B] each, of the present pass: what `look` saw and `policy` asks for

    def look(ids: Tensor, where: Tensor) -> Tensor:
        nonlocal room, ends
        answer = ids[:, prompt_length:] != ABSENT
        room = longest - answer.sum(dim=1)
        if expansion == 1 or not bool((room > 0).any()):
            ends = torch.ones_like(room, dtype=torch.float32)
            return predict(ids, where)
        everywhere = torch.arange(prompt_length, ids.shape[1], device=ids.device).expand_as(answer)
        logits = predict(ids, everywhere)
        ends = end_confidence(logits, answer, eos_id=eos_id, window=window)
        column = (where - prompt_length).clamp(min=0)  # what fills a row up may lie in the prompt and is not read
        return logits.gather(1, column.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    def policy(view: View) -> Decision:
        write, sure = _sure_or_surest(view, mask_id, threshold)
        weak = view.masked & ~write & (sure < low) & ((ends < eos_threshold) & (room > 0)).unsqueeze(1)
        weakest = _only(sure.masked_fill(~weak, 2).argmin(dim=1), weak)
        more = torch.full_like(room, expansion - 1)
        return Decision(write, insert=weakest * (more if cut else more.minimum(room)).unsqueeze(1))

    given = (present & ~editable).sum(dim=1)
    yield from denoise(
        look, x, policy, editable=editable, mask_id=mask_id, steps=None, block=block,
        draw=_never_only_masks(mask_id), keep_masks=keep_masks, longest=given + longest,
    )  # fmt: skip


def trim_at_eos(x: Tensor, *, prompt_length: int, eos_id: int) -> list[Tensor]:
    """The answers of a canvas [B, L]: int64 [n] each, up to but without the row's first `eos_id`, ABSENT left out."""
    answers = [row[row != ABSENT] for row in x[:, prompt_length:]]
    return [answer[: int((answer == eos_id).long().cumsum(0).eq(0).sum())] for answer in answers]


def _canvas(prompt: Tensor, masks: Tensor, total: Tensor, mask_id: int, eos_id: int) -> Tensor:
    """Prompts, then per row so many masks, end-of-text ids up to `total` places, and ABSENT."""
    place = torch.arange(int(total.max()), device=prompt.device)
    answer = torch.where(place < masks.unsqueeze(1), mask_id, eos_id).masked_fill(place >= total.unsqueeze(1), ABSENT)
    return torch.cat([prompt, answer], dim=1)


def _never_only_masks(mask_id: int) -> Draw:
    """`greedy`, but a row where it gives nothing but the mask draws without it: else no place could be written."""

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        columns, sure = greedy(logits, where, asked, generators)
        stuck = ~(asked & (columns != mask_id)).any(dim=1, keepdim=True)
        if mask_id >= logits.shape[-1] or not bool(stuck.any()):
            return columns, sure
        shut = logits.index_fill(-1, torch.tensor(mask_id, device=logits.device), -torch.inf)
        other, less_sure = greedy(shut, where, asked, generators)
        return torch.where(stuck, other, columns), torch.where(stuck, less_sure, sure)

    return draw


def _sure_or_surest(view: View, mask_id: int, threshold: float) -> tuple[Tensor, Tensor]:
    """Which places to write, and how sure the model is of its likeliest id there, the mask included; [B, W] each."""
    columns, sure = greedy(view.logits, view.where, view.editable, view.generator)
    words = view.masked & (columns != mask_id)
    write = words & (sure > threshold)
    # in a row that predicts nothing but masks, `_never_only_masks` has drawn something else for every place
    open_ = torch.where(words.any(dim=1, keepdim=True), words, view.masked)
    best = _only(view.confidence.masked_fill(~open_, -1).argmax(dim=1), open_)
    return torch.where(write.any(dim=1, keepdim=True), write, best), sure


def _only(place: Tensor, allowed: Tensor) -> Tensor:
    """True at one place per row [B], where `allowed` [B, W]; argmax and argmin take the left one of equals."""
    return torch.zeros_like(allowed).scatter(1, place.unsqueeze(1), True) & allowed


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name} is {value}, expected 1 or more: raise it")

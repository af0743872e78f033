"""Forwards of the model for rows of any lengths, tasks and asked places.

On the CPU rows of one length, rounded up, share a forward of the trunk, whatever adapters they want: a short row beside
a long one would be computed as long as that. What a row is padded to, and that it has a mask, then hangs on its own
request alone, so that its sums are made in the same order whoever stands beside it. The head runs over what was asked
and nothing else, after guidance has weighed the hidden states: for each kind of place (text, picture) one product with
that kind's rows of the output matrix.

`shared_forward` is the slow twin of `guided_forward`: one forward for all rows, each row's own logits.

Shape letters: B rows, L positions, W asked places, V columns of the logits, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdlm.models.adapters import adapter_names, use_adapters
from mmdlm.models.folding import Folding
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.predictors import guide
from mmdlm.serving.jobs import Question

# Lengths are rounded up to a multiple of this: few forwards a step, and few places of padding. A forward of its own
# costs a core about what 48 places more would in another one, with the shipped model on 2 cores of an AMD EPYC.
LENGTHS = 4
LAYOUTS = 8  # more groups than this a step seldom has


class Layout(NamedTuple):
    """What a batch of canvases is, whatever stands on them; it does not change from step to step."""

    of: list[tuple[Tensor, Tensor]]  # each row's positions [L] and grid [L, 2]
    mask: Tensor | None  # bool [B, 1, 1, L]; on the CPU also where it hides nothing
    positions: Tensor  # [B, L]
    grid: Tensor  # [B, L, 2]
    folding: Folding | None


class Layouts:
    """The last few layouts, for whoever asks about the same canvases again; for one thread."""

    def __init__(self) -> None:
        self.kept: list[Layout] = []

    def of(self, model: MaskPredictor, questions: Sequence[Question], length: int) -> Layout:
        """The questions' layout, padded to `length`; the one that is kept, for the same canvases in the same order."""
        rows = [(question.positions, question.grid) for question in questions]
        for i, kept in enumerate(self.kept):
            if len(kept.of) == len(rows) and kept.grid.shape[1] == length and all(
                a is b and c is d for (a, c), (b, d) in zip(kept.of, rows, strict=True)
            ):
                self.kept.append(self.kept.pop(i))
                return kept
        lengths = torch.tensor([len(question.ids) for question in questions], device=rows[0][1].device)
        positions, grid = (_padded([row[i] for row in rows], length, fill) for i, fill in ((0, 0), (1, -1)))
        mask = None
        if grid.device.type == "cpu" or min(len(question.ids) for question in questions) < length:
            mask = (torch.arange(length, device=grid.device) < lengths.unsqueeze(1))[:, None, None]
        made = Layout(rows, mask, positions, grid, model.fold_once(grid))
        self.kept = [*self.kept, made][-LAYOUTS:]
        return made


@torch.no_grad()
def shared_forward(model: MaskPredictor, questions: Sequence[Question]) -> list[Tensor]:
    """Logits [W, V] for every question. A question's logits do not depend on the others but for rounding."""
    hidden = _hidden(model, questions, max(len(question.ids) for question in questions), Layouts())
    return _head(model, hidden, [question.columns for question in questions])


@torch.no_grad()
def guided_forward(
    model: MaskPredictor,
    asked: Sequence[tuple[Sequence[Question], float]],
    layouts: Layouts | None = None,
) -> list[Tensor]:
    """Logits [W, V] for every job: its questions, one or the prompted and the unprompted one, and what weighs them.

    They are `guide(*shared_forward(...), scale)` but for rounding. `layouts`: kept from step to step.
    """
    layouts = Layouts() if layouts is None else layouts
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(_lengths(model, [max(len(question.ids) for question in pair) for pair, _ in asked])):
        groups.setdefault(length, []).append(i)
    weighed: dict[int, Tensor] = {}
    for length, group in groups.items():
        found = iter(_hidden(model, [question for i in group for question in asked[i][0]], length, layouts))
        for i in group:
            own = [next(found).unsqueeze(0) for _ in asked[i][0]]
            weighed[i] = (own[0] if len(own) == 1 else guide(own[0], own[1], asked[i][1]))[0]
    return _head(model, [weighed[i] for i in range(len(asked))], [pair[0].columns for pair, _ in asked])


def _lengths(model: MaskPredictor, lengths: Sequence[int]) -> list[int]:
    """What jobs of these lengths are padded to."""
    if model.device.type != "cpu":  # one large forward is best there
        return [max(lengths)] * len(lengths)
    return [min(-(-length // LENGTHS) * LENGTHS, model.config.max_positions) for length in lengths]


def _hidden(model: MaskPredictor, questions: Sequence[Question], length: int, layouts: Layouts) -> list[Tensor]:
    """What the head reads for every question, [W, D], of one forward of rows padded to `length`."""
    layout, adapters = layouts.of(model, questions, length), [question.adapter for question in questions]
    # A model that has adapters would use the last one: the base model has to be asked for, too.
    with use_adapters(model, adapters) if adapter_names(model) else nullcontext():
        hidden = model(
            _padded([question.ids for question in questions], length),
            attention_mask=layout.mask,
            position_ids=layout.positions,
            grid=layout.grid,
            folding=layout.folding,
            where=pad_sequence([question.where for question in questions], batch_first=True),
            columns=(0, 0),  # no logits: the rows want different columns
        ).hidden
    return [row[: len(question.where)] for row, question in zip(hidden, questions, strict=True)]


def _head(model: MaskPredictor, hidden: Sequence[Tensor], columns: Sequence[tuple[int, int]]) -> list[Tensor]:
    """[W, D] each -> logits [W, V] each, in one product for all that want the same columns."""
    logits: dict[int, Tensor] = {}
    for wanted in dict.fromkeys(columns):
        chosen = [i for i, kind in enumerate(columns) if kind == wanted]
        rows = model.head_rows(wanted)
        found = torch.cat([hidden[i] for i in chosen]).to(rows) @ rows.T
        logits.update(zip(chosen, found.split([len(hidden[i]) for i in chosen]), strict=True))
    return [logits[i] for i in range(len(hidden))]


def _padded(rows: Sequence[Tensor], length: int, fill: int = 0) -> Tensor:
    padded = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
    for row, whole in zip(rows, padded, strict=True):
        whole[: len(row)] = row
    return padded

"""Which row comes when: batches of canvases drawn from one or several sources of coded pictures and their words.

One batch mixes tasks: text to picture, picture to caption, picture and question to answer, picture and words to
picture, and pictures without words (the unconditional branch of guidance, arXiv 2207.12598). They differ in which
places are corruptible and in nothing else. B rows, L positions, h x w codes of a picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sequence import Canvas, ask_canvas, batch, describe_canvas, draw_canvas, edit_canvas
from mmdlm.vocabulary import Vocabulary


class Coded(Protocol):
    """N pictures as codes with their words: `mmdlm.data.coded.CodedScenes`, or the coded pairs of a user's own."""

    codes: Tensor  # int [N, h, w]
    captions: list[list[str]]  # phrasings, the one that describing is taught first; none is fine
    questions: list[list[tuple[str, str]]]
    kinds: list[str]

    def __len__(self) -> int: ...


class Pool(NamedTuple):
    """A source: its name in the logs, its rows, and how often it is drawn from, relative to the others."""

    name: str
    rows: Coded
    weight: float = 1.0


@dataclass
class RowSettings:
    """Which tasks a batch holds: part of a training program's settings.

    What draw_share, describe_share and edit_share leave is for questions. A row that lacks what a task needs (captions,
    questions, a source picture) takes one of the others, in proportion. yes_no_share: of the questions of rows that
    have such and others, how many are answered by yes or no; None: as many as there are.
    """

    seed: int = 0
    draw_share: float = 0.6
    describe_share: float = 0.2
    edit_share: float = 0.0
    prompt_dropout: float = 0.1
    canonical_share: float = 0.5
    caption_length: int = 24
    answer_length: int = 12
    yes_no_share: float | None = None


class RowBatch(NamedTuple):
    """canvas [B, L], valid bool [B, L], and for every row the number of its pool [B]."""

    canvas: Canvas
    valid: Tensor
    source: list[int]


class Rows:
    """Batches of canvases: a pure function of (seed, number), so that a resumed run sees the same rows.

    Raises InputError for a pool without rows, a caption or answer without room, and pools of several picture sizes.
    """

    def __init__(
        self,
        pools: Sequence[Pool],
        settings: RowSettings,
        *,
        text_ids: Callable[[str], list[int]],
        vocabulary: Vocabulary,
    ):
        self.pools, self.settings, self.vocabulary = list(pools), settings, vocabulary
        self.text_ids = text_ids
        self.known: dict[str, list[int]] = {}
        if not self.pools or any(len(pool.rows) == 0 or pool.weight < 0 for pool in self.pools):
            raise InputError("a source has no rows to train on or a negative weight: check `data` and its weights.")
        grids = {tuple(pool.rows.codes.shape[1:]) for pool in self.pools}
        if len(grids) > 1:
            raise InputError(f"the sources have pictures of {sorted(grids)} codes, expected one size: set resolution.")
        height, width = grids.pop()
        self.grid = (int(height), int(width))
        self.edited: list[list[Tensor | None]] = [  # the codes of the pictures that rows were edited from
            getattr(pool.rows, "sources", None) or [None] * len(pool.rows) for pool in self.pools
        ]
        self._check_lengths()
        self.everything = [list(range(len(pool.rows))) for pool in self.pools]
        self.singles = [[n for n, kind in enumerate(pool.rows.kinds) if kind == "single"] for pool in self.pools]

    def _check_lengths(self) -> None:
        """At the door, not in the middle of the night: every target must fit with its eos."""
        captions = answers = 0
        for pool in self.pools:
            captions = max([captions, *(len(self.ids(texts[0])) for texts in pool.rows.captions if texts)])
            answers = max([answers, *(len(self.ids(a)) for pairs in pool.rows.questions for _, a in pairs)])
        if captions >= self.settings.caption_length or answers >= self.settings.answer_length:
            raise InputError(
                f"the longest caption has {captions} tokens and the longest answer {answers}: set caption_length above "
                f"the one (now {self.settings.caption_length}) and answer_length above the other (now "
                f"{self.settings.answer_length})"
            )

    def batch(self, number: int, size: int, *, part: tuple[int, int] = (0, 1), singles: bool = False) -> RowBatch:
        """The n-th of `of` parts, of `size` rows each, of batch `number`, where part is (n, of).

        All the batch's rows are drawn, so that the parts together are that batch, but only the part's are built.
        singles: leaves out scenes of several or changed objects.
        """
        chance = random.Random(f"{self.settings.seed}-{number}")
        weights = [pool.weight for pool in self.pools]
        drawn: list[tuple[int, Callable[[], Canvas]]] = []
        for _ in range(size * part[1]):
            source = chance.choices(range(len(weights)), weights)[0] if len(weights) > 1 else 0
            chosen = (singles and self.singles[source]) or self.everything[source]
            drawn.append((source, self._row(chance, source, chance.choice(chosen))))
        mine = drawn[part[0] * size : (part[0] + 1) * size]
        canvas, valid = batch([build() for _, build in mine], pad_id=self.vocabulary.pad_id)
        return RowBatch(canvas, valid, [source for source, _ in mine])

    def longest(self) -> int:
        """Tokens of the longest row that can come."""
        found = 0
        for pool, edited in zip(self.pools, self.edited, strict=True):
            texts = {text for captions in pool.rows.captions for text in captions} | {""}
            asked = {question for pairs in pool.rows.questions for question, _ in pairs}
            prompt = max(texts, key=lambda text: len(self.ids(text)))
            place, codes = (self.grid, self.vocabulary), pool.rows.codes[0].long()
            rows = [draw_canvas(self.ids(prompt), codes, *place)]
            rows.append(describe_canvas(codes, self.grid, None, self.settings.caption_length, self.vocabulary))
            if asked:
                question = max(asked, key=lambda text: len(self.ids(text)))
                length = self.settings.answer_length
                rows.append(ask_canvas(codes, self.grid, self.ids(question), None, length, self.vocabulary))
            if self.settings.edit_share and any(source is not None for source in edited):
                rows.append(edit_canvas(codes, self.ids(prompt), codes, *place))
            found = max([found, *(len(row.ids) for row in rows)])
        return found

    def _row(self, chance: random.Random, pool: int, n: int) -> Callable[[], Canvas]:
        """Row n of a pool as a row of one task, all of its chances taken and its canvas still to be built."""
        c, rows, source = self.settings, self.pools[pool].rows, self.edited[pool][n]
        captions, questions = rows.captions[n], rows.questions[n]
        draw, describe = (c.draw_share, c.describe_share) if captions else (0.0, 0.0)
        edit = c.edit_share if source is not None and captions else 0.0
        ask = max(1.0 - c.draw_share - c.describe_share - c.edit_share, 0.0) if questions else 0.0
        if not draw + describe + edit + ask > 0:
            draw = 1.0  # a picture without words: without a condition
        # Where nothing is lacking the shares are of 1 as they stand: a sum would round.
        whole = captions and questions and (edit or not c.edit_share)
        task = chance.random() * (1.0 if whole else draw + describe + edit + ask)
        codes = rows.codes[n]
        if task < draw + edit:
            dropped = not captions or chance.random() < c.prompt_dropout
            prompt = self.ids("" if dropped else self._phrasing(captions, chance))
            if source is not None and task < edit:
                return partial(edit_canvas, source.long(), prompt, codes.long(), self.grid, self.vocabulary)
            return partial(draw_canvas, prompt, codes.long(), self.grid, self.vocabulary)
        if task < draw + edit + describe or not questions:
            caption = self.ids(captions[0])
            return partial(describe_canvas, codes.long(), self.grid, caption, c.caption_length, self.vocabulary)
        question, answer = (self.ids(text) for text in self._question(questions, chance))
        return partial(ask_canvas, codes.long(), self.grid, question, answer, c.answer_length, self.vocabulary)

    def _phrasing(self, captions: list[str], chance: random.Random) -> str:
        return captions[0] if chance.random() < self.settings.canonical_share else chance.choice(captions)

    def _question(self, questions: list[tuple[str, str]], chance: random.Random) -> tuple[str, str]:
        if (wanted := self.settings.yes_no_share) is not None:
            told = [pair for pair in questions if pair[1] in ("yes", "no")]
            if 0 < len(told) < len(questions):
                other = [pair for pair in questions if pair[1] not in ("yes", "no")]
                return chance.choice(told if chance.random() < wanted else other)
        return chance.choice(questions)

    def ids(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.text_ids(text) if text else []
        return self.known[text]


def widened(batch_: RowBatch, width: int, *, pad_id: int) -> RowBatch:
    """The same rows padded on the right to `width` places, as the other parts of their batch are."""
    missing = width - batch_.valid.shape[1]
    if not missing:
        return batch_
    ids, modality, editable, positions, grid = batch_.canvas

    def more(part: Tensor, fill: int) -> Tensor:
        return torch.cat([part, part.new_full((len(part), missing, *part.shape[2:]), fill)], dim=1)

    padding = (more(ids, pad_id), more(modality, 0), more(editable, 0), more(positions, 0), more(grid, -1))
    return RowBatch(Canvas(*padding), more(batch_.valid, 0), batch_.source)

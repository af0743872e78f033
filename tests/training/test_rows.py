"""Which row comes when: tasks by their shares, sources by their weights, parts of one batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.training.rows import Pool, Rows, RowSettings, widened
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=300, image_start=300, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip


@dataclass
class Coded:
    """Rows as the library's coded sources have them."""

    codes: Tensor
    captions: list[list[str]]
    questions: list[list[tuple[str, str]]]
    kinds: list[str]
    sources: list[Tensor | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kinds)


def text_ids(text: str) -> list[int]:
    return [40 + byte for byte in text.encode()]


def pool(name: str, value: int, *, questions=True, captions=True, weight: float = 1.0, edits=()) -> Pool:
    count = 5
    rows = Coded(
        torch.full((count, 2, 2), value),
        [[f"c{n}", f"other {n}"] if captions else [] for n in range(count)],
        [[("q?", "yes")] if questions else [] for _ in range(count)],
        ["single" if n < 2 else "pair" for n in range(count)],
        [torch.full((2, 2), 9) if n in edits else None for n in range(count)],
    )
    return Pool(name, rows, weight)


def rows(*pools: Pool, **settings) -> Rows:
    return Rows(pools, RowSettings(caption_length=6, **settings), text_ids=text_ids, vocabulary=VOCABULARY)


def shares(made: Rows, steps: int = 40) -> dict[str, float]:
    """How often each layout came, by its task word and its number of pictures."""
    names = {(6, 1): "draw", (7, 1): "describe", (8, 1): "ask", (6, 2): "edit"}
    found: dict[str, float] = {}
    for number in range(steps):
        for ids in made.batch(number, 25).canvas.ids:
            name = names[int(ids[1]), int((ids == 4).sum())]
            found[name] = found.get(name, 0) + 1 / (25 * steps)
    return found


def test_a_batch_is_a_function_of_seed_and_number():
    one, other = rows(pool("a", 1)), rows(pool("a", 1))
    assert torch.equal(one.batch(7, 6).canvas.ids, other.batch(7, 6).canvas.ids)
    assert not torch.equal(one.batch(8, 6).canvas.ids, one.batch(7, 6).canvas.ids)
    assert not torch.equal(rows(pool("a", 1), seed=1).batch(7, 6).canvas.ids, one.batch(7, 6).canvas.ids)


def test_the_parts_are_the_batch():
    made = rows(pool("a", 1), pool("b", 2))
    whole = made.batch(3, 6)
    parts = [widened(made.batch(3, 2, part=(n, 3)), whole.valid.shape[1], pad_id=0) for n in range(3)]
    for name, expected in whole.canvas._asdict().items():
        assert torch.equal(torch.cat([getattr(part.canvas, name) for part in parts]), expected), name
    assert torch.equal(torch.cat([part.valid for part in parts]), whole.valid)
    assert [source for part in parts for source in part.source] == whole.source


def test_tasks_come_by_their_shares_and_rows_without_what_a_task_needs_take_the_others():
    assert shares(rows(pool("a", 1))) == pytest.approx({"draw": 0.6, "describe": 0.2, "ask": 0.2}, abs=0.05)
    assert shares(rows(pool("a", 1, questions=False))) == pytest.approx({"draw": 0.75, "describe": 0.25}, abs=0.05)
    assert shares(rows(pool("a", 1, captions=False))) == {"ask": pytest.approx(1.0)}
    assert shares(rows(pool("a", 1, captions=False, questions=False))) == {"draw": pytest.approx(1.0)}
    every = pool("a", 1, edits=range(5))
    expected = {"draw": 0.3, "describe": 0.2, "ask": 0.2, "edit": 0.3}
    assert shares(rows(every, draw_share=0.3, edit_share=0.3)) == pytest.approx(expected, abs=0.05)
    assert "edit" not in shares(rows(pool("a", 1), draw_share=0.3, edit_share=0.3))


def test_questions_of_yes_or_no_come_as_often_as_asked():
    def said(share: float | None, pairs: list[tuple[str, str]]) -> float:
        mixed = pool("a", 1)
        mixed.rows.questions = [pairs] * 5
        made = rows(mixed, draw_share=0.0, describe_share=0.0, yes_no_share=share)
        ids = torch.cat([made.batch(n, 25).canvas.ids for n in range(40)])
        return float((ids == 40 + ord("y")).any(1).float().mean())  # of "yes", and in no other word here

    pairs = [("r?", "yes"), ("s?", "red"), ("t?", "two"), ("u?", "cat")]
    assert said(None, pairs) == pytest.approx(0.25, abs=0.04)
    assert said(0.6, pairs) == pytest.approx(0.6, abs=0.04)
    assert said(0.0, pairs) == 0
    assert said(0.6, pairs[1:]) == 0 and said(0.6, pairs[:1]) == 1  # rows of one kind only


def test_sources_come_by_their_weights_and_singles_only_when_asked():
    made = rows(pool("a", 1, weight=3.0), pool("b", 2))
    drawn = [source for number in range(40) for source in made.batch(number, 25).source]
    assert drawn.count(0) / len(drawn) == pytest.approx(0.75, abs=0.05)
    batch = made.batch(0, 8)
    of_picture = batch.canvas.grid[..., 0] >= 0
    for ids, at, source in zip(batch.canvas.ids, of_picture, batch.source, strict=True):
        assert set(ids[at].tolist()) == {301 + source}
    asked = rows(pool("a", 1), draw_share=0.0, describe_share=1.0).batch(0, 30, singles=True)
    said = {bytes(int(i) - 40 for i in ids[ids >= 40] if i < 300).decode() for ids in asked.canvas.ids}
    assert said == {"c0", "c1"}


def test_the_prompt_is_dropped_as_often_as_asked():
    made = rows(pool("a", 1), draw_share=1.0, describe_share=0.0, prompt_dropout=0.25)
    ids = torch.cat([made.batch(n, 25).canvas.ids[:, 2] for n in range(40)])
    assert float((ids == 3).float().mean()) == pytest.approx(0.25, abs=0.05)  # eos straight after the task word


def test_what_has_no_room_is_refused_at_the_door():
    with pytest.raises(InputError, match=r"longest caption has 2 tokens and the longest answer 3: set caption_length"):
        Rows([pool("a", 1)], RowSettings(caption_length=2), text_ids=text_ids, vocabulary=VOCABULARY)
    with pytest.raises(InputError, match="no rows to train on or a negative weight"):
        rows(pool("a", 1, weight=-1.0))
    other = pool("b", 1)
    other.rows.codes = torch.ones(5, 4, 4).long()
    with pytest.raises(InputError, match="expected one size"):
        rows(pool("a", 1), other)


def test_the_longest_row_is_known_before_it_comes():
    made = rows(pool("a", 1, edits=[0]), draw_share=0.3, edit_share=0.3)
    longest = max(made.batch(n, 25).canvas.ids.shape[1] for n in range(20))
    assert made.longest() == longest == 2 + 6 + len("q?") + 1 + 12  # a question, and the room for its answer

"""Canvases: every interleaving, every padding, every editable mask."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sequence import (
    IMAGE,
    TEXT,
    Canvas,
    ask_canvas,
    batch,
    describe_canvas,
    draw_canvas,
    hide,
    image,
    interleave,
    masked_text,
    text,
)
from mmdlm.vocabulary import Vocabulary

PAD, MASK, BOS, EOS, BOI, EOI, DRAW, DESCRIBE, ASK = range(9)
WORDS = Vocabulary(
    20, 24, 8, mask_id=MASK, bos_id=BOS, eos_id=EOS, pad_id=PAD, boi_id=BOI, eoi_id=EOI, draw_id=DRAW,
    describe_id=DESCRIBE, ask_id=ASK,
)  # fmt: skip
CODES = torch.tensor([[0, 1, 2], [5, 6, 7]])
CODE_IDS = [24, 25, 26, 29, 30, 31]
GRID = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def editable_places(canvas: Canvas) -> list[int]:
    return canvas.editable.nonzero().flatten().tolist()


def assert_consistent(canvas: Canvas) -> None:
    """What holds for every row without padding."""
    length = len(canvas.ids)
    assert [len(part) for part in canvas] == [length] * 5
    assert [part.dtype for part in canvas] == [torch.int64, torch.int64, torch.bool, torch.int64, torch.int64]
    assert canvas.positions.tolist() == list(range(length))
    known = canvas.ids != MASK
    assert torch.equal(WORDS.is_image(canvas.ids)[known], (canvas.modality == IMAGE)[known])
    assert torch.equal((canvas.grid >= 0).all(-1), canvas.modality == IMAGE)
    assert (canvas.grid[canvas.modality == TEXT] == -1).all()


def test_draw():
    canvas = draw_canvas([10, 11], CODES, (2, 3), WORDS)
    assert_consistent(canvas)
    assert canvas.ids.tolist() == [BOS, DRAW, 10, 11, EOS, BOI, *CODE_IDS, EOI]
    assert canvas.modality.tolist() == [TEXT] * 6 + [IMAGE] * 6 + [TEXT]
    assert editable_places(canvas) == list(range(6, 12))
    assert canvas.grid[6:12].tolist() == GRID
    to_make = draw_canvas([10, 11], None, (2, 3), WORDS)
    assert_consistent(to_make)
    assert all(torch.equal(*pair) for pair in zip(to_make, hide(canvas, MASK), strict=True))


def test_draw_without_a_prompt():
    canvas = draw_canvas([], None, (1, 2), WORDS)
    assert canvas.ids.tolist() == [BOS, DRAW, EOS, BOI, MASK, MASK, EOI]


def test_describe():
    canvas = describe_canvas(CODES, (2, 3), [12, 13], 5, WORDS)
    assert_consistent(canvas)
    assert canvas.ids.tolist() == [BOS, DESCRIBE, BOI, *CODE_IDS, EOI, 12, 13, EOS, EOS, EOS]
    assert editable_places(canvas) == [10, 11, 12, 13, 14]
    to_find = describe_canvas(CODES.flatten(), (2, 3), None, 5, WORDS)
    assert all(torch.equal(*pair) for pair in zip(to_find, hide(canvas, MASK), strict=True))
    joint = describe_canvas(None, (2, 3), None, 2, WORDS)
    assert editable_places(joint) == [3, 4, 5, 6, 7, 8, 10, 11]


def test_ask():
    canvas = ask_canvas(CODES, (2, 3), torch.tensor([14]), [15], 3, WORDS)
    assert_consistent(canvas)
    assert canvas.ids.tolist() == [BOS, ASK, BOI, *CODE_IDS, EOI, 14, EOS, 15, EOS, EOS]
    assert editable_places(canvas) == [12, 13, 14]
    to_find = ask_canvas(CODES, (2, 3), [14], None, 3, WORDS)
    assert all(torch.equal(*pair) for pair in zip(to_find, hide(canvas, MASK), strict=True))


def test_an_answer_has_room_for_one_eos():
    assert describe_canvas(CODES, (2, 3), [12, 13], 3, WORDS).ids.tolist()[-3:] == [12, 13, EOS]
    with pytest.raises(InputError, match=r"2 tokens, expected at most 1 .*raise answer_length"):
        describe_canvas(CODES, (2, 3), [12, 13], 2, WORDS)
    assert ask_canvas(CODES, (2, 3), [], [], 1, WORDS).ids.tolist()[-3:] == [EOI, EOS, EOS]


@pytest.mark.parametrize("seed", range(20))
def test_any_interleaving(seed):
    """Random rows of text, masked text and pictures of any grid: every place keeps what its segment said."""
    generator = torch.Generator().manual_seed(seed)

    def draw(stop: int) -> int:
        return int(torch.randint(stop, (), generator=generator))

    segments = []
    for _ in range(1 + draw(6)):
        height, width = 1 + draw(3), 1 + draw(3)
        codes = torch.randint(8, (height, width), generator=generator)
        some = torch.rand(height, width, generator=generator) < 0.5
        segments.append(
            [
                text(torch.randint(9, 20, (draw(5),), generator=generator)),
                text([9, 10, 11], editable=torch.tensor([True, False, True])),
                masked_text(draw(4), WORDS),
                image(codes, height, width, WORDS, editable=some),
                image(None, height, width, WORDS),
            ][draw(5)]
        )
    canvas = interleave(segments)
    assert_consistent(canvas)
    start = 0
    for segment in segments:
        stop = start + len(segment.ids)
        for name, part in segment._asdict().items():
            assert torch.equal(getattr(canvas, name)[start:stop], part)
        start = stop
    assert start == len(canvas.ids)


def test_several_pictures_in_one_row():
    column = image(CODES[:, :1], 2, 1, WORDS)
    canvas = interleave([image(CODES, 2, 3, WORDS), text([9]), column, image(None, 1, 2, WORDS)])
    assert_consistent(canvas)
    assert canvas.ids.tolist() == [BOI, *CODE_IDS, EOI, 9, BOI, 24, 29, EOI, BOI, MASK, MASK, EOI]
    assert canvas.grid[canvas.modality == IMAGE].tolist() == [*GRID, [0, 0], [1, 0], [0, 0], [0, 1]]


def test_inpainting_edits_some_codes_only():
    hole = torch.tensor([[False, True, True], [False, False, True]])
    canvas = interleave([text([9]), image(CODES, 2, 3, WORDS, editable=hole)])
    assert editable_places(canvas) == [3, 4, 7]
    assert hide(canvas, MASK).ids.tolist() == [9, BOI, 24, MASK, MASK, 29, 30, MASK, EOI]
    assert canvas.ids.tolist() == [9, BOI, *CODE_IDS, EOI], "the canvas itself is unchanged"


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch(side):
    rows = [
        draw_canvas([10], CODES, (2, 3), WORDS),
        describe_canvas(CODES[:1], (1, 3), None, 2, WORDS),
        interleave([text([9])]),
    ]
    together, valid = batch(rows, pad_id=PAD, side=side)
    length = max(len(row.ids) for row in rows)
    assert together.ids.shape == valid.shape == (3, length) and together.grid.shape == (3, length, 2)
    assert valid.sum(1).tolist() == [len(row.ids) for row in rows]
    for b, row in enumerate(rows):
        for name, part in row._asdict().items():
            assert torch.equal(getattr(together, name)[b][valid[b]], part), name
        place = 0 if side == "right" else length - len(row.ids)
        assert int(valid[b].int().argmax()) == place and together.positions[b, place] == 0
    padding = ~valid
    assert (together.ids[padding] == PAD).all() and not together.editable[padding].any()
    assert (together.modality[padding] == TEXT).all() and (together.grid[padding] == -1).all()
    assert (together.positions[padding] == 0).all()


def test_batch_of_equal_rows_has_no_padding():
    row = draw_canvas([10], None, (2, 3), WORDS)
    together, valid = batch([row, row], pad_id=PAD)
    assert valid.all() and torch.equal(together.ids, row.ids.expand(2, -1))


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected \[2, 3\] or \[6\]"):
        image(CODES.T, 2, 3, WORDS)
    with pytest.raises(ValueError, match="no image code"):
        image(CODES + 1, 2, 3, WORDS)
    with pytest.raises(ValueError, match="expected bool"):
        image(CODES, 2, 3, WORDS, editable=torch.ones(2, 3))
    with pytest.raises(ValueError, match="no codes"):
        image(None, 2, 3, WORDS, editable=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least 1 x 1"):
        image(None, 0, 3, WORDS)
    with pytest.raises(ValueError, match="expected integers"):
        text(torch.ones(3))
    with pytest.raises(ValueError, match="no draw_id"):
        draw_canvas([9], None, (2, 3), replace(WORDS, draw_id=-1))
    with pytest.raises(ValueError, match="no segment"):
        interleave([])
    with pytest.raises(ValueError, match="no canvas"):
        batch([], pad_id=PAD)
    with pytest.raises(ValueError, match="side"):
        batch([interleave([text([9])])], pad_id=PAD, side="middle")  # type: ignore[arg-type]

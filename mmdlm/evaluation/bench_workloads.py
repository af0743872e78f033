"""What is timed: canvases to be filled, as short as they can be and as the published programs feed them.

    t2i        a picture's codes from a prompt, with guidance (MMaDA, arXiv:2505.15809)
    text       an answer from a prompt, block by block (LLaDA, arXiv:2502.09992)
    describe   a caption from a picture, by a trained model

B rows, L places, E editable places of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm import attention, sequence
from mmdlm.errors import InputError
from mmdlm.evaluation.bench_shapes import Shape
from mmdlm.sequence import Canvas
from mmdlm.vocabulary import Vocabulary

TASKS = ("t2i", "text", "describe")


class Rows(NamedTuple):
    """A canvas [B, L], padded on the left, and its attention mask [B, 1, 1, L], None where nothing is padded."""

    canvas: Canvas
    mask: Tensor | None

    def places(self) -> Tensor:
        """The positions [B, E] of the editable places."""
        return self.canvas.editable.nonzero()[:, 1].view(len(self.canvas.ids), -1)


class Workload(NamedTuple):
    """Rows to fill and how the published loop fills them; `without` and `padded_without` only with guidance."""

    task: str
    rows: Rows
    without: Rows | None
    padded: Rows  # the same rows as a published program feeds them
    padded_without: Rows | None
    columns: tuple[int, int]  # ids that the editable places may take
    mask_id: int
    steps: int
    block: int | None = None
    scale: float = 1.0

    @property
    def tokens(self) -> int:
        """New tokens of a row."""
        return int(self.rows.canvas.editable.sum(dim=1).max())


def picture_workload(
    prompts: Sequence[Sequence[int]],
    grid: tuple[int, int],
    vocabulary: Vocabulary,
    *,
    steps: int,
    scale: float,
    room: int | None = None,
    device: str = "cpu",
) -> Workload:
    """A picture for each prompt, ids [n]. The published rows are all padded to prompts of `room` places (None: to the
    longest), the unprompted ones too."""
    given = [sequence.draw_canvas(ids, None, grid, vocabulary) for ids in prompts]
    empty = [sequence.draw_canvas([], None, grid, vocabulary)] * len(given)
    least = None if room is None else len(empty[0].ids) + room
    padded, tight = _rows(given, vocabulary, device, least), _rows(given, vocabulary, device)
    none, none_tight = _rows(empty, vocabulary, device, padded.canvas.ids.shape[1]), _rows(empty, vocabulary, device)
    guided = scale != 1
    return Workload("t2i", tight, none_tight if guided else None, padded, none if guided else None,
                    vocabulary.image_columns, vocabulary.mask_id, steps, None, scale)


def text_workload(
    prompts: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    *,
    answer: int,
    steps: int,
    block: int | None,
    device: str = "cpu",
) -> Workload:
    """`answer` new tokens behind each prompt, ids [n]."""
    canvases = [
        sequence.interleave([sequence.text(ids), sequence.masked_text(answer, vocabulary)]) for ids in prompts
    ]
    rows = _rows(canvases, vocabulary, device)
    return Workload("text", rows, None, rows, None, vocabulary.text_columns, vocabulary.mask_id, steps, block)


def describe_workload(
    codes: Tensor, grid: tuple[int, int], vocabulary: Vocabulary, *, answer: int, steps: int, device: str = "cpu"
) -> Workload:
    """A caption of `answer` places for each picture, codes int [B, h, w]."""
    canvases = [sequence.describe_canvas(picture.cpu(), grid, None, answer, vocabulary) for picture in codes]
    rows = _rows(canvases, vocabulary, device)
    return Workload("describe", rows, None, rows, None, vocabulary.text_columns, vocabulary.mask_id, steps)


def shape_workload(shape: Shape, task: str, rows: int, seed: int, device: str) -> Workload:
    """The published workload of a shape over random prompts, whose lengths are drawn from the shape's ranges."""
    vocabulary = shape.config.shared_vocabulary
    luck = torch.Generator().manual_seed(seed)
    low, high = shape.prompt if task == "t2i" else shape.given
    lengths = torch.randint(low, high + 1, (rows,), generator=luck).tolist()
    special = {getattr(vocabulary, name) for name in vars(vocabulary) if name.endswith("_id")}
    words = torch.tensor([number for number in range(vocabulary.text_size) if number not in special])
    prompts = [words[torch.randint(len(words), (length,), generator=luck)].tolist() for length in lengths]
    if task == "t2i":
        return picture_workload(prompts, shape.grid, vocabulary, steps=shape.picture_steps, scale=shape.scale,
                                room=shape.room, device=device)
    if task == "text":
        return text_workload(prompts, vocabulary, answer=shape.answer, steps=shape.answer_steps, block=shape.block,
                             device=device)
    raise InputError(f"The task {task!r} needs a trained model, expected t2i or text for a random one.")


def _rows(canvases: Sequence[Canvas], vocabulary: Vocabulary, device: str, least: int | None = None) -> Rows:
    """Rows padded on the left to the longest, or to `least` places; no mask where no row is padded."""
    pad_id = max(vocabulary.pad_id, 0)
    canvas, valid = sequence.batch(canvases, pad_id=pad_id, side="left")
    extra = 0 if least is None else least - canvas.ids.shape[1]
    if extra < 0:
        raise InputError(f"A prompt is longer by {-extra} tokens than the room for it: give shorter ones.")
    ids, modality, editable, positions, grid = canvas
    canvas = Canvas(
        F.pad(ids, (extra, 0), value=pad_id), F.pad(modality, (extra, 0)), F.pad(editable, (extra, 0)),
        F.pad(positions, (extra, 0)), F.pad(grid, (0, 0, extra, 0), value=-1),
    )  # fmt: skip
    mask = attention.full(F.pad(valid, (extra, 0)))
    return Rows(Canvas(*(part.to(device) for part in canvas)), None if mask is None else mask.to(device))

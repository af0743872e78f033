"""From segments of text and pictures to a canvas: ids, and for every place its modality, editability and position.

Any mask is a task: text-to-image, captioning, questions, infilling, inpainting and joint generation are canvases whose
`editable` differs. The shipped model's layouts (a = answer_length):

    draw       bos draw      <prompt> eos          boi <H*W codes> eoi       the codes are editable
    describe   bos describe  boi <codes> eoi       <caption> eos eos ...     the a last places are editable
    ask        bos ask       boi <codes> eoi       <question> eos  <answer> eos eos ...   the a last places are editable
    edit       bos draw      boi <codes> eoi       <prompt> eos    boi <codes> eoi    the second picture's are editable

The eos that fill an answer are targets like any other: by them the model says how long the answer is. B rows, L places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.vocabulary import Vocabulary

TEXT, IMAGE = 0, 1  # the values of `modality`


class Segment(NamedTuple):
    """A run of places, not yet placed: what `text`, `masked_text` and `image` make and `interleave` joins."""

    ids: Tensor  # int64 [n]
    modality: Tensor  # int64 [n]: TEXT or IMAGE; boi and eoi are text
    editable: Tensor  # bool [n]: a sampler may write here, training may corrupt here
    grid: Tensor  # int64 [n, 2]: (row, column) in its picture, -1 where not image


class Canvas(NamedTuple):
    """One row, or a batch of rows: each [L] or [B, L], grid [L, 2] or [B, L, 2]."""

    ids: Tensor  # int64
    modality: Tensor  # int64: TEXT or IMAGE
    editable: Tensor  # bool
    positions: Tensor  # int64: 0, 1, 2 ... from the row's first valid token; 0 at padding
    grid: Tensor  # int64: (row, column) in its picture, -1 where not image


def text(ids: Sequence[int] | Tensor, *, editable: bool | Tensor = False) -> Segment:
    """Text or special ids [n] -> a segment; `editable` for all of them, or bool [n] for each."""
    ids = torch.as_tensor(ids)
    if ids.numel() == 0:
        ids = ids.long()  # torch reads [] as float32
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"text got ids {ids.dtype} {tuple(ids.shape)}, expected integers [n].")
    return _segment(ids.long(), TEXT, editable)


def masked_text(length: int, vocabulary: Vocabulary) -> Segment:
    """`length` masks to be filled in with text."""
    if length < 0:
        raise ValueError(f"masked_text got length {length}, expected at least 0.")
    return text([vocabulary.mask_id] * length, editable=True)


def image(
    codes: Tensor | Sequence[int] | None,
    height: int,
    width: int,
    vocabulary: Vocabulary,
    *,
    editable: bool | Tensor = False,
) -> Segment:
    """A picture of height x width codes, row by row, between boi and eoi (never editable).

    codes: int [height, width] or [height * width], or None for a picture that is all to be made: masked and editable.
    editable: for all codes, or bool of either shape for each (inpainting: `hide` then puts the masks in).
    Raises ValueError for codes or shapes out of range, and where the vocabulary has no boi, eoi or image codes.
    """
    if height < 1 or width < 1:
        raise ValueError(f"image got {height} x {width} codes, expected at least 1 x 1.")
    boi, eoi = _special(vocabulary, "boi_id"), _special(vocabulary, "eoi_id")
    if codes is None:
        if isinstance(editable, Tensor):
            raise ValueError("image got an editable mask but no codes: a place that stays needs a code.")
        ids, editable = torch.full((height * width,), vocabulary.mask_id), True
    else:
        ids = _flat(vocabulary.image_ids(codes), height, width, "codes")
    if isinstance(editable, Tensor):
        editable = _flat(editable, height, width, "editable")
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    inner = _segment(ids, IMAGE, editable)._replace(grid=torch.stack([rows, columns], dim=-1).flatten(0, 1))
    return _join([text([boi]), inner, text([eoi])])


def interleave(segments: Sequence[Segment]) -> Canvas:
    """Segments in reading order -> one row [L], positions 0 to L - 1."""
    joined = _join(segments)
    return Canvas(joined.ids, joined.modality, joined.editable, torch.arange(len(joined.ids)), joined.grid)


def batch(
    canvases: Sequence[Canvas], *, pad_id: int, side: Literal["left", "right"] = "right"
) -> tuple[Canvas, Tensor]:
    """Rows of any lengths -> (a canvas [B, L], valid bool [B, L]), padded with `pad_id` on one side.

    Padding is text, not editable. A row's positions are its own whatever the padding side, so the model's result for a
    row does not depend on its neighbours.
    """
    if side not in ("left", "right"):
        raise ValueError(f"batch got side {side!r}, expected 'left' or 'right'.")
    if not canvases:
        raise ValueError("batch got no canvas, expected at least one.")
    padding = Canvas(*map(torch.tensor, (pad_id, TEXT, False, 0, -1)))
    lengths = torch.tensor([len(canvas.ids) for canvas in canvases])
    places = torch.arange(int(lengths.max()))
    shift = lengths.max() - lengths if side == "left" else torch.zeros_like(lengths)
    valid = (places >= shift[:, None]) & (places < (shift + lengths)[:, None])
    parts = []
    for field, fill in zip(Canvas._fields, padding, strict=True):
        rows = [getattr(canvas, field) for canvas in canvases]
        part = fill.expand(*valid.shape, *rows[0].shape[1:]).clone()
        part[valid] = torch.cat(rows)  # row-major, as the rows are
        parts.append(part)
    return Canvas(*parts), valid


def hide(canvas: Canvas, mask_id: int) -> Canvas:
    """The same canvas with a mask at every editable place: where sampling starts."""
    return canvas._replace(ids=canvas.ids.masked_fill(canvas.editable, mask_id))


def draw_canvas(
    prompt_ids: Sequence[int] | Tensor, codes: Tensor | None, grid: tuple[int, int], vocabulary: Vocabulary
) -> Canvas:
    """Text -> picture. codes int [h, w] or [h * w] are the target in training; None is a picture to be made.

    An empty prompt is the canvas without a condition, for guidance.
    """
    return interleave(
        [
            *_opening("draw_id", vocabulary),
            text(prompt_ids),
            text([_special(vocabulary, "eos_id")]),
            image(codes, *grid, vocabulary, editable=True),
        ]
    )


def edit_canvas(
    source: Tensor,
    prompt_ids: Sequence[int] | Tensor,
    codes: Tensor | None,
    grid: tuple[int, int],
    vocabulary: Vocabulary,
) -> Canvas:
    """Picture and text -> picture: drawing with a picture before the words, so no task word of its own is needed.

    source int [h, w] or [h * w], the picture to be changed; codes likewise, the target, or None to be made.
    """
    return interleave(
        [
            *_opening("draw_id", vocabulary),
            image(source, *grid, vocabulary),
            text(prompt_ids),
            text([_special(vocabulary, "eos_id")]),
            image(codes, *grid, vocabulary, editable=True),
        ]
    )


def describe_canvas(
    codes: Tensor | None,
    grid: tuple[int, int],
    caption_ids: Sequence[int] | Tensor | None,
    answer_length: int,
    vocabulary: Vocabulary,
) -> Canvas:
    """Picture -> caption. caption_ids are the target in training; None is a caption to be found.

    With codes None the picture is to be made as well: joint generation. Raises InputError for a caption that has no
    room in answer_length together with one eos.
    """
    return interleave(
        [
            *_opening("describe_id", vocabulary),
            image(codes, *grid, vocabulary),
            _answer(caption_ids, answer_length, vocabulary),
        ]
    )


def ask_canvas(
    codes: Tensor | None,
    grid: tuple[int, int],
    question_ids: Sequence[int] | Tensor,
    answer_ids: Sequence[int] | Tensor | None,
    answer_length: int,
    vocabulary: Vocabulary,
) -> Canvas:
    """Picture and question -> answer. answer_ids are the target in training; None is an answer to be found.

    Raises InputError for an answer that has no room in answer_length together with one eos.
    """
    return interleave(
        [
            *_opening("ask_id", vocabulary),
            image(codes, *grid, vocabulary),
            text(question_ids),
            text([_special(vocabulary, "eos_id")]),
            _answer(answer_ids, answer_length, vocabulary),
        ]
    )


def _opening(task: str, vocabulary: Vocabulary) -> list[Segment]:
    return [text([_special(vocabulary, "bos_id"), _special(vocabulary, task)])]


def _answer(ids: Sequence[int] | Tensor | None, length: int, vocabulary: Vocabulary) -> Segment:
    """An editable area of `length` places: masks, or ids filled up with eos."""
    if ids is None:
        return masked_text(length, vocabulary)
    ids = torch.as_tensor(ids).long()
    if len(ids) >= length:
        raise InputError(
            f"An answer has {len(ids)} tokens, expected at most {length - 1} (answer_length {length} less one eos): "
            "shorten it or raise answer_length."
        )
    eos = torch.full((length - len(ids),), _special(vocabulary, "eos_id"))
    return text(torch.cat([ids, eos]), editable=True)


def _special(vocabulary: Vocabulary, name: str) -> int:
    value = int(getattr(vocabulary, name))
    if value < 0:
        raise ValueError(f"This model's vocabulary has no {name}, so it has no such layout: compose segments instead.")
    return value


def _segment(ids: Tensor, modality: int, editable: bool | Tensor) -> Segment:
    if isinstance(editable, Tensor):
        if editable.shape != ids.shape or editable.dtype != torch.bool:
            raise ValueError(
                f"editable is {editable.dtype} {tuple(editable.shape)}, expected bool {tuple(ids.shape)}, as the ids."
            )
        editable = editable.to(ids.device)
    else:
        editable = torch.full_like(ids, editable, dtype=torch.bool)
    return Segment(ids, torch.full_like(ids, modality), editable, ids.new_full((len(ids), 2), -1))


def _join(segments: Sequence[Segment]) -> Segment:
    if not segments:
        raise ValueError("interleave got no segment, expected at least one.")
    return Segment(*(torch.cat([part.cpu() for part in parts]) for parts in zip(*segments, strict=True)))


def _flat(values: Tensor, height: int, width: int, name: str) -> Tensor:
    if values.shape not in ((height, width), (height * width,)):
        raise ValueError(
            f"image got {name} of shape {tuple(values.shape)}, expected [{height}, {width}] or [{height * width}]."
        )
    return values.reshape(-1)

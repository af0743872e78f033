"""One id space for text and pictures: text ids, special ids, image codes. The only file that adds or subtracts offsets.

[0, text_size)                            text and special ids, as the text tokenizer gives them
[text_size, image_start)                  unused rows (a published model may pad its embedding); one of them may be the
                                          mask of a model that was born without, or another special id
[image_start, image_start + image_size)   image codes, shifted by image_start
[size, rows)                              unused rows again, where a published model pads the whole table
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

_SPECIAL = ("mask_id", "bos_id", "eos_id", "pad_id", "boi_id", "eoi_id", "draw_id", "describe_id", "ask_id")


@dataclass(frozen=True)
class Vocabulary:
    """Where each kind of id lies. A special id is -1 where a published model has none; every model has a mask.

    Raises ValueError when the parts overlap, when a special id is not below image_start, and when the mask is another
    special id, too.
    """

    text_size: int  # ids [0, text_size): text and special ids, the length of the text tokenizer
    image_start: int  # the first image id, at least text_size
    image_size: int  # the number of image codes
    mask_id: int
    bos_id: int
    eos_id: int
    pad_id: int
    boi_id: int  # begin and end of image
    eoi_id: int
    draw_id: int  # task words: text -> picture, picture -> caption, picture and question -> answer
    describe_id: int
    ask_id: int
    rows: int = 0  # rows of the embedding and of the head where a published model pads them; 0: as many as ids

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"Vocabulary.{field.name} is {value!r}, expected an int.")
        if self.text_size < 1 or self.image_size < 0 or self.image_start < self.text_size:
            raise ValueError(
                f"Vocabulary got text_size {self.text_size}, image_start {self.image_start} and image_size "
                f"{self.image_size}, expected 1 <= text_size <= image_start and image_size >= 0."
            )
        if self.rows and self.rows < self.size:
            raise ValueError(
                f"Vocabulary.rows is {self.rows}, expected 0 or at least the number of ids, {self.size}: a table has a "
                "row for every id."
            )
        for name in _SPECIAL:
            value = getattr(self, name)
            if not (-1 if name != "mask_id" else 0) <= value < self.image_start:
                raise ValueError(
                    f"Vocabulary.{name} is {value}, expected an id below image_start {self.image_start}"
                    + ("." if name == "mask_id" else ", or -1 for none.")
                )
            # pad and eos are one id in many published models, but a mask that means something else cannot be told.
            if name != "mask_id" and value == self.mask_id:
                raise ValueError(f"Vocabulary.{name} and mask_id are both {value}: give the mask an id of its own.")

    @property
    def size(self) -> int:
        """The number of ids, [0, size)."""
        return self.image_start + self.image_size

    @property
    def table_rows(self) -> int:
        """Rows of the embedding and of the head: every id, and the padding of a published model."""
        return self.rows or self.size

    @property
    def text_columns(self) -> tuple[int, int]:
        """(first, stop) of the ids that text places may take."""
        return 0, self.text_size

    @property
    def image_columns(self) -> tuple[int, int]:
        """(first, stop) of the ids that image places may take."""
        return self.image_start, self.size

    def image_ids(self, codes: Tensor | Sequence[int] | int) -> Tensor:
        """Image codes in [0, image_size) of any shape -> ids of the same shape. Raises ValueError outside the range."""
        codes = _integers(codes, "codes")
        _check_range(codes, 0, self.image_size, "image code")
        return codes + self.image_start

    def image_codes(self, ids: Tensor | Sequence[int] | int) -> Tensor:
        """Image ids of any shape -> codes in [0, image_size). Raises ValueError for an id that is no image id."""
        ids = _integers(ids, "ids")
        _check_range(ids, *self.image_columns, "image id")
        return ids - self.image_start

    def is_image(self, ids: Tensor | Sequence[int] | int) -> Tensor:
        """Ids of any shape -> bool of the same shape: is it an image id?"""
        ids = _integers(ids, "ids")
        return (ids >= self.image_start) & (ids < self.size)

    def to_dict(self) -> dict[str, int]:
        """Plain numbers, for a JSON file; `from_dict` is the way back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary whose `to_dict` is `values`. Raises ValueError for missing or unknown keys."""
        names = {field.name for field in fields(cls)}
        values = {"rows": 0, **values}  # what was saved before there was padding has none
        if names != set(values):
            raise ValueError(
                f"A vocabulary has the keys {', '.join(sorted(names))}; missing: "
                f"{', '.join(sorted(names - set(values))) or 'none'}; unknown: "
                f"{', '.join(sorted(set(values) - names)) or 'none'}."
            )
        return cls(**values)


def _integers(values: Tensor | Sequence[int] | int, name: str) -> Tensor:
    """An int64 tensor of `values`; ValueError for floats and bools, which torch would turn into ids in silence."""
    tensor = torch.as_tensor(values)
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.long()  # torch reads [] as float32
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} are {tensor.dtype}, expected integers.")
    return tensor.long()


def _check_range(values: Tensor, first: int, stop: int, what: str) -> None:
    if values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < first or high >= stop:
        wrong = low if low < first else high
        raise ValueError(f"{wrong} is no {what}, expected one in [{first}, {stop}).")

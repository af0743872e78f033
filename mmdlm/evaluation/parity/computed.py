"""What each forward of a model with a cache computed: the ids of the computed places, in order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Computed(NamedTuple):
    """One forward, of rows that all compute equally many places: b rows, L places of the canvas, Q computed ones."""

    ids: Tensor  # [b, Q]
    places: Tensor  # bool [b, L]


@contextmanager
def computed_by(model: nn.Module) -> Iterator[list[Computed]]:
    """A list that every forward of `model` appends to as long as the context lasts; without a cache all is computed."""
    passes: list[Computed] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else keywords["input_ids"]
        places = keywords.get("computed")
        places = torch.ones_like(ids, dtype=torch.bool) if places is None else places
        passes.append(Computed(ids[places].view(len(ids), -1), places))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()

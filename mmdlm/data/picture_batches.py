"""Batches of pictures by number, for the training of a visual tokenizer: out of a picture world or of any pictures.

Picture k of a source is a pure function of the settings and k, without end, so that a resumed run sees what the
uninterrupted one would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mmdlm.data.coded_sources import is_picture_world
from mmdlm.data.paired import PairedData, open_pictures, split_pairs
from mmdlm.data.picture_contents import picture
from mmdlm.data.scenes import PictureWorld
from mmdlm.errors import InputError
from mmdlm.picture_reading import fit_square

_KEPT = 2**30  # bytes of pictures that are kept in memory once they have been decoded


class Batches(Protocol):
    """`batch(numbers)` -> pixels float32 [len(numbers), 3, S, S] in [-1, 1]; `size`: how many, None: endless."""

    size: int | None

    def batch(self, numbers: Sequence[int]) -> Tensor: ...


class Halves(NamedTuple):
    train: Batches
    held_out: Batches


def open_batches(
    source: str, *, side: int, held_out_share: float, seed: int, fit: str = "pad", world: dict[str, Any]
) -> Halves:
    """Training and held-out pictures of `source`, `side` pixels square.

    source: a picture world (`world`: its other settings), or anything that `open_pairs` takes, with words or without;
    of those a share is held out, chosen by the pixels. Prints one line where pictures are left out. Raises InputError
    where there is nothing to train on.
    """
    if is_picture_world(Path(source)):
        settings = {"resolution": side, **world}
        train, held_out = (PictureWorld(source, split=split, **settings) for split in ("train", "held_out"))
        return Halves(WorldBatches(train), WorldBatches(held_out))
    data = open_pictures(source)
    if data.problems:
        where, reason = data.problems[0]
        print(f"{source}: {len(data.problems)} pictures left out, the first at {where}: {reason}", flush=True)
    halves = split_pairs(_once(data), held_out_share=held_out_share, seed=seed)
    if not all(map(len, halves)):
        raise InputError(f"{source} has {len(data)} pictures, expected some to train on and some to hold out.")
    return Halves(FolderBatches(halves[0], side, seed, fit), FolderBatches(halves[1], side, seed, fit))


class WorldBatches:
    """Scenes of a picture world: number k is the scene with seed k."""

    size: int | None = None

    def __init__(self, world: PictureWorld) -> None:
        self.world = world

    def batch(self, numbers: Sequence[int]) -> Tensor:
        return _pixels([self.world.scene(number).image for number in numbers])


class FolderBatches:
    """Pictures of a folder, epoch after epoch, each in an order of its own; the first epoch of number 0 on."""

    def __init__(self, data: PairedData, side: int, seed: int, fit: str) -> None:
        self.data, self.side, self.seed, self.fit = data, side, seed, fit
        self.size: int | None = len(data)
        self.kept: dict[int, np.ndarray] = {}
        self.epoch, self.order = -1, list[int]()

    def batch(self, numbers: Sequence[int]) -> Tensor:
        return _pixels([self._picture(number) for number in numbers])

    def _picture(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, len(self.data))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, list(range(len(self.data)))
            random.Random(f"{self.seed}-{epoch}").shuffle(self.order)
        n = self.order[place]
        if n in self.kept:
            return self.kept[n]
        found = np.asarray(fit_square(picture(self.data.rows[n].image), self.side, self.fit))
        if len(self.data) * found.nbytes <= _KEPT:
            self.kept[n] = found
        return found


def _once(data: PairedData) -> PairedData:
    """Each different picture once, whatever number of rows it has."""
    firsts = {found: number for number, found in reversed(list(enumerate(data.hashes)))}
    return data.subset(sorted(firsts.values()))


def _pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1

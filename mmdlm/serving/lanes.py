"""Lanes: a core each, with a step loop of its own over a part of the rows.

A small model's operations are too short to be shared by several cores: two threads of one operation wait for each
other longer than they compute. Rows are independent, so lanes need not wait for each other at all: each makes its own
steps, and at the end of one takes its share of the rows that no other lane is at. A lane that is at work alone gets all
cores, and so does everything on an accelerator, where one large forward is best.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from mmdlm.models.mask_predictor import MaskPredictor

T = TypeVar("T")


class Lanes:
    """`count` lanes with a model each; they share one set of weights. None: one for each of torch's threads."""

    def __init__(self, model: MaskPredictor, count: int | None = None) -> None:
        self.cores = torch.get_num_threads()
        if count is None:
            count = self.cores if model.device.type == "cpu" else 1
        # A module of its own, since the hooks that choose rows' adapters are the module's and not the call's.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.models = [model, *(copy.deepcopy(model, dict(shared)) for _ in range(count - 1))]
        self._threads = threading.local()

    def share_cores(self, busy: int) -> None:
        """The calling thread's operations may use the cores' share of one of `busy` lanes that are at work."""
        threads = max(1, self.cores // busy)
        if getattr(self._threads, "count", self.cores) != threads:
            torch.set_num_threads(threads)
            self._threads.count = threads


def fair_share(free: Sequence[T], taken: Iterable[T], size: Callable[[T], int], lanes: int) -> list[T]:
    """What a lane takes of the `free` items, in their order: a lane's share of all sizes, as near as items allow.

    At least one, where there is one; `taken` are those that other lanes are at.
    """
    share = (sum(map(size, free)) + sum(map(size, taken))) / lanes
    mine: list[T] = []
    total = 0.0
    for item in free:
        if mine and total + size(item) / 2 > share:
            break
        mine.append(item)
        total += size(item)
    return mine

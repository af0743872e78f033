"""Lanes: a step's rows shared out over the cores, each part with a forward of its own, side by side.

A small model's operations are too short to be shared by several cores: two threads of one operation wait for each
other longer than they compute. Rows are independent, so their parts need not wait: with two or more of them a lane
takes one core. A single part gets all cores, and so does everything on an accelerator, where one large forward is best.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from mmdlm.models.mask_predictor import MaskPredictor

T = TypeVar("T")
R = TypeVar("R")


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
        self._pool = ThreadPoolExecutor(count - 1, "mmdlm-lane") if count > 1 else None

    def run(self, work: Callable[[MaskPredictor, T], R], parts: Sequence[T]) -> list[R]:
        """`work` on each part, at most one for a lane, the first of them in this thread."""
        threads = max(1, self.cores // len(parts))

        def within(model: MaskPredictor, part: T) -> R:
            if getattr(self._threads, "count", self.cores) != threads:
                torch.set_num_threads(threads)
                self._threads.count = threads
            return work(model, part)

        pairs = list(zip(self.models[: len(parts)], parts, strict=True))
        others = [self._pool.submit(within, *pair) for pair in pairs[1:]] if self._pool is not None else []
        return [within(*pairs[0]), *(other.result() for other in others)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def share_out(items: Sequence[T], size: Callable[[T], tuple[int, int]], most: int) -> list[list[T]]:
    """`items` of (rows, length) each in at most `most` parts of about as many tokens, alike lengths together.

    A part's rows are padded to its longest, so a short one had better not stand beside a long one.
    """
    ordered = sorted(items, key=lambda item: size(item)[1])
    tokens = [rows * length for rows, length in map(size, ordered)]
    most, total, before = min(most, len(ordered)), sum(tokens), 0
    parts: list[list[T]] = [[] for _ in range(most)]
    for item, count in zip(ordered, tokens, strict=True):
        parts[min(most - 1, int((before + count / 2) * most / total))].append(item)  # by where its middle lies
        before += count
    return [part for part in parts if part]

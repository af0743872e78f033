"""Weighted mixtures of several sources, without end, that go on exactly where they were stopped.

Which source item k comes from is a pure function of the seed and k. A source that can be indexed is gone through in an
order of its own for every epoch; one that can only be streamed is read in blocks that are put in an order of their own,
so that a stop in the middle of a block costs reading that block again and nothing else. (A shuffle buffer, as datasets
has it, cannot be resumed exactly: what lay in it is lost.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mmdlm.data.paired import Pair, checked
from mmdlm.data.paired_sources import find_records
from mmdlm.errors import InputError


class Indexed(Protocol):
    """`PairedData`, a list, a datasets.Dataset: known length, any item at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...


@runtime_checkable
class Streamed(Protocol):
    """`PairStream`, a datasets.IterableDataset: items in their order, and the state between two of them."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Drawn(NamedTuple):
    """`source`: the number of the source in the mixture; `item`: what it gave."""

    source: int
    item: Any


class PairStream:
    """The pairs of a source one after the other, without reading all of it first; broken rows are passed over.

    As `open_pairs` otherwise. Its state is the number of records read; going on reads past them without decoding.
    """

    def __init__(self, source: str | Path, *, split: str = "train") -> None:
        self.source, self.split, self.number = source, split, 0

    def __iter__(self) -> Iterator[Pair]:
        start, self.number = self.number, 0
        for record in find_records(self.source, split=self.split):
            self.number += 1
            if self.number > start:
                yield from checked([record], name=str(self.source))
        self.number = 0

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = int(state["number"])


class Mixture:
    """An iterator over `sources` by weight, without end: `Drawn(source, item)`.

    Args:
        sources: pairs of a source and its weight above 0; a weight says how many of the items come from it, whatever
            its size. Sources that can be indexed are so; others are streamed.
        seed: of which source comes, and of the orders.
        block: items of a streamed source that are read and put in an order at once; 1 keeps its own order.
        process_index, processes: this process takes every `processes`-th item of the one sequence.

    `state_dict()` is small, as JSON can hold it, and after `load_state_dict` of it, in another process too, the items
    are those that would have come. Raises InputError for weights, sizes or a state that do not fit.
    """

    def __init__(
        self, sources: Sequence[tuple[Indexed | Streamed, float]], *, seed: int = 0, block: int = 256,
        process_index: int = 0, processes: int = 1,
    ) -> None:
        if not sources or not all(0 < weight < float("inf") for _, weight in sources):
            raise InputError(f"the weights are {[weight for _, weight in sources]}, expected one above 0 or more.")
        self.weights = [float(weight) for _, weight in sources]
        self.seed, self.block = seed, block
        self.process_index, self.processes = process_index, processes
        self.number = 0
        self.parts: list[_Indexed | _Streamed] = [
            _Indexed(source, f"{seed}-{n}") if hasattr(source, "__getitem__") and hasattr(source, "__len__")
            else _Streamed(source, f"{seed}-{n}", block)  # type: ignore[arg-type]
            for n, (source, _) in enumerate(sources)
        ]  # fmt: skip

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        while True:
            chosen = random.Random(f"{self.seed}-{self.number}").choices(range(len(self.parts)), self.weights)[0]
            mine = self.number % self.processes == self.process_index
            self.number += 1
            if mine:
                return Drawn(chosen, self.parts[chosen].next())
            self.parts[chosen].skip()

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, between two items."""
        settings = {"seed": self.seed, "weights": self.weights, "block": self.block, "processes": self.processes}
        return {"number": self.number, "settings": settings, "sources": [part.state() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        own = self.state_dict()
        sizes = [[part.get("size") for part in found["sources"]] for found in (state, own)]
        if state["settings"] != own["settings"] or sizes[0] != sizes[1]:
            raise InputError(
                f"the state is of a mixture with {state['settings']} over sources of {sizes[0]} items, this one has "
                f"{own['settings']} and {sizes[1]}: continue with the data and settings it was begun with."
            )
        self.number = int(state["number"])
        for part, saved in zip(self.parts, state["sources"], strict=True):
            part.restore(saved)


class _Indexed:
    def __init__(self, source: Any, seed: str) -> None:
        if not len(source):
            raise InputError("a source of the mixture has no items, expected at least one: leave it out.")
        self.source, self.seed, self.taken = source, seed, 0
        self.epoch, self.order = -1, list[int]()

    def next(self) -> Any:
        epoch, place = divmod(self.taken, len(self.source))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, _order(f"{self.seed}-{epoch}", len(self.source))
        self.taken += 1
        return self.source[self.order[place]]

    def skip(self) -> None:
        self.taken += 1

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "size": len(self.source)}

    def restore(self, saved: dict[str, Any]) -> None:
        self.taken = int(saved["taken"])


class _Streamed:
    """`before`: the stream's state at the start of the block that is being given, from which it can be read again."""

    def __init__(self, source: Streamed, seed: str, block: int) -> None:
        self.source, self.seed, self.block = source, seed, block
        self.fresh = source.state_dict()
        self.before, self.blocks, self.offset = self.fresh, 0, 0
        self.items: list[Any] | None = None
        self.stream: Iterator[Any] | None = None

    def next(self) -> Any:
        if self.items is None:
            self.source.load_state_dict(self.before)
            self.stream = iter(self.source)
            self._read()
        elif self.offset == len(self.items):
            self.before, self.blocks, self.offset = self.source.state_dict(), self.blocks + 1, 0
            self._read()
        assert self.items is not None
        self.offset += 1
        return self.items[self.offset - 1]

    def skip(self) -> None:
        self.next()

    def _read(self) -> None:
        """The next block in its order; a stream that has ended begins again, with the block cut short at its end."""
        found: list[Any] = []
        for again in (False, True):
            if again:
                self.before = self.fresh
                self.source.load_state_dict(self.fresh)
                self.stream = iter(self.source)
            assert self.stream is not None
            for item in self.stream:
                found.append(item)
                if len(found) == self.block:
                    break
            if found:
                break
        else:
            raise InputError("a streamed source of the mixture gave no items, expected at least one: leave it out.")
        self.items = [found[n] for n in _order(f"{self.seed}-{self.blocks}", len(found))]

    def state(self) -> dict[str, Any]:
        return {"before": self.before, "blocks": self.blocks, "offset": self.offset}

    def restore(self, saved: dict[str, Any]) -> None:
        self.before, self.blocks = saved["before"], int(saved["blocks"])
        self.items = None
        offset = int(saved["offset"])
        if offset:
            self.next()
        self.offset = offset


def _order(seed: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order

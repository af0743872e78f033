"""An evaluation's cases shared among processes, kept on disk as they come, and put together exactly.

    accelerate launch --num_processes 2 "$(which mmdlm)" eval vqa ...      # or torchrun, or SLURM's srun

The cases are cut into batches by their number, whatever the number of processes; process r of n takes the batches
r, r + n, r + 2n, ... and appends each as one line, in one write, to a file of its own, OUT/parts/NAME.RANK.jsonl. A
batch is made by the same work on the same cases everywhere, so that what two processes find is, to the last bit, what
one finds (with as many threads: OMP_NUM_THREADS), and what a killed run goes on to is what it would have come to.
Batches are looked for in the files of all processes: a run may be taken up by fewer or more of them.

Nothing is sent between processes. They need the same directory; the first waits until all batches are in it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mmdlm.errors import InputError

Case = TypeVar("Case")
Row = dict[str, Any]
PARTS = "parts"
_WAIT = 0.2  # seconds between two looks for the batches of other processes


class Share(NamedTuple):
    """Which process this is, of how many."""

    rank: int
    processes: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def share() -> Share:
    """This process's share, as accelerate launch and torchrun say it in RANK and WORLD_SIZE; (0, 1) alone.

    With CUDA each process of a machine gets a device of its own. Raises InputError for numbers that do not fit.
    """
    rank, processes = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not rank.isdecimal() or not processes.isdecimal() or int(rank) >= int(processes):
        raise InputError(
            f"RANK is {rank!r} and WORLD_SIZE {processes!r}, expected a rank below the number of processes: start "
            "them with accelerate launch, or unset both."
        )
    found = Share(int(rank), int(processes))
    torch = sys.modules.get("torch")  # who computes has it
    if found.processes > 1 and torch is not None and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return found


def run_batches(
    out: Path,
    name: str,
    cases: Sequence[Case],
    work: Callable[[list[int], list[Case]], Sequence[Row]],
    *,
    batch_size: int,
    begun_with: Mapping[str, Any],
    progress: bool = True,
) -> list[Row] | None:
    """One row, plain JSON, for every case, in their order; None in every process but the first.

    work(numbers, cases) -> rows of one batch; it may depend on the cases and their numbers only, not on what came
    before. begun_with: everything that the rows depend on; `batch_size` and the number of cases are added.

    Raises InputError where the directory was begun with something else, and ValueError for rows that are not as many
    as the cases.
    """
    mine = share()
    kept = _Kept(out / PARTS, name, mine.rank, {**begun_with, "cases": len(cases), "batch_size": batch_size})
    numbers = [list(range(start, min(start + batch_size, len(cases)))) for start in range(0, len(cases), batch_size)]
    left = [batch for batch in range(mine.rank, len(numbers), mine.processes) if batch not in kept.rows]
    with _bar(name, len(cases), progress and mine.is_main) as bar:
        bar.update(kept.cases())
        for batch in left:
            rows = list(work(numbers[batch], [cases[number] for number in numbers[batch]]))
            if len(rows) != len(numbers[batch]):
                raise ValueError(f"{name} got {len(rows)} rows for {len(numbers[batch])} cases, expected one for each")
            kept.add(batch, rows)
            bar.update(kept.cases() - bar.n)
        if not mine.is_main:
            return None
        while len(kept.rows) < len(numbers):
            time.sleep(_WAIT)
            kept.look()
            bar.update(kept.cases() - bar.n)
    return [row for batch in range(len(numbers)) for row in kept.rows[batch]]


class _Kept:
    """The batches on disk: this process's file, and those of all others as far as they are written."""

    def __init__(self, folder: Path, name: str, rank: int, settings: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.name = folder, name
        self.settings = json.loads(json.dumps(dict(settings)))
        self.rows: dict[int, list[Row]] = {}
        self.read: dict[Path, int] = {}  # how much of each file is known, in bytes
        self.own = folder / f"{name}.{rank}.jsonl"
        # A line that a kill cut short is made again. Only the writer may cut its file.
        if self.own.is_file() and (content := self.own.read_bytes()) and not content.endswith(b"\n"):
            os.truncate(self.own, content.rfind(b"\n") + 1)
        if not self.own.is_file() or not self.own.stat().st_size:
            self._append(self.settings)
        self.look()

    def add(self, batch: int, rows: Sequence[Row]) -> None:
        self._append({"batch": batch, "rows": rows})
        self.look()

    def cases(self) -> int:
        return sum(map(len, self.rows.values()))

    def look(self) -> None:
        """Read what is new in the files of all processes; a last line that has no end yet is left for later."""
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            if not path.name[len(self.name) + 1 : -len(".jsonl")].isdecimal():
                continue  # of another name that begins alike
            with path.open("rb") as file:
                file.seek(self.read.get(path, 0))
                lines = file.read().split(b"\n")[:-1]
            for line in lines:
                self._take(path, json.loads(line), first=self.read.get(path, 0) == 0)
                self.read[path] = self.read.get(path, 0) + len(line) + 1

    def _take(self, path: Path, line: dict[str, Any], *, first: bool) -> None:
        if not first:
            # A Python float survives JSON to the bit; what this process made is read back too, so that all are alike.
            self.rows[int(line["batch"])] = line["rows"]
        elif line != self.settings:
            other = sorted(key for key in {*line, *self.settings} if line.get(key) != self.settings.get(key))
            raise InputError(
                f"{path} was begun with other settings ({', '.join(other)}): delete {self.folder.parent}, or give "
                "another output directory."
            )

    def _append(self, line: Mapping[str, Any]) -> None:
        """One write to the end of the file, on disk when it returns."""
        content = json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self.own.open("ab", buffering=0) as file:
            file.write(content)
            os.fsync(file.fileno())


def _bar(name: str, total: int, shown: bool) -> Any:
    from tqdm import tqdm

    # None: tqdm is silent where stderr is no terminal.
    return tqdm(total=total, desc=name, unit="cases", leave=False, disable=None if shown else True)

"""What eval/pictures writes while it measures: run.json, results.json, results.md, rows.jsonl, sheets of pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdlm import __version__
from mmdlm.evaluation.picture_tables import page
from mmdlm.evaluation.processes import run_batches
from mmdlm.evaluation.sheets import Exhibit, labelled_sheet
from mmdlm.picture_files import png, write_whole

_SHEET = 48  # pictures: eight columns, six rows


class Report:
    """Results on disk after every part. `run`: what makes them again; `begun_with`: what single cases depend on.

    Processes but the first only do their share of the cases.
    """

    def __init__(
        self, out: Path, run: Mapping[str, Any], *, begun_with: Mapping[str, Any], batch_size: int, is_main: bool
    ) -> None:
        self.out, self.run, self.is_main, self.started = out, dict(run), is_main, time.monotonic()
        self.begun_with, self.batch_size = begun_with, batch_size
        self.parts: dict[str, dict[str, Any]] = {}
        # What every picture of the run says of itself.
        self.facts = {"seed": run["seed"], "model_hash": run["model"]["hash"], "mmdlm_version": __version__}
        if is_main:
            (self.out / "rows.jsonl").unlink(missing_ok=True)
            write_whole(self.out / "run.json", json.dumps(run, indent=1).encode())

    def run_batches(self, name: str, cases: Sequence[Any], work: Callable[..., Any]) -> list[dict[str, Any]] | None:
        """Rows of all cases, kept in `out` as they come; None but in the first process."""
        keeping: dict[str, Any] = {"batch_size": self.batch_size, "begun_with": self.begun_with}
        return run_batches(self.out, name, cases, work, **keeping)

    def add(self, part: str, name: str, counted: dict[str, Any]) -> None:
        self.parts.setdefault(part, {})[name] = counted
        self._write()

    def note(self, part: str, name: str, content: Any) -> None:
        self.parts[part].setdefault("notes", {})[name] = content
        self._write()

    def row(self, part: str, name: str, number: int, score: bool, **case: Any) -> None:
        """One case, by which two runs are compared in pairs."""
        row = {"id": f"{part}/{name}/{number}", "score": float(score), "part": part, "set": name, **case}
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sheet(self, name: str, exhibits: Sequence[Exhibit]) -> None:
        content = png(labelled_sheet(exhibits[:_SHEET]), {"what": name, **self.facts})
        write_whole(self.out / f"{slug(name)}.png", content)

    def finish(self) -> None:
        """run.json counts as finished when the results are in it."""
        if not self.is_main:
            return
        seconds = round(time.monotonic() - self.started)
        finished = self.run | {"seconds": seconds, "results": self.parts}
        write_whole(self.out / "run.json", json.dumps(finished, indent=1, ensure_ascii=False).encode())
        print(page(self._whole()))
        print(f"\nwritten to {self.out}: run.json, results.json, results.md, rows.jsonl, pictures, sheets")

    def _whole(self) -> dict[str, Any]:
        return {"run": self.run, "seconds": round(time.monotonic() - self.started), **self.parts}

    def _write(self) -> None:
        write_whole(self.out / "results.json", json.dumps(self._whole(), indent=1, ensure_ascii=False).encode())
        write_whole(self.out / "results.md", (page(self._whole()) + "\n").encode())


def slug(name: str) -> str:
    """The name as a part of a file name."""
    return name.replace(",", "").replace(" ", "-")

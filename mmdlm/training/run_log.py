"""A run's numbers on disk: `metrics.jsonl` (one line a report), a curve sheet, and a line on the terminal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class RunLog:
    """Appends metrics to `<run>/metrics.jsonl` and prints them; silent where `enabled` is False (other processes)."""

    def __init__(
        self,
        run: Path,
        *,
        step: int = 0,
        enabled: bool = True,
        also: Callable[[dict[str, float], int], None] | None = None,
    ):
        self.path, self.enabled, self.started, self.also = run / "metrics.jsonl", enabled, time.monotonic(), also
        if enabled:
            run.mkdir(parents=True, exist_ok=True)
            kept = [json.dumps(row) + "\n" for row in read_metrics(run) if row["step"] <= step]
            beside = self.path.with_name(f".{self.path.name}")
            beside.write_text("".join(kept))
            os.replace(beside, self.path)

    def write(self, step: int, details: Mapping[str, float] | None = None, **numbers: float) -> None:
        """One report: every number rounded to six significant digits; `details` are written and not printed."""
        if not self.enabled:
            return
        row = {"step": step, "seconds": round(time.monotonic() - self.started, 1)}
        row |= {name: float(f"{value:.6g}") for name, value in numbers.items()}
        line = "  ".join(f"{name} {value:g}" for name, value in row.items())
        row |= {name: float(f"{value:.6g}") for name, value in (details or {}).items()}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.also is not None:
            self.also({name: value for name, value in row.items() if name not in ("step", "seconds")}, step)
        print(line, flush=True)


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of `<run>/metrics.jsonl` as dicts; a last line that a kill cut short is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def plot_curves(run: Path) -> Path | None:
    """Draws the metrics of `metrics.jsonl` over steps into `<run>/curves.png`, details (with a "/" in their name) left
    out; None without matplotlib or lines."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return None
    rows = read_metrics(run)
    names = sorted(name for name in {n for row in rows for n in row} - {"step", "seconds"} if "/" not in name)
    if not names:
        return None
    columns = 3
    height = -(-len(names) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(4.2 * columns, 2.6 * height), squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(row["step"], row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), linewidth=1.2)
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    target = run / "curves.png"
    figure.savefig(target, dpi=90)
    plt.close(figure)
    return target

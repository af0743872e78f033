"""run.json: all that makes an evaluation's numbers again, beside the numbers; and two evaluations held together.

A directory of an evaluation holds run.json (command, seed, settings, versions, checkpoint hash, hardware, results) and,
where single cases have a score, rows.jsonl with {"id", "score", ...} for each, by which runs are compared in pairs.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmdlm import __version__
from mmdlm.errors import InputError
from mmdlm.evaluation.intervals import Z95
from mmdlm.evaluation.result_files import read_json, read_jsonl, unique, write_json, write_jsonl

RUN, ROWS = "run.json", "rows.jsonl"
_LIBRARIES = ("torch", "transformers", "diffusers", "numpy", "pillow", "torch-fidelity", "pycocoevalcap", "lpips")


def check_new(out: Path) -> None:
    """Make the directory `out`. Raises InputError where a run was written already, or nothing can be."""
    if (out / RUN).exists():
        raise InputError(f"{out} holds a finished run ({RUN}): give another directory, or delete it.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} cannot be made ({error.strerror}): choose another directory.") from error


def write_run(
    out: Path,
    *,
    kind: str,
    command: Sequence[str],
    seed: int,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    seconds: float = 0.0,
    rows: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write rows.jsonl, then run.json: the run counts as finished when that is there."""
    if rows:
        write_jsonl(out / ROWS, rows)
    versions = {"mmdlm": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    content = {
        "kind": kind,
        "command": list(command),
        "seed": seed,
        "settings": dict(settings),
        "model": None if model is None else dict(model),
        "versions": versions,
        "hardware": _hardware(settings.get("device")),
        "seconds": round(seconds, 1),
        "results": dict(results),
    }
    write_json(out / RUN, content)


def read_run(path: Path) -> dict[str, Any]:
    """A run.json, or that of a directory. Raises InputError where it is none."""
    file = path / RUN if path.is_dir() else path
    content = read_json(file)
    missing = {"kind", "command", "results"} - set(content) if isinstance(content, dict) else {"kind"}
    if missing:
        raise InputError(f"{file} is no run of `mmdlm eval`, it has no {min(missing)!r}: give the run.json of one.")
    found: dict[str, Any] = content
    return found


def differences(one: Any, other: Any, *, tolerance: float = 1e-6, name: str = "results") -> list[str]:
    """What differs between two runs' results, one line each; numbers within a relative `tolerance` are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(key for key in other if key not in one)]
        return [
            line
            for key in names
            for line in differences(one.get(key), other.get(key), tolerance=tolerance, name=f"{name}.{key}")
        ]
    numbers = all(isinstance(value, (int, float)) for value in (one, other))
    same = math.isclose(one, other, rel_tol=tolerance, abs_tol=tolerance) if numbers else one == other
    return [] if same else [f"{name}: {one} then, {other} now"]


def compare_runs(
    first: Path, second: Path, *, score: str = "score", resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Second less first, with the 95 % interval of a bootstrap over the cases that both scored, in pairs.

    Runs without single cases (sets of pictures) are compared by their numbers' own errors. Raises InputError for runs
    of different kinds, of different cases, or with nothing to compare.
    """
    runs = [read_run(path) for path in (first, second)]
    if runs[0]["kind"] != runs[1]["kind"]:
        raise InputError(f"The runs are of {runs[0]['kind']} and of {runs[1]['kind']}, expected two of one kind.")
    found: dict[str, Any] = {"kind": runs[0]["kind"], "first": str(first), "second": str(second)}
    files = [(path if path.is_dir() else path.parent) / ROWS for path in (first, second)]
    if all(file.is_file() for file in files):
        return found | _paired(files, score, resamples, seed)
    return found | {"by_error": _by_error(*(run["results"] for run in runs))}


def _paired(files: Sequence[Path], score: str, resamples: int, seed: int) -> dict[str, Any]:
    scored = [unique(((str(row.get("id")), row.get(score)) for row in read_jsonl(file)), file) for file in files]
    if scored[0].keys() != scored[1].keys():
        apart = scored[0].keys() ^ scored[1].keys()
        raise InputError(
            f"{files[0]} and {files[1]} are not of the same cases, {len(apart)} are in one only, {min(apart)!r} for "
            "one: compare runs over the same questions or pictures."
        )
    pairs = [(scored[0][key], scored[1][key]) for key in scored[0]]
    known = np.array([pair for pair in pairs if None not in pair], dtype=np.float64)
    if len(known) < 2:
        raise InputError(f"{files[0]} and {files[1]} share {len(known)} cases with a {score!r}, expected at least two.")
    gain = known[:, 1] - known[:, 0]
    draw = np.random.default_rng(seed)
    means = [gain[draw.integers(len(gain), size=len(gain))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {
        "score": score,
        "cases": len(known),
        "first_mean": float(known[:, 0].mean()),
        "second_mean": float(known[:, 1].mean()),
        "difference": float(gain.mean()),
        "low": float(low),
        "high": float(high),
        "better": int((gain > 0).sum()),
        "worse": int((gain < 0).sum()),
        "without_score": len(pairs) - len(known),
    }


def _by_error(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Every number X that has an X_error in both: the difference, and its interval as if both were independent."""
    found = {}
    for name in one:
        own, its = one.get(f"{name}_error"), other.get(f"{name}_error")
        if own is None or its is None or name not in other:
            continue
        gap, error = other[name] - one[name], math.hypot(own, its)
        found[name] = {
            "first": one[name], "second": other[name], "difference": gap,
            "low": gap - Z95 * error, "high": gap + Z95 * error,
        }  # fmt: skip
    if not found:
        raise InputError("The runs have neither scores of single cases nor numbers with an error: nothing to compare.")
    return found


def plot_comparison(found: Mapping[str, Any], path: Path) -> None:
    """Draw `compare_runs`: the difference with its interval, for each number; a line at no difference."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = found.get("by_error") or {found["score"]: found}
    figure = Figure(figsize=(7, 1.3 + 0.5 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, bar in enumerate(bars.values()):
        axes.plot([bar["low"], bar["high"]], [place, place], color="#2563c9", linewidth=2)
        axes.plot([bar["difference"]], [place], "o", color="#2563c9")
    axes.axvline(0, color="#808080", linewidth=1)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlabel("second less first, 95 % interval")
    axes.set_title(f"{found['kind']}: {found['second']} less {found['first']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _hardware(device: Any) -> str:
    on = f"{platform.machine()} CPU"
    torch = sys.modules.get("torch")
    if torch is None:
        return on
    if str(device or "").startswith("cuda"):
        on = torch.cuda.get_device_name()
    return f"{on}, {torch.get_num_threads()} threads"

"""Settings against the plain published loop, in one run: time, forwards, tokens per forward, memory, equal tokens.

A pair is one run of the plain loop and one of a setting, one right before or after the other, so that a busy machine
slows both; a setting's ratio is plain seconds over its own, one for each pair. Exact settings must give the plain
loop's tokens; of the approximate ones the share of equal tokens is told.

A forward is a pass of the loop: with guidance it is one of both canvases. B rows, E editable places of a row.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.evaluation.bench_workloads import Workload
from mmdlm.evaluation.plain_loops import plain
from mmdlm.evaluation.sampling_settings import PLAIN, Levers, Sampling, fitted, sampled

LAST_EXACT = "all exact levers"


class Setting(NamedTuple):
    """One line of the table."""

    name: str
    exact: bool
    sampling: Sampling


class Row(NamedTuple):
    """What was found of a setting; the plain loop is one too, of ratio 1."""

    name: str
    exact: bool
    seconds: list[float]
    ratios: list[float]
    forwards: int
    tokens_per_forward: float
    places: float | None  # of the trunk, in shares of the plain loop's
    equal: bool
    agreement: float  # share of the plain loop's tokens
    peak: float | None = None  # MiB above the loaded model


def settings_of(work: Workload, *, trained: bool, compiled: bool = False) -> list[Setting]:
    """The settings of a workload: the exact levers one after another, then the approximate ones on top of all of them.

    trained: a model that is sure of something; a random one never passes a threshold. compiled: with torch.compile too.
    All levers are those that pay where the workload lies: fused projections save a GPU's launches; on a CPU, where
    their larger products run slower than the three apart, they are a line of their own.
    """
    found, levers = [Setting("one loop, argmax and logsumexp", True, Sampling(levers=PLAIN))], PLAIN
    guided = work.without is not None
    padded = work.padded.canvas.ids.shape != work.rows.canvas.ids.shape
    fusing = work.rows.canvas.ids.device.type != "cpu"
    chain = [
        ("head at masked places, own columns", "head", True),
        ("no padding, no mask", "tight", padded),
        ("guidance before the head", "hidden", guided),
        ("last layer where it is read", "narrow", True),
        ("first unprompted pass kept", "kept", guided),
        ("projections fused", "fused", fusing),
    ]
    for name, lever, there in chain:
        levers = levers._replace(**{lever: there or lever != "fused"})
        if there:
            found.append(Setting(f"+ {name}", True, Sampling(levers=levers)))
    every = found[-1].sampling.levers
    found[-1] = found[-1]._replace(name=f"{found[-1].name} = {LAST_EXACT}")
    if not fusing:
        found.append(Setting("+ projections fused", True, Sampling(levers=every._replace(fused=True))))
    if compiled:
        every = every._replace(compiled=True)
        found.append(Setting("+ compiled", True, Sampling(levers=every)))
    return found + [Setting(name, False, sampling) for name, sampling in _approximate(work, every, trained)]


def _approximate(work: Workload, levers: Levers, trained: bool) -> Iterator[tuple[str, Sampling]]:
    cached = levers._replace(compiled=False)
    half, quarter = max(work.steps // 2, 1), max(work.steps // 4, 1)
    if work.task == "t2i":
        yield "image_cache", Sampling(levers=cached, cache={"name": "image_cache"})
        if work.without is not None:
            # cos(pi/4) = 0.71 of the places are masked after half of the steps
            yield "guidance in the first half", Sampling(levers=levers, guidance=(0.7, 1.0))
            yield "guidance in the second half", Sampling(levers=levers, guidance=(0.0, 0.7))
        yield f"{half} steps", Sampling(steps=half, levers=levers)
        yield f"{half} steps, image_cache", Sampling(steps=half, levers=cached, cache={"name": "image_cache"})
        return
    prefix, dual = {"name": "prefix_cache"}, {"name": "dual_cache"}
    # as many tokens in a step as its block holds at most
    blocks = work.tokens // (work.block or work.tokens)
    half, quarter = max(half, blocks), max(quarter, blocks)
    yield "prefix_cache", Sampling(levers=cached, cache=prefix)
    yield "dual_cache", Sampling(levers=cached, cache=dual)
    yield f"{half} steps", Sampling(steps=half, levers=levers)
    yield f"{quarter} steps", Sampling(steps=quarter, levers=levers)
    yield f"{quarter} steps, dual_cache", Sampling(steps=quarter, levers=cached, cache=dual)
    if trained:
        policy = {"name": "threshold", "tau": 0.9}
        yield "threshold 0.9", Sampling(policy=policy, levers=levers)
        yield "threshold 0.9, dual_cache", Sampling(policy=policy, levers=cached, cache=dual)
        if work.block is None and work.tokens % 8 == 0:
            yield "threshold 0.9, dual_cache, blocks of 8", Sampling(policy=policy, block=8, levers=cached, cache=dual)


# ---------------------------------------------------------------- one workload


def measure(
    model: nn.Module,
    work: Workload,
    settings: Sequence[Setting],
    *,
    pairs: int,
    fused: nn.Module | None = None,
    peak: Callable[[str], float | None] = lambda name: None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """The plain loop and every setting: first each once for its tokens and what it computes, then `pairs` rounds timed.

    fused: the same model once more, its projections fused; without one the model's own are fused and taken apart again.
    peak: the name of a setting, "" for the plain loop -> MiB, where it is measured elsewhere; on a GPU it is not asked.
    """
    kept: dict[str, Any] = {}
    truth, done = _counted(model, lambda: plain(model, work))
    rows = [Row("plain published loop", True, [], [], done.forwards, work.tokens / done.forwards, 1.0, True, 1.0,
                done.peak if done.peak is not None else peak(""))]
    for setting in settings:
        progress(setting.name)
        used = _used(model, fused, setting.sampling.levers)
        ids, own = _counted(used, _run(used, work, setting.sampling, kept))
        share = own.places / done.places if own.places and done.places else None
        rows.append(Row(setting.name, setting.exact, [], [], own.forwards, work.tokens / own.forwards, share,
                        bool((ids == truth).all()), float((ids == truth).double().mean()),
                        own.peak if own.peak is not None else peak(setting.name)))

    def timer(setting: Setting) -> Callable[[], float]:
        def timed() -> float:
            progress(f"timing: {setting.name}")
            used = _used(model, fused, setting.sampling.levers)
            return _timed(used, _run(used, work, setting.sampling, kept))

        return timed

    def plain_timed() -> float:
        return _timed(_used(model, fused, PLAIN), lambda: plain(model, work))

    first, others = in_turn(plain_timed, [timer(setting) for setting in settings], pairs)
    _used(model, fused, PLAIN)
    rows[0].seconds.extend(first)
    rows[0].ratios.extend(1.0 for _ in first)
    for row, measured in zip(rows[1:], others, strict=True):
        row.seconds.extend(own for _, own in measured)
        row.ratios.extend(beside / own for beside, own in measured)
    return rows


def _used(model: nn.Module, fused: nn.Module | None, levers: Levers) -> nn.Module:
    if fused is not None:
        return fused if levers.fused else model
    fitted(model, levers)
    return model


def in_turn(
    first: Callable[[], float], others: Sequence[Callable[[], float]], pairs: int
) -> tuple[list[float], list[list[tuple[float, float]]]]:
    """Calls that time themselves, `pairs` rounds: all that `first` took, and for each other (first's beside it, its).

    A round is first A B first C D first: one of `first` serves the call before it and the one after it.
    """
    alone: list[float] = []
    found: list[list[tuple[float, float]]] = [[] for _ in others]
    for _ in range(pairs):
        alone.append(first())
        for number, other in enumerate(others):
            seconds = other()
            if number % 2:
                alone.append(first())
            found[number].append((alone[-1], seconds))
    return alone, found


def first_passes(model: nn.Module, work: Workload, setting: Setting | None, count: int = 3) -> None:
    """The first passes of a setting (None: of the plain loop), to which the model is fitted: the peak is theirs."""
    run = (lambda: plain(model, work)) if setting is None else _run(model, work, setting.sampling, {})
    for _ in zip(range(count), run(), strict=False):
        pass


class _Done(NamedTuple):
    forwards: int
    places: int  # computed by the trunk's first layer
    peak: float | None  # MiB above what was there before, on a GPU


def _counted(model: nn.Module, run: Callable[[], Iterator[Tensor]]) -> tuple[Tensor, _Done]:
    """A run's editable ids [B, E], on the CPU, and what it took."""
    seen = [0]
    layers: Any = getattr(getattr(model, "trunk", None), "layers", None)

    def look(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else named["hidden_states"]
        seen[0] += hidden.shape[0] * hidden.shape[1]

    hook = layers[0].register_forward_pre_hook(look, with_kwargs=True) if layers is not None else None
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    states = list(run())
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if on_gpu else None
    if hook is not None:
        hook.remove()
    return states[-1].cpu(), _Done(len(states), seen[0], peak)


def _run(model: nn.Module, work: Workload, sampling: Sampling, kept: Any) -> Callable[[], Iterator[Tensor]]:
    return lambda: sampled(model, work, sampling, kept=kept)


def _timed(model: nn.Module, run: Callable[[], Iterator[Tensor]]) -> float:
    synchronize = next(model.parameters()).device.type == "cuda"
    started = time.perf_counter()
    for _ in run():
        pass
    if synchronize:
        torch.cuda.synchronize()
    return time.perf_counter() - started


# ---------------------------------------------------------------- what is told


def unequal(rows: Sequence[Row]) -> list[str]:
    """The names of exact settings whose tokens are not the plain loop's."""
    return [row.name for row in rows if row.exact and not row.equal]


def table(rows: Sequence[Row], work: Workload, *, float32: bool) -> str:
    """Markdown. float32: equality was promised."""
    unit, each = ("pictures a minute", 60.0) if work.task == "t2i" else ("tokens a second", float(work.tokens))
    lines = [
        f"| {title(work)} | x the plain loop (least to most) | s | {unit} | forwards | tokens a forward | places "
        "computed | peak MiB | tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        seconds = median(row.seconds) if row.seconds else float("nan")
        ratio = f"{median(row.ratios):.2f} ({min(row.ratios):.2f} to {max(row.ratios):.2f})" if row.ratios else "-"
        told = "equal" if row.equal else f"{100 * row.agreement:.1f} % equal"
        if row.exact and not row.equal:
            told += ", SHOULD BE EQUAL" if float32 else " (ties fall otherwise in half precision)"
        places = "-" if row.places is None else f"{100 * row.places:.0f} %"
        lines.append(
            f"| {row.name} | {ratio} | {seconds:.3g} | {len(work.rows.canvas.ids) * each / seconds:.3g} | "
            f"{row.forwards} | {row.tokens_per_forward:.1f} | {places} | "
            f"{'-' if row.peak is None else f'{row.peak:.0f}'} | {told} |"
        )
    return "\n".join(lines)


def title(work: Workload) -> str:
    """t2i, 1 row of 268 places (389 as published), 256 new, 18 steps, guidance 4.5"""
    rows, places = work.rows.canvas.ids.shape
    as_fed = work.padded.canvas.ids.shape[1]
    fed = f" ({as_fed} as published)" if as_fed != places else ""
    told = [f"{work.task}: {rows} row{'s' if rows > 1 else ''} of {places} places{fed}", f"{work.tokens} new"]
    told += [f"blocks of {work.block}"] if work.block else []
    told += [f"{work.steps} steps"]
    return ", ".join(told + ([f"guidance {work.scale:g}"] if work.scale != 1 else []))


def floor_line(model: nn.Module, rows: Sequence[Row]) -> str:
    """Milliseconds per forward beside those that reading every weight once takes at the bandwidth measured here."""
    parameters = list(model.parameters())
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    speed = bandwidth(str(parameters[0].device))
    named = [("plain loop", rows[0]), *((LAST_EXACT, row) for row in rows if LAST_EXACT in row.name)]
    each = ", ".join(f"{name} {1e3 * median(row.seconds) / row.forwards:.2f} ms" for name, row in named if row.seconds)
    return (
        f"A forward: {each}; reading its {size / 1e9:.2f} GB of weights once at the {speed / 1e9:.0f} GB/s measured "
        f"here: {1e3 * size / speed:.2f} ms."
    )


def bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy within the device's memory, the best of five."""
    count = 2**30 if device.startswith("cuda") else 2**26
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * count / best


def facts(command: str, seed: int, model: str) -> dict[str, Any]:
    """What the numbers were made by, and on."""
    import mmdlm

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": command,
        "seed": seed,
        "model": model,
        "machine": names[0] if names else platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "versions": {"mmdlm": mmdlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def load_average() -> float:
    """Of the last minute: above the number of cores, others were computing too."""
    return round(os.getloadavg()[0], 2)


# ---------------------------------------------------------------- memory of a process


def memory_of(work: Callable[[], None]) -> float | None:
    """MiB that this process held at most during `work` above what it held before; None where the system does not tell.

    For a process of its own: what earlier work has freed would be used again and not be seen.
    """
    try:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
        work()
        return (_status("VmHWM") - before) / 1024
    except (OSError, KeyError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Vm")}[name]


def chosen(settings: Sequence[Setting], names: str | None) -> list[Setting]:
    """Those whose name contains one of the words between commas; all for None. InputError where none does."""
    if names is None:
        return list(settings)
    words = [word.strip() for word in names.split(",") if word.strip()]
    found = [setting for setting in settings if any(word in setting.name for word in words)]
    if not found:
        raise InputError(f"No setting is called {names!r}, expected parts of: {'; '.join(s.name for s in settings)}.")
    return found


def as_json(rows: Sequence[Row], work: Workload) -> dict[str, Any]:
    """The workload and every single measurement, for a file."""
    return {"workload": title(work), "rows": [json.loads(json.dumps(row._asdict())) for row in rows]}

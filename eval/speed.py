"""How fast it is, against floors and twins measured beside it in the same run, alternating.

    mmdlm run eval/speed                          # all parts, the shipped model
    mmdlm run eval/speed part=entropy pairs=9     # one part: predictor, entropy or generate
    mmdlm run eval/speed --training pairs=5       # a training step: the program eval/training_speed, its settings

predictor: a forward of the mask predictor against its own matrix products run bare (the floor: nothing else could take
    less), for one picture and for several.
entropy: forward and backward of the quantizer's exact factorised entropies (`mmdlm.models.lfq.entropies`) against the
    form that lists all 2^d codes for every vector, after both were compared in float64.
generate: `mmdlm generate` as a person types it, from a process that has loaded nothing: seconds to the PNG, peak
    memory, and seconds for each further picture.

A pair is one measurement of each side, one right after the other, so that a busy machine slows both. Prints a Markdown
table of medians and extremes over the pairs, and writes run.json to `out`, every single measurement included.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import mmdlm
from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.models.lfq import Entropies, entropies, entropies_dense
from mmdlm.picture_files import write_whole
from mmdlm.pipelines import TextToImage
from mmdlm.training.arguments import config_from_arguments

PARTS = ("predictor", "entropy", "generate")
Row = dict[str, Any]  # what, unit, values (one per pair), note, and the raw measurements


@dataclass
class Config:
    """What to measure."""

    part: str = "all"
    model: str | None = None  # None: the shipped one
    out: str = "runs/speed"
    pairs: int = 7
    least_seconds: float = 0.2  # of one measurement: shorter things are repeated that long
    rows: list[int] = field(default_factory=lambda: [1, 8])  # pictures drawn together
    entropy_bits: list[int] = field(default_factory=lambda: [13, 18])
    entropy_vectors: list[int] = field(default_factory=lambda: [8192, 256])  # the listed form then takes about 2 GB
    entropy_temperature: float = 0.01
    prompt: str = "a red apple"
    further_pictures: int = 4
    threads: int | None = None  # None: torch's own choice
    seed: int = 0


def main(arguments: list[str]) -> None:
    if "--training" in arguments:
        rest = [word for word in arguments if word != "--training"]
        raise SystemExit(subprocess.call([sys.executable, str(Path(__file__).with_name("training_speed.py")), *rest]))
    config = config_from_arguments(Config, arguments, program=__file__)
    try:
        measure(config, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def measure(config: Config, arguments: list[str]) -> None:
    parts = PARTS if config.part == "all" else (config.part,)
    if not set(parts) <= set(PARTS):
        raise InputError(f"part is {config.part!r}, expected all or one of {', '.join(PARTS)}.")
    if config.pairs < 1 or len(config.entropy_bits) != len(config.entropy_vectors):
        raise InputError(
            f"pairs is {config.pairs}, entropy_bits {config.entropy_bits}, entropy_vectors {config.entropy_vectors}: "
            "expected 1 pair or more, and as many bits as vectors."
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    # Numbers next to zero cost a CPU many times as much, and the form that lists all codes makes more of them.
    torch.set_flush_denormal(True)
    run = run_facts(config, arguments)
    rows: list[Row] = []
    for part in parts:
        print(f"measuring: {part}", file=sys.stderr, flush=True)
        rows += {"predictor": predictor, "entropy": entropy, "generate": generate}[part](config)
    run["load_average_after"] = load_average()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "run.json", json.dumps(run | {"results": rows}, indent=1).encode())
    print(table(rows, run))


def predictor(config: Config) -> list[Row]:
    """Seconds per forward of a drawing step, and its ratio to the same matrix products run bare."""
    pipe = TextToImage.from_pretrained(config.model)
    results = []
    for count in config.rows:
        canvas, *_ = pipe.prepare([config.prompt], count, 1.0)
        where = canvas.editable.nonzero()[:, 1].view(count, -1)
        columns = pipe.processor.vocabulary.image_columns

        @torch.no_grad()
        def forward(canvas: Any = canvas, where: Tensor = where, columns: tuple[int, int] = columns) -> Any:
            return pipe.model(canvas.ids, position_ids=canvas.positions, grid=canvas.grid, where=where, columns=columns)

        products = matrix_products(pipe.model, forward, columns)
        ours, floor = alternate(forward, bare(products), config)
        multiplied = sum(x.shape[0] * x.shape[1] * weight.shape[0] for x, weight in products)
        results.append(
            {
                "what": f"predictor, {count} x {canvas.ids.shape[1]} places: forward / its matrix products bare",
                "unit": "x",
                "values": [a / b for a, b in zip(ours, floor, strict=True)],
                "note": f"{median(ours) * 1e3:.1f} ms against {median(floor) * 1e3:.1f} ms, "
                f"{multiplied * 2 / 1e9:.2f} GFLOP",
                "seconds": ours,
                "floor_seconds": floor,
            }
        )
    return results


def matrix_products(
    model: torch.nn.Module, forward: Callable[[], Any], columns: tuple[int, int]
) -> list[tuple[Tensor, Tensor]]:
    """(x [N, K], weight [M, K]) of every linear layer that a forward runs, and of the head: x @ weight.T is taken."""
    seen: list[tuple[Tensor, Tensor]] = []

    def remember(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[0].detach().flatten(0, -2).clone(), module.weight.detach()))  # type: ignore[arg-type]

    hooks = [
        layer.register_forward_pre_hook(remember) for layer in model.modules() if isinstance(layer, torch.nn.Linear)
    ]
    hidden = forward().hidden
    for hook in hooks:
        hook.remove()
    # The head is a product with the asked columns only, not a layer.
    return [*seen, (hidden.flatten(0, -2), model.head_rows(columns).detach())]  # type: ignore[operator]


def bare(products: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """The products and nothing else, into memory that is already there."""
    ready = [(x, weight.T, x.new_empty(len(x), len(weight))) for x, weight in products]

    @torch.no_grad()
    def run() -> None:
        for x, weight, out in ready:
            torch.mm(x, weight, out=out)

    return run


def entropy(config: Config) -> list[Row]:
    """How much less time the factorised entropies take, forward and backward, than the form that lists all codes."""
    chance = torch.Generator().manual_seed(config.seed)
    results = []
    for bits, count in zip(config.entropy_bits, config.entropy_vectors, strict=True):
        apart = difference(bits, config, chance)
        if not max(apart.values()) < 1e-6:
            raise RuntimeError(f"the two forms differ at {bits} bits: {apart}")
        z = (torch.randn(count, bits, generator=chance) * 0.1).requires_grad_()
        sides = [loss_and_gradient(form, z, config.entropy_temperature) for form in (entropies_dense, entropies)]
        dense, factorised = alternate(sides[0], sides[1], config)
        results.append(
            {
                "what": f"LFQ entropies, 2^{bits} codes, {count} vectors: all codes listed / factorised",
                "unit": "x",
                "values": [a / b for a, b in zip(dense, factorised, strict=True)],
                "note": f"{median(dense):.2f} s against {median(factorised) * 1e3:.1f} ms, forward and backward, "
                f"float32; in float64 values within {apart['value']:.1e}, gradients within {apart['gradient']:.1e}",
                "dense_seconds": dense,
                "factorised_seconds": factorised,
                "float64_difference": apart,
            }
        )
    return results


def loss_and_gradient(form: Callable[[Tensor, float], Entropies], z: Tensor, temperature: float) -> Callable[[], Any]:
    """One forward and backward of per-sample minus twice the codebook entropy with regard to z; returns both.

    Twice, as the tokenizer weighs them: where every vector has a code of its own, the plain difference is constant and
    its gradient nothing but rounding.
    """

    def run() -> tuple[Tensor, Tensor]:
        found = form(z, temperature)
        loss = found.per_sample - 2 * found.codebook
        return torch.stack(list(found)).detach(), torch.autograd.grad(loss, z)[0]

    return run


def difference(bits: int, config: Config, chance: torch.Generator) -> dict[str, float]:
    """The largest difference between both forms in float64, over few vectors: of the entropies (nats), and of the
    gradient, relative to its largest entry."""
    count = max(2, min(64, 2**21 // 2**bits))
    z = (torch.randn(count, bits, generator=chance, dtype=torch.float64) * 0.1).requires_grad_()
    (value, gradient), (dense_value, dense_gradient) = (
        loss_and_gradient(form, z, config.entropy_temperature)() for form in (entropies, entropies_dense)
    )
    size = float(dense_gradient.abs().max())
    return {
        "value": float((value - dense_value).abs().max()),
        "gradient": float((gradient - dense_gradient).abs().max()) / size,
    }


def generate(config: Config) -> list[Row]:
    """`mmdlm generate` in a fresh process: seconds to the PNG, peak memory, seconds for each further picture."""
    model = Path(config.model) if config.model is not None else shipped_model()
    one, several, memory, further = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(config.pairs):
            for count, seconds in ((1, one), (1 + config.further_pictures, several)):
                spent, peak = fresh_process(config, model, count, Path(folder) / "picture.png")
                seconds.append(spent)
                if count == 1:
                    memory.append(peak)
            further.append((several[-1] - one[-1]) / config.further_pictures)
    same = {"one_seconds": one, "several_seconds": several}
    return [
        {"what": "mmdlm generate, from the start of the process to the PNG", "unit": "s", "values": one,
         "note": "default settings; the files had been read before"},
        {"what": "mmdlm generate, peak resident memory", "unit": "GB", "values": memory, "note": "of that process"},
        {"what": "mmdlm generate, each further picture", "unit": "s", "values": further,
         "note": f"-n {1 + config.further_pictures} less -n 1, by {config.further_pictures}", **same},
    ]  # fmt: skip


def fresh_process(config: Config, model: Path, count: int, output: Path) -> tuple[float, float]:
    """(seconds, peak GB) of one run of the command line."""
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", "generate", config.prompt, "-n", str(count)]
    command += ["-o", str(output), "--seed", str(config.seed), "--model", str(model), "--device", "cpu", "--quiet"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(config.threads)} if config.threads else {})}
    done = subprocess.run([sys.executable, "-c", _LAUNCH, *command], capture_output=True, text=True, env=environment)
    spent, peak, status = (float(word) for word in done.stdout.split())
    if status:
        last = done.stderr.strip().splitlines() or ["it said nothing"]
        raise InputError(f"{shlex.join(command[3:])} ended with {status:.0f} ({last[-1]}): mend that first.")
    return spent, peak * (1 if sys.platform == "darwin" else 1024) / 1e9


# A process is charged with the memory of the one that started it, as it was then: so a small one starts it. wait4 is
# the only wait that tells the memory of one process.
_LAUNCH = """
import os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - started, usage.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


def alternate(first: Callable[[], Any], second: Callable[[], Any], config: Config) -> tuple[list[float], list[float]]:
    """Seconds of one call of each, `pairs` times, alternating; calls too short to time are repeated."""
    calls = []
    for function in (first, second):
        function()  # the first call allocates and compiles
        calls.append((function, max(1, math.ceil(config.least_seconds / max(timed(function, 1), 1e-9)))))
    found: tuple[list[float], list[float]] = ([], [])
    for _ in range(config.pairs):
        for seconds, (function, repeats) in zip(found, calls, strict=True):
            seconds.append(timed(function, repeats))
    return found


def timed(function: Callable[[], Any], repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats


def run_facts(config: Config, arguments: list[str]) -> dict[str, Any]:
    """All that makes the numbers again, and what they were made on."""
    return {
        "command": shlex.join(["mmdlm", "run", "eval/speed", *arguments]),
        "commit": commit(),
        "seed": config.seed,
        "settings": asdict(config),
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_before": load_average(),
        },
        "versions": {"mmdlm": mmdlm.__version__, "python": platform.python_version(), "torch": torch.__version__},
    }


def commit() -> str:
    """Of the checkout this program lies in, "+" where it was changed since; "none" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return found[:12] + ("+" if changed else "")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load_average() -> float:
    """Of the last minute: above the number of cores, others were computing too."""
    return round(os.getloadavg()[0], 2)


def table(rows: list[Row], run: dict[str, Any]) -> str:
    lines = ["| measured | median | least to most | |", "| --- | --- | --- | --- |"]
    for row in rows:
        values, unit = row["values"], row["unit"]
        middle, least, most = (f"{value:.3g}" for value in (median(values), min(values), max(values)))
        spread = f"{least} to {most} over {len(values)} pairs"
        lines.append(f"| {row['what']} | {middle} {unit} | {spread} | {row['note']} |")
    machine = run["machine"]
    lines += [
        "",
        f"`{run['command']}`, commit {run['commit']}, {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, torch {run['versions']['torch']}, seed {run['seed']}, "
        f"load {machine['load_average_before']} to {run['load_average_after']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Quality against cost: pictures and captions of one model under fewer steps, thresholds, caches and less guidance.

    mmdlm run eval/curve data=PICTURES out=RUN/curve                        # the shipped model
    mmdlm run eval/curve data=PICTURES out=RUN/curve scenes=16 parts=[describe]     # a quick look
    mmdlm run eval/curve data=PICTURES out=RUN/curve plot=docs/curve.png            # the drawing elsewhere too

The same held-out compositions for every setting, the same seeds. Pictures are judged by `mmdlm.evaluation.judge` (all
of a caption right), captions are compared to the letter. Cost: forwards of the model a picture or caption, where a pass
with guidance is two, and wall-clock seconds each (pictures `batch_size` at once, captions `caption_batch`). Nothing is
chosen here: `mmdlm tune` chooses, on other pictures.

Written to `out`: run.json, points.jsonl (a line for each setting as it is done: a killed run goes on from there),
results.json, results.md, curve.png.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import mmdlm
from mmdlm.assets import shipped_model
from mmdlm.data.scenes import PictureWorld, Scene
from mmdlm.errors import InputError
from mmdlm.evaluation.bench_workloads import Workload, describe_workload, picture_workload
from mmdlm.evaluation.intervals import percent, share
from mmdlm.evaluation.judge import SIDE, Judge, JudgeSettings, cached_judge
from mmdlm.evaluation.sampling_settings import Levers, Sampling, fitted, states
from mmdlm.evaluation.scene_facts import facts_right
from mmdlm.model_directory import model_hash
from mmdlm.picture_files import check_writable, write_whole
from mmdlm.pipelines import TextToImage
from mmdlm.programs import program_path
from mmdlm.training.arguments import config_from_arguments, run_program

PARTS = ("draw", "describe")
FIRST_SCENE = 1 << 36  # far from the seeds of training pools
STYLES = (("#1f5fbf", "o"), ("#d9480f", "s"), ("#2b8a3e", "^"), ("#862e9c", "D"))  # of the series


@dataclass
class Config:
    """What to measure: every series at every one of its steps or thresholds."""

    data: str = ""
    model: str | None = None  # None: the shipped one
    out: str = "runs/curve"
    plot: str | None = None  # a second place for the drawing
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    recipe: str = "pictures_300"  # a file or a name in train/; for a model with no config.yaml beside it
    scenes: int = 128
    draw_steps: list[int] = field(default_factory=lambda: [2, 4, 8, 12, 16, 24])
    caption_steps: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 12, 24])
    thresholds: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.8, 0.9, 0.95])
    batch_size: int = 8
    caption_batch: int = 1
    seed: int = 0
    judge_concepts: int = 300
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    judge_cache: str | None = None  # None: $XDG_CACHE_HOME/mmdlm


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    if not set(config.parts) <= set(PARTS) or not config.parts or config.scenes < 1:
        raise InputError(
            f"parts is {config.parts}, scenes {config.scenes}: expected some of {', '.join(PARTS)}, and 1 or more."
        )
    directory = shipped_model() if config.model is None else Path(config.model)
    if config.plot is not None:
        check_writable(Path(config.plot), ".png")
    pipe = TextToImage.from_pretrained(directory)
    torch.set_flush_denormal(True)
    worlds = trained_on(config, directory)
    world = PictureWorld(config.data, split="held_out", resolution=pipe.processor.image_size, **worlds)
    scenes = [world.scene(FIRST_SCENE + config.seed * 1_000_000 + index) for index in range(config.scenes)]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    run = run_facts(config, arguments, directory, worlds, pipe.presets)
    done = points_done(out, run)
    fitted(pipe.model, Levers())
    for part in config.parts:
        judge = the_judge(config, worlds) if part == "draw" else None
        codes = encoded(pipe, scenes, config.batch_size) if part == "describe" else None
        for series, label, sampling in settings_of(part, config, pipe.presets):
            if (part, series, label) in {(point["part"], point["series"], point["setting"]) for point in done}:
                continue
            point: dict[str, Any] = {"part": part, "series": series, "setting": label}
            point |= measured(pipe, scenes, codes, judge, part, sampling, config)
            done.append(point)
            with (out / "points.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(point) + "\n")
            print(f"{part}: {series}, {label}: {percent(point['right'])}, {point['forwards']:.1f} forwards, "
                  f"{point['seconds']:.3f} s", flush=True)
    finish(out, run, done, config)


def settings_of(part: str, config: Config, presets: dict[str, Any]) -> Iterator[tuple[str, str, Sampling]]:
    """(series, setting, how to sample): everything else is the model's own preset."""
    preset = presets[part]
    policy, draw = preset["policy"], preset["draw"]
    if part == "draw":
        scale, image = preset["guidance_scale"], {"name": "image_cache"}
        for steps in config.draw_steps:
            always = Sampling(steps=steps, policy=policy, draw=draw, scale=scale)
            yield f"guidance {scale:g}", f"{steps} steps", always
            yield "no guidance", f"{steps} steps", Sampling(steps=steps, policy=policy, draw=draw, scale=1.0)
            # after half of the steps cos(pi/4) = 0.71 of the places are masked
            half = Sampling(steps=steps, policy=policy, draw=draw, scale=scale, guidance=(0.7, 1.0))
            yield "guidance in the first half", f"{steps} steps", half
            cached = Sampling(steps=steps, policy=policy, draw=draw, scale=scale, cache=image)
            yield f"guidance {scale:g}, image_cache", f"{steps} steps", cached
        return
    dual = {"name": "dual_cache"}
    for steps in config.caption_steps:
        yield "fixed steps", f"{steps} steps", Sampling(steps=steps, policy=policy, draw=draw)
        yield "fixed steps, dual_cache", f"{steps} steps", Sampling(steps=steps, policy=policy, draw=draw, cache=dual)
    for tau in config.thresholds:
        rule = {"name": "threshold", "tau": tau}
        yield "threshold", f"tau {tau:g}", Sampling(policy=rule, draw=draw)
        yield "threshold, dual_cache", f"tau {tau:g}", Sampling(policy=rule, draw=draw, cache=dual)


def measured(
    pipe: Any,
    scenes: Sequence[Scene],
    codes: torch.Tensor | None,
    judge: Judge | None,
    part: str,
    sampling: Sampling,
    config: Config,
) -> dict[str, Any]:
    """One setting over all scenes: how many are right, forwards and seconds each."""
    right, forwards, seconds = 0, 0.0, 0.0
    size = config.batch_size if part == "draw" else config.caption_batch
    kept: dict[str, Any] = {}
    for start in range(0, len(scenes), size):
        batch = scenes[start : start + size]
        chances = [torch.Generator().manual_seed(config.seed * 1_000_003 + start + row) for row in range(len(batch))]
        began = time.perf_counter()
        work = workload(pipe, batch, None if codes is None else codes[start : start + size], part)
        ids, asked = filled(pipe.model, work, sampling, chances, kept)
        if part == "draw":
            shown = pipe.visual_tokenizer.decode(pipe.processor.vocabulary.image_codes(ids).view(-1, *pipe.grid))
            seconds += time.perf_counter() - began
            right += judged(judge, batch, pipe.processor.images(shown))
        else:
            said = [pipe.processor.text(row) for row in ids]
            seconds += time.perf_counter() - began
            right += sum(text == scene.caption for text, scene in zip(said, batch, strict=True))
        forwards += asked
    return {
        "right": share(right, len(scenes)),
        "forwards": forwards / len(scenes),
        "seconds": seconds / len(scenes),
    }


@torch.no_grad()
def filled(
    model: Any, work: Workload, sampling: Sampling, chances: list[torch.Generator], kept: dict[str, Any]
) -> tuple[torch.Tensor, int]:
    """The ids [B, E] of the editable places, and the forwards of all rows together: a guided pass is two."""
    editable, (low, high) = work.rows.canvas.editable, sampling.guidance
    forwards, going = 0, editable.any(dim=1)
    masked = editable.double().sum(dim=1) / editable.sum(dim=1)
    for state in states(model, work, sampling, generator=chances, kept=kept):
        guided = (masked > low) & (masked <= high) & (work.without is not None and sampling.scale != 1)
        forwards += int(going.sum()) + int((going & guided).sum())
        going = ~state.done
        masked = ((state.x == work.mask_id) & editable).double().sum(dim=1) / editable.sum(dim=1)
    return state.x[editable].view(len(state.x), -1), forwards


def workload(pipe: Any, scenes: Sequence[Scene], codes: torch.Tensor | None, part: str) -> Workload:
    words, preset = pipe.processor.vocabulary, pipe.presets[part]
    if part == "draw":
        prompts = [pipe.processor.text_ids(scene.caption) for scene in scenes]
        return picture_workload(prompts, pipe.grid, words, steps=preset["num_inference_steps"],
                                scale=preset["guidance_scale"])
    assert codes is not None
    return describe_workload(codes, pipe.grid, words, answer=preset["answer_length"], steps=preset["answer_length"])


def judged(judge: Judge | None, scenes: Sequence[Scene], pictures: Sequence[Any]) -> int:
    """How many pictures show all that their scene's caption says."""
    assert judge is not None
    seen = judge(np.stack([np.asarray(picture) for picture in pictures]))
    each = zip(scenes, seen, strict=True)
    return sum(facts_right(scene.facts, one.facts, judge.concepts)["all"] for scene, one in each)


@torch.no_grad()
def encoded(pipe: Any, scenes: Sequence[Scene], batch_size: int) -> torch.Tensor:
    """The codes [N, h, w] of the scenes' renders."""
    codes = []
    for start in range(0, len(scenes), batch_size):
        renders = np.stack([scene.image for scene in scenes[start : start + batch_size]])
        codes.append(pipe.visual_tokenizer.encode(torch.from_numpy(renders).permute(0, 3, 1, 2) / 127.5 - 1))
    return torch.cat(codes)


# ------------------------------------------------------------------------------------------------- worlds, settings


def trained_on(config: Config, directory: Path) -> dict[str, Any]:
    """The world's settings the model was trained on: from its run's config.yaml, else from the recipe's YAML."""
    beside = directory.resolve().parent / "config.yaml"
    named = Path(config.recipe) if Path(config.recipe).is_file() else None
    path = beside if beside.is_file() else named or program_path(f"train/{config.recipe}.yaml")
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "concepts" not in read or "styles" not in read:
        raise InputError(f"{path} does not say which concepts and styles were trained on: name another with recipe=.")
    return {"kind_weights": read.get("kind_weights"), "concepts": read["concepts"], "styles": read["styles"]}


def the_judge(config: Config, worlds: dict[str, Any]) -> Judge:
    known = None if worlds["concepts"] is None else max(worlds["concepts"], config.judge_concepts)
    whole = PictureWorld(config.data, split="all", resolution=SIDE, **(worlds | {"concepts": known}))
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return cached_judge(whole, config.judge, Path(config.judge_cache or Path(cache) / "mmdlm"), device="cpu")


def run_facts(
    config: Config, arguments: list[str], directory: Path, worlds: dict[str, Any], presets: dict[str, Any]
) -> dict[str, Any]:
    """All that makes the numbers again."""
    return {
        "command": shlex.join(["mmdlm", "run", "eval/curve", *arguments]),
        "seed": config.seed,
        "settings": asdict(config),
        "model": {"directory": str(directory), "hash": model_hash(directory), "presets": presets},
        "trained_on": worlds,
        "versions": {"mmdlm": mmdlm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
    }


def points_done(out: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """What an earlier run into `out` measured; InputError where that was of another model or other scenes."""

    def asked(facts: dict[str, Any]) -> list[Any]:
        return [facts["model"]["hash"], *(facts["settings"][name] for name in ("scenes", "seed", "batch_size",
                                                                                "caption_batch"))]  # fmt: skip

    before, points = out / "run.json", out / "points.jsonl"
    if before.is_file() and points.is_file():
        if asked(json.loads(before.read_text(encoding="utf-8"))) != asked(run):
            raise InputError(f"{out} was begun with another model or other scenes: delete it, or give another out=.")
    elif points.is_file():
        raise InputError(f"{points} lies there without its run.json: delete it, or give another out=.")
    write_whole(before, json.dumps(run, indent=1).encode())
    if not points.is_file():
        return []
    whole, _, _ = points.read_text(encoding="utf-8").rpartition("\n")  # a line that a kill cut short is done again
    write_whole(points, (whole + "\n" if whole else "").encode())
    return [json.loads(line) for line in whole.splitlines()]


# ------------------------------------------------------------------------------------------------- what is written


def finish(out: Path, run: dict[str, Any], points: list[dict[str, Any]], config: Config) -> None:
    lines = []
    for part, name in (("draw", "pictures: all of the caption right"), ("describe", "captions: exact")):
        rows = sorted((point for point in points if point["part"] == part), key=lambda point: point["series"])
        if rows:
            lines += [f"| {name} | setting | right | forwards each | s each |", "|---|---|---|---:|---:|"]
            lines += [f"| {point['series']} | {point['setting']} | {percent(point['right'])} | "
                      f"{point['forwards']:.1f} | {point['seconds']:.3f} |" for point in rows] + [""]
    page = "\n".join([*lines, f"`{run['command']}`, model {run['model']['hash']}, {config.scenes} held-out "
                      f"compositions, {run['hardware']}, seed {config.seed}. Wilson 95 % intervals."])
    write_whole(out / "results.json", json.dumps({"run": run, "points": points}, indent=1).encode())
    write_whole(out / "results.md", (page + "\n").encode())
    drawing = plotted(points, f"model {run['model']['hash']}, {config.scenes} held-out compositions, "
                              f"{run['hardware']}, seed {config.seed}; bars: Wilson 95 %")  # fmt: skip
    for path in [out / "curve.png", *([Path(config.plot)] if config.plot else [])]:
        write_whole(path, drawing)
    print(f"{page}\n\nwritten to {out}: run.json, points.jsonl, results.json, results.md, curve.png")


def plotted(points: list[dict[str, Any]], below: str) -> bytes:
    """A PNG: a row for pictures and one for captions, against forwards and against seconds."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    parts = [part for part in PARTS if any(point["part"] == part for point in points)]
    figure = Figure(figsize=(11, 0.6 + 3.9 * len(parts)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(parts), 2, squeeze=False, sharey="row")
    names = {"draw": ("picture", "pictures, all of the caption right, %"), "describe": ("caption", "exact captions, %")}
    for row, part in zip(grid, parts, strict=True):
        each, share_name = names[part]
        mine = [point for point in points if point["part"] == part]
        for axes, cost in zip(row, ("forwards", "seconds"), strict=True):
            each_series = dict.fromkeys(point["series"] for point in mine)
            for (colour, marker), series in zip(STYLES, each_series, strict=False):
                found = sorted((p for p in mine if p["series"] == series), key=lambda p: p[cost])
                y = np.array([100 * p["right"]["share"] for p in found])
                spread = np.abs([[100 * p["right"][end] for p in found] - y for end in ("low", "high")])
                axes.errorbar([p[cost] for p in found], y, yerr=spread, fmt=f"{marker}-", color=colour, label=series,
                              markersize=5, markerfacecolor="none", linewidth=1.2, elinewidth=0.6, capsize=2)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(ScalarFormatter())
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_ylim(0, 103)
            axes.set_xlabel(f"forwards a {each} (log)" if cost == "forwards" else f"seconds a {each} (log)")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(share_name)
        row[1].legend(fontsize=8, loc="lower right")
    figure.suptitle("Quality against cost of sampling", fontsize=12)
    figure.supxlabel(below, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


if __name__ == "__main__":
    run_program(main)

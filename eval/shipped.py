"""The shipped model's whole table by one command, and eval/README.md's section of it, written from the run files.

    mmdlm run eval/shipped data=PICTURES out=RUN                 # everything: about 25 minutes on two cores
    mmdlm run eval/shipped data=PICTURES out=RUN share=0.05      # a quick look: a twentieth of the cases
    mmdlm run eval/shipped part=readme                           # eval/README.md from eval/results/*.json
    mmdlm run eval/shipped part=readme check=true                # exit code 1 unless it is what stands there

It runs `eval/pictures` again and again, each time into a directory of its own in `out`: the whole table; drawing
without guidance and with it, at several numbers of steps; describing and answering at several numbers of steps. What is
finished is not made again and what was killed goes on, so that the same command takes the run up. It says what is left.

Then the small results go to `results` (eval/results: one JSON for each run, without this machine's paths, and plots as
PNG) and the section between the two markers of `readme` is written from them alone.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.evaluation.geneval import CLASSES
from mmdlm.evaluation.intervals import percent
from mmdlm.evaluation.picture_tables import page
from mmdlm.model_directory import model_hash
from mmdlm.picture_files import write_whole
from mmdlm.training.arguments import config_from_arguments, run_program

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- from run files -->", "<!-- end of run files -->"
SETS = ("training captions", "held-out compositions")
TABLE, DRAWING, WORDS = "table", "drawing", "words"
STEPS, GUIDANCE, WORD_STEPS = (4, 8, 16, 32), (1.0, 1.5, 3.0), (2, 6, 12, 24)
SWEPT = 100  # cases of each set in a sweep; the table has eval/pictures' own numbers


class Run(NamedTuple):
    """One run of eval/pictures: its directory's name, its arguments, and its share of the time."""

    name: str
    arguments: tuple[str, ...]
    weight: float  # about seconds on two cores


@dataclass
class Config:
    """What to run and where."""

    data: str = ""  # what `mmdlm data build pictures` wrote
    model: str | None = None  # None: the shipped one
    recipe: str | None = None  # what the model was trained on; None: eval/pictures.yaml's
    out: str = "runs/shipped"
    part: str = "all"  # all, runs or readme
    share: float = 1.0  # of the cases: below 1 a look at it
    only: list[str] = field(default_factory=list)  # what the names of runs begin with, table or drawing-4; []: all
    processes: int = 1  # for each run, by accelerate launch
    results: str = ""  # where the small results go; "": eval/results
    readme: str = ""  # whose section is written; "": eval/README.md
    check: bool = False  # part=readme: write nothing, compare
    seed: int = 0
    judge_cache: str | None = None
    judge_steps: int | None = None  # training steps of the judge; None: its own
    judge_widths: str | None = None


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    if config.part not in ("all", "runs", "readme") or not 0 < config.share <= 1 or config.processes < 1:
        raise InputError(
            f"part is {config.part!r}, share {config.share} and processes {config.processes}, expected all, runs or "
            "readme, a share above 0 and at most 1, and 1 or more processes."
        )
    results = Path(config.results) if config.results else HERE / "results"
    readme = Path(config.readme) if config.readme else HERE / "README.md"
    if config.part != "readme":
        run_all(config, results)
    if config.part != "runs":
        write_section(readme, results, check=config.check)


# ---------------------------------------------------------------------------------------------------- the runs


def planned(config: Config) -> list[Run]:
    """All runs, the table first."""

    def cases(count: int) -> str:
        return str(max(2, round(count * config.share)))

    table = (f"scenes={cases(300)}", f"questions={cases(600)}", f"prompts={cases(50)}", f"judged_renders={cases(600)}")
    runs = [Run(TABLE, table, 560)]
    for guidance in GUIDANCE:
        # More guidance than the preset's at one number of steps is enough to see what it does.
        for steps in STEPS if guidance < 2 else (16,):
            settings = ("parts=[draw]", "judged_renders=0", f"scenes={cases(SWEPT)}", f"steps={steps}")
            seconds = 8 + 2 * SWEPT * steps * (0.007 if guidance == 1 else 0.014)
            runs.append(Run(f"{DRAWING}-{steps}-{guidance}", (*settings, f"guidance={guidance}"), seconds))
    for steps in WORD_STEPS:
        settings = ("parts=[describe,ask]", f"scenes={cases(SWEPT)}", f"questions={cases(2 * SWEPT)}")
        runs.append(Run(f"{WORDS}-{steps}", (*settings, f"answer_steps={steps}"), 10 + 1.2 * steps))
    return [run for run in runs if not config.only or run.name.startswith(tuple(config.only))]


def run_all(config: Config, results: Path) -> None:
    """Make every run that is not finished, and keep its small results."""
    if not config.data:
        raise InputError("data is empty, expected the directory that `mmdlm data build pictures` wrote: data=PICTURES.")
    runs, out = planned(config), Path(config.out)
    model = model_hash(Path(config.model) if config.model else shipped_model())
    given = {"data": config.data, "model": config.model, "recipe": config.recipe, "seed": config.seed}
    given |= {"judge_cache": config.judge_cache, "judge.widths": config.judge_widths}
    given |= {"judge.least_steps": config.judge_steps, "judge.most_steps": config.judge_steps}
    shared = [f"{name}={value}" for name, value in given.items() if value is not None]
    started, spent, left = time.monotonic(), 0.0, sum(run.weight for run in runs)
    for number, run in enumerate(runs):
        command = [str(HERE / "pictures.py"), "--config", "pictures", *shared, *run.arguments, f"out={out / run.name}"]
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(config.processes), "--cpu"]
        told = f"{number + 1} of {len(runs)}: {run.name}"
        if is_finished(out / run.name, command[1:-1], model):
            print(f"{told} is there")
        else:
            pace = (time.monotonic() - started) / spent if spent else config.share
            print(f"{told}, about {max(1, round(left * pace / 60))} minutes left with it", flush=True)
            (out / run.name).mkdir(parents=True, exist_ok=True)
            with (out / run.name / "log.txt").open("w", encoding="utf-8") as log:
                done = subprocess.run(
                    [sys.executable, *(launch if config.processes > 1 else []), *command], stdout=log, stderr=log
                )
            if done.returncode:
                tail = (out / run.name / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
                raise InputError(f"{run.name} failed ({''.join(tail)[:300]}): see {out / run.name / 'log.txt'}.")
            spent += run.weight
        left -= run.weight
    results.mkdir(parents=True, exist_ok=True)
    for name, content in read_results(results).items():
        if content["run"]["model"]["hash"] != model:
            (results / f"{name}.json").unlink()
    for run in runs:
        content = json.loads((out / run.name / "results.json").read_text(encoding="utf-8"))
        text = json.dumps(portable(content), indent=1, ensure_ascii=False) + "\n"
        write_whole(results / f"{run.name}.json", text.encode())
    draw_plots(results_of_one_model(results), results)
    print(f"results and plots are in {results}")


def is_finished(directory: Path, arguments: Sequence[str], model: str) -> bool:
    """Whether a run is there whole. Raises InputError where it is another one than asked for."""
    path = directory / "run.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["command"][3:] != list(arguments) or found["model"]["hash"] != model:
        made_by = f"{shlex.join(found['command'])}, model {found['model']['hash']}"
        raise InputError(f"{directory} holds another run ({made_by}): delete it, or change out.")
    return "results" in found


def portable(results: dict[str, Any]) -> dict[str, Any]:
    """A run's results without the paths of the machine it ran on."""
    run = results["run"]
    names = {"data": "PICTURES", "model": "MODEL", "judge_cache": "CACHE"}
    command = [f"{word.split('=')[0]}={names[word.split('=')[0]]}" if word.split("=")[0] in names and "=" in word
               else word for word in run["command"]]
    settings = {name: names.get(name, value) if value else value for name, value in run["settings"].items()}
    model = run["model"] | {"directory": "MODEL" if run["settings"]["model"] else "shipped"}
    return results | {"run": run | {"command": command, "settings": settings | {"out": "RUN"}, "model": model}}


def read_results(directory: Path) -> dict[str, dict[str, Any]]:
    """Results by the name of their run."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(directory.glob("*.json"))}
    return {name: content for name, content in found.items()
            if name == TABLE or name.startswith((f"{DRAWING}-", f"{WORDS}-"))}


def results_of_one_model(directory: Path) -> dict[str, dict[str, Any]]:
    """Results by the name of their run. Raises InputError without a table, and where they are of several models."""
    found = read_results(directory)
    hashes = {content["run"]["model"]["hash"] for content in found.values()}
    if TABLE not in found or len(hashes) != 1:
        raise InputError(
            f"{directory} has {len(found)} results of {len(hashes)} models, expected {TABLE}.json and all of one: "
            "make them again with mmdlm run eval/shipped data=PICTURES out=RUN."
        )
    return found


# ---------------------------------------------------------------------------------------------------- the section


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The README's section, from the results alone."""
    whole = results[TABLE]
    minutes = round(sum(content["seconds"] for content in results.values()) / 60)
    lines = [
        "### The shipped model",
        "",
        f"Written by `mmdlm run eval/shipped data=PICTURES out=RUN` from `eval/results/` (runs: {len(results)}, "
        f"minutes: {minutes}); not to be edited by hand. The table's own command and model:",
        "",
        page(whole),
    ]
    drawing, words = swept(results, DRAWING), swept(results, WORDS)
    if drawing:
        cases = next(iter(drawing.values()))["draw"][SETS[0]]["all kinds"]["all"]["total"]
        lines += ["", f"Guidance and steps, {cases} drawings each, all of it right (the judge as above):", ""]
        lines += ["| steps | guidance | " + " | ".join(SETS) + " |", "|---:|---:|---|---|"]
        for (steps, guidance), content in drawing.items():
            cells = (percent(content["draw"][name]["all kinds"]["all"]) for name in SETS)
            lines.append(f"| {steps:.0f} | {guidance} | " + " | ".join(cells) + " |")
        lines += ["", "![All of it right by steps and guidance](results/drawing.png)"]
    if words:
        lines += ["", "Steps of captions and answers, held-out compositions:", ""]
        lines += ["| steps | captions to the letter | object | answers |", "|---:|---|---|---|"]
        for (steps,), content in words.items():
            said, told = (content[part][SETS[1]]["all kinds"] for part in ("describe", "ask"))
            cells = (percent(said["exact"]), percent(said["object"]), percent(told["answer"]))
            lines.append(f"| {steps:.0f} | " + " | ".join(cells) + " |")
        lines += ["", "![Captions and answers by steps](results/words.png)"]
    if "geneval" in whole:
        lines += ["", "![GenEval's classes; grey: the judge on real pictures of the class](results/classes.png)"]
    return "\n".join(lines)


def swept(results: Mapping[str, Mapping[str, Any]], kind: str) -> dict[tuple[float, ...], Mapping[str, Any]]:
    """The runs of a sweep by the numbers in their names, in order."""
    found = {name: content for name, content in results.items() if name.startswith(f"{kind}-")}
    numbered = {tuple(float(part) for part in name.split("-")[1:]): content for name, content in found.items()}
    return dict(sorted(numbered.items(), key=lambda item: item[0][::-1]))


def write_section(readme: Path, results: Path, *, check: bool) -> None:
    """Put the section between the markers, or (check) say whether it stands there."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{readme} has not one {BEGIN} and one {END} after it: put the two lines where it goes.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = f"{before}{BEGIN}\n{section(results_of_one_model(results))}\n{END}{after}"
    if check and made != text:
        raise InputError(f"{readme} is not what {results} gives: write it with mmdlm run eval/shipped part=readme.")
    if not check:
        write_whole(readme, made.encode())
    print(f"{readme} {'is' if check else 'written'} from {results}")


# ---------------------------------------------------------------------------------------------------- the plots


def draw_plots(results: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """drawing.png, words.png, classes.png: shares with their intervals."""
    drawing, words = swept(results, DRAWING), swept(results, WORDS)
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    for (steps, guidance), content in drawing.items():
        counted = content["draw"][SETS[1]]["all kinds"]["all"]
        lines.setdefault(f"guidance {guidance}", []).append((steps, counted))
    if lines:
        plot_lines(lines, "held-out compositions, all of it right", directory / "drawing.png")
    lines = {}
    for (steps,), content in words.items():
        said, told = (content[part][SETS[1]]["all kinds"] for part in ("describe", "ask"))
        lines.setdefault("captions to the letter", []).append((steps, said["exact"]))
        lines.setdefault("answers", []).append((steps, told["answer"]))
    if lines:
        plot_lines(lines, "held-out compositions, right", directory / "words.png")
    if "geneval" in results[TABLE]:
        plot_classes(results[TABLE]["geneval"], directory / "classes.png")


def plot_lines(lines: Mapping[str, list[tuple[float, Mapping[str, Any]]]], title: str, path: Path) -> None:
    figure, axes = new_figure(title)
    for shift, (name, points) in enumerate(lines.items()):
        steps = [step * 1.03**shift for step, _ in points]  # so that intervals do not lie on one another
        shares = [100 * (counted["share"] or 0) for _, counted in points]
        low = [share - 100 * counted["low"] for share, (_, counted) in zip(shares, points, strict=True)]
        high = [100 * counted["high"] - share for share, (_, counted) in zip(shares, points, strict=True)]
        axes.errorbar(steps, shares, yerr=[low, high], marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({step for points in lines.values() for step, _ in points})
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.set_xlabel("steps")
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def plot_classes(sets: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    figure, axes = new_figure("GenEval's classes; grey: the judge on real pictures, through the tokenizer")
    names = [*CLASSES, "mean of classes"]
    for place, (title, classes) in enumerate(sets.items()):
        rows = [classes[name]["drawn"] for name in names]
        at = [number + 0.38 * (place - 0.5) for number in range(len(names))]
        shares = [100 * (row["share"] or 0) for row in rows]
        spread = [[share - 100 * row["low"] for share, row in zip(shares, rows, strict=True)],
                  [100 * row["high"] - share for share, row in zip(shares, rows, strict=True)]]
        axes.bar(at, shares, width=0.36, yerr=spread, capsize=3, label=title)
    for number, name in enumerate(names):
        ceiling = next(iter(sets.values()))[name]["the judge on renders through the tokenizer"]["share"]
        if ceiling is not None:
            axes.plot([number - 0.42, number + 0.42], [100 * ceiling] * 2, color="#808080", linewidth=2)
    axes.set_xticks(range(len(names)), [name.replace("_", "\n").replace(" of ", "\nof ") for name in names], fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def new_figure(title: str) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    axes.set_ylabel("right, %")
    axes.set_ylim(0, 105)
    return figure, axes


if __name__ == "__main__":
    run_program(main)

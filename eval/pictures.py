"""What a model of the picture world can do: pictures drawn from captions, captions and answers about pictures.

    mmdlm run eval/pictures --config pictures model=RUN/pipeline data=PICTURES out=RUN/judged
    mmdlm run eval/pictures --config pictures data=PICTURES scenes=48 parts=[draw]     # the shipped model, a quick look

Drawn pictures are judged by a small classifier trained on renders only (`mmdlm.evaluation.judge`); its own accuracy on
held-out renders, and on what the model's tokenizer makes of them (the ceiling for anything drawn), stands beside every
score. Captions and answers are compared with the truth. Every share has its Wilson 95 % interval.

Written to `out`: run.json (what makes the numbers again), results.json, results.md (the printed tables), rows.jsonl
(every single case), and sheets as PNG. Nothing here trains or tunes anything on what a model drew.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import random
import shlex
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from tqdm import tqdm

import mmdlm
from mmdlm.assets import shipped_model
from mmdlm.data.drawings import HELD_OUT_STYLE
from mmdlm.data.scenes import PictureWorld, Scene
from mmdlm.errors import InputError
from mmdlm.evaluation.intervals import percent, share
from mmdlm.evaluation.judge import SIDE, Judge, JudgeSettings, cached_judge, is_kept_back
from mmdlm.evaluation.scene_facts import FACTS, caption_facts, facts_right, tally
from mmdlm.evaluation.sheets import BESIDE, RIGHT, WRONG, Exhibit, labelled_sheet
from mmdlm.model_directory import model_hash
from mmdlm.picture_files import write_whole
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.programs import program_path
from mmdlm.training.arguments import config_from_arguments, run_program

PARTS = ("draw", "describe", "ask")
SHEET = 48  # pictures: eight columns, six rows
FIRST_SCENE = 1 << 36  # far from the small seeds of training pools, and from the judge's own


@dataclass
class Config:
    """What to measure. concepts, styles and kind_weights: what the model was trained on; see `trained_on`."""

    data: str = ""
    model: str | None = None  # None: the shipped one
    out: str = "runs/judged"
    parts: list[str] = field(default_factory=lambda: list(PARTS))
    concepts: int | None = None
    styles: list[str] | None = None
    kind_weights: dict[str, float] | None = None
    recipe: str | None = None
    scenes: int = 300  # of each set: training and held-out captions to draw, held-out pictures to describe ...
    questions: int = 600  # drawn by chance from all questions about the held-out pictures
    judged_renders: int = 600  # to measure the judge itself
    steps: int | None = None  # of drawing; None: the model's preset
    guidance: float | None = None
    batch_size: int = 32
    seed: int = 0
    device: str = "cpu"
    judge_concepts: int = 300  # that the judge tells apart at least: among few, any blob is right by luck too often
    judge: JudgeSettings = field(default_factory=JudgeSettings)
    judge_cache: str | None = None  # None: $XDG_CACHE_HOME/mmdlm


def main(arguments: list[str]) -> None:
    config = config_from_arguments(Config, arguments, program=__file__)
    unknown = sorted(set(config.parts) - set(PARTS))
    if unknown or not config.parts or config.scenes < 1:
        raise InputError(
            f"parts is {config.parts}, scenes {config.scenes}: expected some of {', '.join(PARTS)}, and 1 or more."
        )
    directory = shipped_model() if config.model is None else Path(config.model)
    draw = TextToImage.from_pretrained(directory)
    torch.nn.Module.to(draw.model, config.device)
    torch.nn.Module.to(draw.visual_tokenizer, config.device)
    draw.set_progress_bar_config(disable=True)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "rows.jsonl").unlink(missing_ok=True)

    # 1. The worlds: what was trained on, what was held out of it, and a style never seen.
    settings, source = trained_on(config, directory)
    size = draw.processor.image_size
    if size % SIDE:
        raise InputError(f"{directory} draws {size} pixels wide, expected a multiple of {SIDE}: judge another.")
    train = PictureWorld(config.data, split="train", resolution=size, **settings)
    held_out = PictureWorld(config.data, split="held_out", resolution=size, **settings)
    run = run_facts(config, arguments, directory, settings, source, draw.presets)
    report = Report(out, run, train)

    # 2. The judge and its own accuracy: on renders it never saw, and on what the tokenizer makes of them.
    if "draw" in config.parts:
        known = max(len(train.concepts), config.judge_concepts) if settings["concepts"] is not None else None
        whole = PictureWorld(config.data, split="all", resolution=SIDE, **(settings | {"concepts": known}))
        judge = cached_judge(whole, config.judge, judge_cache(config), device=config.device)
        scenes = (held_out.scene(FIRST_SCENE + n) for n in itertools.count((config.seed + 1) * 1_000_000))
        renders = list(itertools.islice(filter(is_kept_back, scenes), config.judged_renders))
        judge_itself(judge, renders, draw, report, config)

        # 3. Drawing, from captions of training scenes and of held-out compositions.
        for name, world in (("training captions", train), ("held-out compositions", held_out)):
            judge_drawings(judge, take(world, config.scenes, config.seed), draw, report, config, name)

    # 4. Describing and answering, on renders of held-out compositions; describing also in the style never seen.
    read = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    read.presets = draw.presets
    read.set_progress_bar_config(disable=True)
    seen = take(held_out, config.scenes, config.seed)
    if "describe" in config.parts:
        judge_captions(read, seen, report, config, "held-out compositions")
        unseen = PictureWorld(config.data, split="all", resolution=size, **(settings | {"styles": [HELD_OUT_STYLE]}))
        # That style may have drawings of concepts that the trained styles lack.
        drawn, known = take(unseen, 2 * config.scenes, config.seed), {concept.name for concept in train.concepts}
        drawn = [scene for scene in drawn if all(thing["concept"] in known for thing in scene.facts["objects"])]
        judge_captions(read, drawn[: config.scenes], report, config, f"unseen style {HELD_OUT_STYLE}")
    if "ask" in config.parts:
        judge_answers(read, seen, train, report, config)
    print(report.page())
    print(f"\nwritten to {out}: run.json, results.json, results.md, rows.jsonl, sheets")


# ------------------------------------------------------------------------------------------------- the four parts


def judge_itself(judge: Judge, scenes: list[Scene], draw: TextToImage, report: Report, config: Config) -> None:
    """The judge on renders of held-out compositions, kept back from it too, and on what the tokenizer makes of them."""
    renders = np.stack([scene.image for scene in scenes])
    decoded = []
    for start in range(0, len(renders), config.batch_size):
        pixels = torch.from_numpy(renders[start : start + config.batch_size]).permute(0, 3, 1, 2) / 127.5 - 1
        codes = draw.visual_tokenizer.encode(pixels.to(config.device))
        decoded += [np.asarray(picture) for picture in draw.processor.images(draw.visual_tokenizer.decode(codes))]
    confused: Counter[str] = Counter()
    sets = {"renders of held-out compositions": renders, "the same through the tokenizer": np.stack(decoded)}
    for name, pictures in sets.items():
        rows = []
        for scene, seen in zip(scenes, judge(pictures), strict=True):
            rows.append((scene.facts["kind"], facts_right(scene.facts, seen.facts, judge.concepts)))
            true, found = scene.facts["objects"], seen.facts["objects"]
            if name.startswith("renders") and len(true) == len(found):
                confused.update(f"{a['concept']} -> {b['concept']}" for a, b in zip(true, found, strict=True)
                                if a["concept"] != b["concept"] and a["colour"] is None)
        report.add("judge", name, tally(rows))
    # Look-alikes are named, and still count as wrong.
    report.note("judge", "confused on renders", dict(confused.most_common(12)))


def judge_drawings(
    judge: Judge, scenes: list[Scene], draw: TextToImage, report: Report, config: Config, name: str
) -> None:
    """Draw every scene's canonical caption, and let the judge compare what it sees with the scene's facts."""
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(scenes), config.batch_size), desc=f"drawing {name}", unit="batch"):
        prompts = [scene.caption for scene in scenes[start : start + config.batch_size]]
        # A generator for each picture: what is drawn does not depend on the size of the batch.
        chances = [torch.Generator().manual_seed(config.seed * 1_000_003 + start + n) for n in range(len(prompts))]
        drawn = draw(prompts, num_inference_steps=config.steps, guidance_scale=config.guidance, generator=chances)
        pictures += drawn.images
    rows, exhibits = [], []
    judged = judge(np.stack([np.asarray(picture) for picture in pictures]))
    for scene, picture, seen in zip(scenes, pictures, judged, strict=True):
        right = facts_right(scene.facts, seen.facts, judge.concepts)
        rows.append((scene.facts["kind"], right))
        report.row(part="draw", set=name, prompt=scene.caption, seen=seen.facts, sure=seen.sure, right=right)
        exhibits.append(Exhibit(picture, [(scene.caption, RIGHT)], wrong=not right["all"]))
    report.add("draw", name, tally(rows))
    report.sheet(f"drawn, {name}", exhibits)


def judge_captions(read: ImageToText, scenes: list[Scene], report: Report, config: Config, name: str) -> None:
    """Describe every scene: the canonical caption to the letter, and the facts that the caption states."""
    said: list[str] = []
    for start in tqdm(range(0, len(scenes), config.batch_size), desc=f"describing {name}", unit="batch"):
        images = [Image.fromarray(scene.image) for scene in scenes[start : start + config.batch_size]]
        said += read(images).texts
    rows, exhibits = [], []
    for scene, caption in zip(scenes, said, strict=True):
        right = facts_right(scene.facts, caption_facts(caption, report.world.concepts), report.world.concepts)
        right["exact"] = caption == scene.caption
        rows.append((scene.facts["kind"], right))
        report.row(part="describe", set=name, true=scene.caption, said=caption, right=right)
        lines = [(caption, RIGHT)] if right["exact"] else [(caption, WRONG), (scene.caption, BESIDE)]
        exhibits.append(Exhibit(Image.fromarray(scene.image), lines, wrong=not right["exact"]))
    report.add("describe", name, tally(rows))
    report.sheet(f"captions, {name}", exhibits)


def judge_answers(read: ImageToText, scenes: list[Scene], train: PictureWorld, report: Report, config: Config) -> None:
    """Answers to the letter, for each kind of question; beside them the answers of one who never looks."""
    asked = [(scene, *question) for scene in scenes for question in scene.questions]
    asked = random.Random(config.seed).sample(asked, min(config.questions, len(asked)))
    blind = blind_answers(take(train, 4000, config.seed + 2))
    rows: list[tuple[str, dict[str, bool]]] = []
    for start in tqdm(range(0, len(asked), config.batch_size), desc="answering", unit="batch"):
        batch = asked[start : start + config.batch_size]
        images, questions = [Image.fromarray(case[0].image) for case in batch], [case[1] for case in batch]
        texts = read(images, questions).texts
        for (scene, question, answer, kind), text in zip(batch, texts, strict=True):
            guess = blind[0].get(question, blind[1].get(kind, ""))
            right = {"answer": text == answer, "without looking": guess == answer}
            rows.append((kind, right))
            report.row(part="ask", picture=scene.caption, question=question, true=answer, said=text, right=right)
    report.add("ask", "held-out compositions", tally(rows))


def blind_answers(scenes: Iterable[Scene]) -> tuple[dict[str, str], dict[str, str]]:
    """The most frequent answer to every question in training scenes, and, for others, to every kind of question."""
    by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question, answer, kind in (asked for scene in scenes for asked in scene.questions):
        by_text[question][answer] += 1
        by_kind[kind][answer] += 1
    first = [{key: counts.most_common(1)[0][0] for key, counts in known.items()} for known in (by_text, by_kind)]
    return first[0], first[1]


# ------------------------------------------------------------------------------------------------- settings, results


def trained_on(config: Config, directory: Path) -> tuple[dict[str, Any], str]:
    """The world's settings that the model was trained on, and where they were found.

    What the command says; else the training run's config.yaml, which lies beside its pipeline/; else the YAML `recipe`
    (a file, or a name in train/). Raises InputError where no one says.
    """
    names = ("concepts", "styles", "kind_weights")
    said = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    beside = directory.resolve().parent / "config.yaml"
    recipe: Path | None = None
    if beside.is_file():
        recipe = beside
    elif config.recipe is not None:
        recipe = Path(config.recipe) if Path(config.recipe).is_file() else program_path(f"train/{config.recipe}.yaml")
    found = {}
    if recipe is not None:
        read = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        found = {name: read[name] for name in names if isinstance(read, dict) and name in read}
    settings = {"kind_weights": None} | found | said
    if "styles" not in settings or "concepts" not in settings:
        raise InputError(
            f"What {directory} was trained on is not known, there is no {beside}: "
            "say it with concepts=300 styles=[twemoji], or name the training's YAML with recipe=FILE."
        )
    return settings, " and ".join((["the command"] if said else []) + ([recipe.name] if recipe else []))


def take(world: PictureWorld, count: int, seed: int) -> list[Scene]:
    """`count` scenes of a world, the same for the same seed."""
    return [world.scene(FIRST_SCENE + seed * 1_000_000 + index) for index in range(count)]


def judge_cache(config: Config) -> Path:
    if config.judge_cache is not None:
        return Path(config.judge_cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmdlm"


def run_facts(
    config: Config,
    arguments: list[str],
    directory: Path,
    settings: dict[str, Any],
    source: str,
    presets: dict[str, Any],
) -> dict[str, Any]:
    """All that makes the numbers again."""
    on = torch.cuda.get_device_name() if config.device.startswith("cuda") else f"{platform.machine()} CPU"
    return {
        "command": shlex.join(["mmdlm", "run", "eval/pictures", *arguments]),
        "seed": config.seed,
        "settings": asdict(config),
        "model": {"directory": str(directory), "hash": model_hash(directory), "presets": presets},
        "trained_on": settings | {"said_by": source},
        "versions": {
            "mmdlm": mmdlm.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "diffusers": diffusers.__version__,
        },
        "hardware": f"{on}, {torch.get_num_threads()} threads",
    }  # fmt: skip


class Report:
    """The results while they come: on disk after every part, so that a kill loses one part only."""

    def __init__(self, out: Path, run: dict[str, Any], world: PictureWorld):
        self.out, self.run, self.world, self.started = out, run, world, time.monotonic()
        self.parts: dict[str, dict[str, Any]] = {}
        write_whole(out / "run.json", json.dumps(run, indent=1).encode())

    def add(self, part: str, name: str, counted: dict[str, Any]) -> None:
        self.parts.setdefault(part, {})[name] = counted
        self._write()

    def note(self, part: str, name: str, content: Any) -> None:
        self.parts[part].setdefault("notes", {})[name] = content
        self._write()

    def row(self, **case: Any) -> None:
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(case, ensure_ascii=False) + "\n")

    def sheet(self, name: str, exhibits: Sequence[Exhibit]) -> None:
        path = self.out / f"{name.replace(',', '').replace(' ', '-')}.png"
        labelled_sheet(exhibits[:SHEET]).save(path)

    def _write(self) -> None:
        whole = {"run": self.run, "seconds": round(time.monotonic() - self.started), **self.parts}
        write_whole(self.out / "results.json", json.dumps(whole, indent=1, ensure_ascii=False).encode())
        write_whole(self.out / "results.md", (self.page() + "\n").encode())

    def page(self) -> str:
        """Markdown: one table for each part; a share in percent with its 95 % interval."""
        trained = self.run["trained_on"]
        lines = [
            f"`{self.run['command']}`",
            "",
            f"Model {self.run['model']['hash']}, {len(self.world.concepts)} concepts, styles "
            f"{', '.join(trained['styles'])} (said by {trained['said_by']}), {self.run['hardware']}, "
            f"seed {self.run['seed']}. Wilson 95 % intervals.",
        ]
        if "judge" in self.parts:
            heads = {"judge": "the judge on ", "draw": "drawn from "}
            rows = [(heads[part] + name, counted) for part in heads for name, counted in self._sets(part)]
            lines += ["", *table("drawing", [*FACTS], [(name, counted["all kinds"]) for name, counted in rows])]
            for name, counted in rows[1:]:
                kinds = [(kind, facts) for kind, facts in counted.items() if kind != "all kinds"]
                lines += ["", *table(name, [*FACTS], kinds)]
            confused = self.parts["judge"].get("notes", {}).get("confused on renders", {})
            told = ", ".join(f"{pair} ({count})" for pair, count in confused.items()) or "nothing"
            lines += ["", f"What the judge confused on renders (it counts as wrong): {told}."]
        for name, counted in self._sets("describe"):
            lines += ["", *table(f"captions: {name}", ["exact", *FACTS], list(counted.items()))]
        for name, counted in self._sets("ask"):
            lines += ["", *table(f"answers: {name}", ["answer", "without looking"], list(counted.items()))]
        return "\n".join(lines)

    def _sets(self, part: str) -> list[tuple[str, Any]]:
        return [(name, counted) for name, counted in self.parts.get(part, {}).items() if name != "notes"]


def table(title: str, columns: list[str], rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Markdown rows; the number of cases stands beside each name."""
    lines = [f"| {title} | cases | " + " | ".join(columns) + " |", "|---|---:|" + "---|" * len(columns)]
    for name, facts in rows:
        cases = max(counted["total"] for counted in facts.values())
        cells = (percent(facts.get(column, share(0, 0))) for column in columns)
        lines.append(f"| {name} | {cases} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    run_program(main)

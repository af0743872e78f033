"""What a model of the picture world can do: pictures drawn from captions, captions and answers about pictures.

    mmdlm run eval/pictures --config pictures model=RUN/pipeline data=PICTURES out=RUN/judged
    mmdlm run eval/pictures --config pictures data=PICTURES scenes=48 parts=[draw]     # the shipped model, a quick look
    accelerate launch --num_processes 2 "$(mmdlm path eval/pictures)" --config pictures data=PICTURES

Drawn pictures are judged by a small classifier trained on renders only (`mmdlm.evaluation.judge`); its own accuracy on
held-out renders, and on what the model's tokenizer makes of them (the ceiling for anything drawn), stands beside every
score. Captions and answers are compared with the truth. Every share has its Wilson 95 % interval.

Written to `out`: run.json (what makes the numbers again), results.json, results.md (the printed tables), rows.jsonl
(every single case), the drawn pictures, and sheets as PNG. A run that was killed goes on from what is in `out`. Nothing
here trains or tunes anything on what a model drew.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
import yaml
from PIL import Image

import mmdlm
from mmdlm.assets import shipped_model
from mmdlm.data.drawings import HELD_OUT_STYLE
from mmdlm.data.scenes import PictureWorld, Scene
from mmdlm.errors import InputError
from mmdlm.evaluation.geneval import CLASSES, class_right, class_scenes
from mmdlm.evaluation.intervals import mean_of_shares, share
from mmdlm.evaluation.judge import SIDE, Judge, JudgeSettings, cached_judge, is_kept_back
from mmdlm.evaluation.picture_report import Report, slug
from mmdlm.evaluation.processes import share as share_of_work
from mmdlm.evaluation.scene_facts import caption_facts, facts_right, tally
from mmdlm.evaluation.sheets import BESIDE, RIGHT, WRONG, Exhibit
from mmdlm.model_directory import model_hash
from mmdlm.picture_files import png, write_whole
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.processing import load_image
from mmdlm.programs import program_path
from mmdlm.training.arguments import config_from_arguments, run_program

PARTS = ("draw", "geneval", "describe", "ask")
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
    prompts: int = 50  # of each of GenEval's six classes, once of training scenes and once of held-out compositions
    judged_renders: int = 600  # to measure the judge itself; 0: it is known
    steps: int | None = None  # of drawing; None: the model's preset
    guidance: float | None = None
    answer_steps: int | None = None  # of describing and answering; None: the model's presets
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
    mine = share_of_work()
    directory = shipped_model() if config.model is None else Path(config.model)
    draw = TextToImage.from_pretrained(directory)
    torch.nn.Module.to(draw.model, config.device)
    torch.nn.Module.to(draw.visual_tokenizer, config.device)
    draw.set_progress_bar_config(disable=True)
    out = Path(config.out)

    # 1. The worlds: what was trained on, what was held out of it, and a style never seen.
    settings, source = trained_on(config, directory)
    size = draw.processor.image_size
    if size % SIDE:
        raise InputError(f"{directory} draws {size} pixels wide, expected a multiple of {SIDE}: judge another.")
    train = PictureWorld(config.data, split="train", resolution=size, **settings)
    held_out = PictureWorld(config.data, split="held_out", resolution=size, **settings)
    run = run_facts(config, arguments, directory, settings, source, draw.presets) | {"concepts": len(train.concepts)}
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    asked = ("seed", "steps", "guidance", "answer_steps", "device")
    begun_with = {name: getattr(config, name) for name in asked} | {"model": run["model"]["hash"], "world": settings}
    report = Report(out, run, begun_with=begun_with, batch_size=config.batch_size, is_main=mine.is_main)

    # 2. The judge and its own accuracy: on renders it never saw, and on what the tokenizer makes of them.
    judge = None
    if mine.is_main and {"draw", "geneval"} & set(config.parts):
        known = max(len(train.concepts), config.judge_concepts) if settings["concepts"] is not None else None
        whole = PictureWorld(config.data, split="all", resolution=SIDE, **(settings | {"concepts": known}))
        judge = cached_judge(whole, config.judge, judge_cache(config), device=config.device)
    if judge is not None and "draw" in config.parts and config.judged_renders:
        judge_itself(judge, held_out, draw, report, config)

    # 3. Drawing, from captions of training scenes and of held-out compositions; then GenEval's classes of prompts.
    worlds = {"training captions": train, "held-out compositions": held_out}
    for name, world in worlds.items():
        if "draw" in config.parts:
            judge_drawings(judge, take(world, config.scenes, config.seed), draw, report, config, name)
    if "geneval" in config.parts:
        judge_classes(judge, worlds, draw, report, config)

    # 4. Describing and answering, on renders of held-out compositions; describing also in the style never seen.
    read = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    read.presets = draw.presets
    read.set_progress_bar_config(disable=True)
    seen = take(held_out, config.scenes, config.seed)
    if "describe" in config.parts:
        judge_captions(read, seen, train, report, config, "held-out compositions")
        unseen = PictureWorld(config.data, split="all", resolution=size, **(settings | {"styles": [HELD_OUT_STYLE]}))
        # That style may have drawings of concepts that the trained styles lack.
        drawn, known = take(unseen, 2 * config.scenes, config.seed), {concept.name for concept in train.concepts}
        drawn = [scene for scene in drawn if all(thing["concept"] in known for thing in scene.facts["objects"])]
        judge_captions(read, drawn[: config.scenes], train, report, config, f"unseen style {HELD_OUT_STYLE}")
    if "ask" in config.parts:
        judge_answers(read, seen, train, report, config)
    report.finish()


# ------------------------------------------------------------------------------------------------- the four parts


def judge_itself(judge: Judge, held_out: PictureWorld, draw: TextToImage, report: Report, config: Config) -> None:
    """The judge on renders of held-out compositions, kept back from it too, and on what the tokenizer makes of them."""
    seeds = itertools.count(FIRST_SCENE + (config.seed + 1) * 1_000_000)
    scenes = list(itertools.islice(filter(is_kept_back, map(held_out.scene, seeds)), config.judged_renders))
    confused: Counter[str] = Counter()
    for name, pictures in renders_and_decoded(scenes, draw, config).items():
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


def renders_and_decoded(scenes: list[Scene], draw: TextToImage, config: Config) -> dict[str, np.ndarray]:
    """The scenes as they are, and as the tokenizer decodes them: uint8 [N, H, H, 3]."""
    renders = np.stack([scene.image for scene in scenes])
    decoded = []
    for start in range(0, len(renders), config.batch_size):
        pixels = torch.from_numpy(renders[start : start + config.batch_size]).permute(0, 3, 1, 2) / 127.5 - 1
        codes = draw.visual_tokenizer.encode(pixels.to(config.device))
        decoded += [np.asarray(picture) for picture in draw.processor.images(draw.visual_tokenizer.decode(codes))]
    return {"renders of held-out compositions": renders, "the same through the tokenizer": np.stack(decoded)}


def drawings(
    scenes: list[Scene], draw: TextToImage, report: Report, config: Config, name: str
) -> list[Image.Image] | None:
    """A drawing of every scene's canonical caption; None but in the first process."""
    folder = report.out / "pictures"

    def work(numbers: list[int], scenes: list[Scene]) -> list[dict[str, Any]]:
        # A generator for each picture: what is drawn depends neither on the batch nor on the number of processes.
        chances = [torch.Generator().manual_seed(config.seed * 1_000_003 + number) for number in numbers]
        prompts = [scene.caption for scene in scenes]
        drawn = draw(prompts, num_inference_steps=config.steps, guidance_scale=config.guidance, generator=chances)
        rows = [{"picture": f"{slug(name)}-{number:05}.png", "prompt": prompt}
                for number, prompt in zip(numbers, prompts, strict=True)]
        for row, picture, chance in zip(rows, drawn.images, chances, strict=True):
            facts = {"prompt": row["prompt"], **report.facts, "seed": chance.initial_seed()}
            write_whole(folder / row["picture"], png(picture, facts))
        return rows

    rows = report.run_batches(f"drawn-{slug(name)}", scenes, work)
    if rows is None:
        return None
    if missing := [row["picture"] for row in rows if not (folder / row["picture"]).is_file()]:
        raise InputError(f"{folder} has lost {len(missing)} pictures, {missing[0]} for one: delete {report.out}.")
    return [load_image(folder / row["picture"]) for row in rows]


def judge_drawings(
    judge: Judge | None, scenes: list[Scene], draw: TextToImage, report: Report, config: Config, name: str
) -> None:
    """Draw every scene's canonical caption, and let the judge compare what it sees with the scene's facts."""
    pictures = drawings(scenes, draw, report, config, name)
    if pictures is None or judge is None:
        return
    rows, exhibits = [], []
    judged = judge(np.stack([np.asarray(picture) for picture in pictures]))
    for number, (scene, picture, seen) in enumerate(zip(scenes, pictures, judged, strict=True)):
        right = facts_right(scene.facts, seen.facts, judge.concepts)
        rows.append((scene.facts["kind"], right))
        report.row("draw", name, number, right["all"], prompt=scene.caption, seen=seen.facts, sure=seen.sure,
                   right=right)
        exhibits.append(Exhibit(picture, [(scene.caption, RIGHT)], wrong=not right["all"]))
    report.add("draw", name, tally(rows))
    report.sheet(f"drawn, {name}", exhibits)


def judge_classes(
    judge: Judge | None, worlds: dict[str, PictureWorld], draw: TextToImage, report: Report, config: Config
) -> None:
    """GenEval's classes: what is drawn from their prompts, beside what the judge makes of real pictures of them."""
    ceilings = {}
    first = FIRST_SCENE + (1 << 34) + config.seed * 10_000_000
    held_out = worlds["held-out compositions"]
    for name in CLASSES if judge is not None and config.judged_renders else ():
        count = -(-config.judged_renders // len(CLASSES))
        scenes = class_scenes(held_out, name, count, first=first + (1 << 32), keep=is_kept_back)
        sets = renders_and_decoded(scenes, draw, config).values()
        ceilings[name] = [class_share(judge, name, scenes, pictures) for pictures in sets]
    for title, world in worlds.items():
        scenes = {name: class_scenes(world, name, config.prompts, first=first) for name in CLASSES}
        pictures = drawings(list(itertools.chain(*scenes.values())), draw, report, config, f"classes, {title}")
        if pictures is None or judge is None:
            continue
        counted: dict[str, dict[str, Any]] = {}
        for place, name in enumerate(CLASSES):
            own = np.stack([np.asarray(picture) for picture in pictures[place * config.prompts :][: config.prompts]])
            real, through = ceilings.get(name, (share(0, 0), share(0, 0)))
            counted[name] = {
                "drawn": class_share(judge, name, scenes[name], own, report, title),
                "the judge on renders": real,
                "the judge on renders through the tokenizer": through,
            }
        means = {column: mean_of_shares([row[column] for row in counted.values()]) for column in counted["colors"]}
        report.add("geneval", title, counted | {"mean of classes": means})


def class_share(
    judge: Judge, name: str, scenes: list[Scene], pictures: np.ndarray, report: Report | None = None, title: str = ""
) -> dict[str, Any]:
    """How many pictures are right in what their class asks for; each case goes into the report, if there is one."""
    right = []
    for number, (scene, seen) in enumerate(zip(scenes, judge(pictures), strict=True)):
        right.append(class_right(name, scene.facts, seen.facts, judge.concepts))
        if report is not None:
            report.row("geneval", f"{title}, {name}", number, right[-1], prompt=scene.caption, seen=seen.facts)
    return share(sum(right), len(right))


def judge_captions(
    read: ImageToText, scenes: list[Scene], train: PictureWorld, report: Report, config: Config, name: str
) -> None:
    """Describe every scene: the canonical caption to the letter, and the facts that the caption states."""

    def work(numbers: list[int], scenes: list[Scene]) -> list[dict[str, Any]]:
        texts = read([Image.fromarray(scene.image) for scene in scenes],
                     num_inference_steps=config.answer_steps, generator=chances(numbers)).texts
        return [{"said": text} for text in texts]

    said = report.run_batches(f"captions-{slug(name)}", scenes, work)
    if said is None:
        return
    rows, exhibits = [], []
    for number, (scene, caption) in enumerate(zip(scenes, (row["said"] for row in said), strict=True)):
        right = facts_right(scene.facts, caption_facts(caption, train.concepts), train.concepts)
        right["exact"] = caption == scene.caption
        rows.append((scene.facts["kind"], right))
        report.row("describe", name, number, right["exact"], true=scene.caption, said=caption, right=right)
        lines = [(caption, RIGHT)] if right["exact"] else [(caption, WRONG), (scene.caption, BESIDE)]
        exhibits.append(Exhibit(Image.fromarray(scene.image), lines, wrong=not right["exact"]))
    report.add("describe", name, tally(rows))
    report.sheet(f"captions, {name}", exhibits)


def judge_answers(
    read: ImageToText, scenes: list[Scene], train: PictureWorld, report: Report, config: Config
) -> None:
    """Answers to the letter, for each kind of question; beside them the answers of one who never looks."""
    asked = [(scene, *question) for scene in scenes for question in scene.questions]
    asked = random.Random(config.seed).sample(asked, min(config.questions, len(asked)))

    def work(numbers: list[int], cases: list[tuple[Scene, str, str, str]]) -> list[dict[str, Any]]:
        images, questions = [Image.fromarray(case[0].image) for case in cases], [case[1] for case in cases]
        texts = read(images, questions, num_inference_steps=config.answer_steps, generator=chances(numbers)).texts
        return [{"said": text} for text in texts]

    said = report.run_batches("answers", asked, work)
    if said is None:
        return
    blind = blind_answers(take(train, 4000, config.seed + 2))
    rows: list[tuple[str, dict[str, bool]]] = []
    for number, ((scene, question, answer, kind), row) in enumerate(zip(asked, said, strict=True)):
        guess = blind[0].get(question, blind[1].get(kind, ""))
        right = {"answer": row["said"] == answer, "without looking": guess == answer}
        rows.append((kind, right))
        report.row("ask", "held-out compositions", number, right["answer"], picture=scene.caption, question=question,
                   true=answer, said=row["said"], right=right)
    report.add("ask", "held-out compositions", tally(rows))


def chances(numbers: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


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
        "kind": "pictures",
        # without its directory: `mmdlm eval reproduce` gives another
        "command": ["mmdlm", "run", "eval/pictures", *(word for word in arguments if not word.startswith("out="))],
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


if __name__ == "__main__":
    run_program(main)

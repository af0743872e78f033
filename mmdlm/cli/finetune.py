"""`mmdlm finetune` and `mmdlm merge`: one's own pictures and captions into the model, in both directions.

finetune looks at the data, holds some out, says what memory it needs, measures the model, lets it rehearse what it
knows, runs the program train/supervised, and measures again. Every part is kept in the run's directory, so that the
same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuietOption, load_pipeline, model_facts
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.data.paired import PairedData

MEASURED = 48  # pictures of each set that are measured before and after
REHEARSED = 400  # pictures of the model's own, at which it has to go on saying what it said
KEPT = 1.5  # of a step's rows for each of the data's
CLOSENESS = {"adapter": 16.0, "full": 100.0}  # of what it thinks at them to what it thought: see `Lesson`
ROWS_A_PICTURE, FEWEST_ROWS, MOST_ROWS = 700, 6_000, 600_000
LEARNING_RATES = {"adapter": 3e-3, "full": 4e-4}  # at a width of 192; wider models take less, in proportion


def finetune(
    data: Annotated[str, typer.Argument(metavar="DIR", help="Pictures and captions: a folder, parquet, tars, a name.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Other settings of train/supervised.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "--output_dir", help="The run's directory; runs/finetune-DIR if not given.")
    ] = None,
    model: ModelOption = None,
    full: Annotated[bool, typer.Option("--full", help="Train all weights, not an adapter (LoRA) beside them.")] = False,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the adapter.")] = 32,
    max_train_steps: Annotated[
        int | None, typer.Option("--max-train-steps", "--max_train_steps", min=1, help="By the data's size by default.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--learning_rate", help="By the model's width if not given.")
    ] = None,
    train_batch_size: Annotated[
        int, typer.Option("--train-batch-size", "--train_batch_size", min=1, help="Rows of a step.")
    ] = 8,
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient-accumulation-steps", "--gradient_accumulation_steps", min=1, help="Of a step.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", "--gradient_checkpointing", help="Less memory, more time.")
    ] = False,
    mixed_precision: Annotated[
        str, typer.Option("--mixed-precision", "--mixed_precision", help="no, bf16 or fp16.")
    ] = "no",
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Side of a picture in pixels; the model's if not given.")
    ] = None,
    held_out_share: Annotated[
        float, typer.Option("--held-out-share", "--held_out_share", help="Of the pictures, only measured on.")
    ] = 0.125,
    new_word: Annotated[
        list[str] | None, typer.Option("--new-word", help="A word that gets an id of its own; may be repeated.")
    ] = None,
    find_new_words: Annotated[
        bool, typer.Option("--new-words/--no-new-words", help="Without --new-word: find those that the model spells.")
    ] = True,
    replay: Annotated[
        list[str] | None,
        typer.Option("--replay", help="What the model knows (a picture world, a folder) and keeps; may be repeated."),
    ] = None,
    rehearse: Annotated[
        int, typer.Option("--rehearse", min=0, help="Without --replay: pictures of its own to see beside; 0 forgets.")
    ] = REHEARSED,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of split, rows and noise.")] = 0,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Teach the model your pictures: it then draws them from words and describes them, and keeps what it knew.

    Prints likelihood, captions and drawings before and after. The result is an adapter that --adapter OUT loads, or,
    with --full, the model directory OUT/pipeline. The same command goes on where it was stopped.
    """
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import check_model_directory, model_hash

    if not 0 < held_out_share < 1:
        raise InputError(f"--held-out-share is {held_out_share}, expected a share above 0 and below 1.")
    if rehearse == 1:
        raise InputError("--rehearse is 1, expected 0 or at least 2 pictures: some of them are held out, too.")
    if mixed_precision not in ("no", "bf16", "fp16"):
        raise InputError(f"--mixed-precision is {mixed_precision!r}, expected no, bf16 or fp16.")
    for given in settings or []:
        if "=" not in given:
            raise InputError(f"Got {given!r} after the data, expected KEY=VALUE as train/supervised takes them.")
    base = model if model is not None else shipped_model()
    check_model_directory(base)
    run = out if out is not None else Path("runs") / f"finetune-{Path(data).resolve().name}"
    train, held_out = _open_data(data, held_out_share, seed)
    steps = max_train_steps or default_steps(len(train), train_batch_size * gradient_accumulation_steps)
    asked: dict[str, Any] = {
        "full": full, "rank": rank, "max_train_steps": steps, "train_batch_size": train_batch_size,
        "learning_rate": learning_rate or default_learning_rate(base, full),
        "closeness": CLOSENESS["full" if full else "adapter"],
        "gradient_accumulation_steps": gradient_accumulation_steps, "gradient_checkpointing": gradient_checkpointing,
        "mixed_precision": mixed_precision, "held_out_share": held_out_share, "seed": seed,
    }  # fmt: skip
    if resolution is not None:
        asked["resolution"] = resolution
    _check_memory(base, asked, device, keeps=bool(replay or rehearse))
    pipe = load_pipeline("TextToImage", base, device, True, own="fine-tuning")
    words = list(new_word or [])
    if find_new_words and not words and not pipe.model.config.tie_word_embeddings:  # a tied table cannot grow
        words = words_to_add(train, pipe.processor)
    if words:
        asked["new_words"] = as_written(words, train)
        typer.echo(f"words with ids of their own: {', '.join(words)}" + ("" if new_word else " (--no-new-words: none)"))
    identity: dict[str, Any] = {"hashes": _content(train, held_out)}
    identity |= {"data": str(Path(data).resolve()) if Path(data).exists() else data}
    identity |= {"model": model_hash(base), "replay": replay or [], "rehearse": rehearse, "settings": settings or []}
    _open_run(run, identity | asked)

    sets = {"held out": held_out, "trained on": train}
    before = _measured(pipe, sets, run / "before", quiet)
    others = list(replay or [])
    if not others and rehearse:
        others = [str(_rehearsed(pipe, base, train, run, rehearse, seed, quiet))]
    asked |= {"caption_length": pipe.presets["describe"]["answer_length"]}
    asked |= {"answer_length": pipe.presets["ask"]["answer_length"]}
    del pipe
    _train(run, base, [data, *others], asked, settings or [])

    pipe = load_pipeline("TextToImage", run / "pipeline" if full else base, device, True, adapter=None if full else run)
    after = _measured(pipe, sets, run / "after", quiet)
    _report(run, sets, before, after, full, base if model is not None else None, model_facts(pipe))


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `mmdlm finetune` wrote, or its adapter.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The model directory to write; must not exist.")],
    model: ModelOption = None,
) -> None:
    """Add an adapter to its model's weights: a model directory that needs no --adapter, in the model's precision."""
    import shutil
    import tempfile

    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import COMPONENTS, check_model_directory
    from mmdlm.models.adapters import adapter_directory

    base = model if model is not None else shipped_model()
    check_model_directory(base)
    adapter_directory(run)
    if os.path.lexists(output):
        raise InputError(f"{output} is there already, expected a new directory: give another with -o.")
    import torch

    from mmdlm.models.adapters import merge_adapter
    from mmdlm.models.new_words import new_words
    from mmdlm.pipelines import TextToImage

    stored = json.loads((base / "model" / "config.json").read_text(encoding="utf-8")).get("dtype") or "float32"
    pipe = TextToImage.from_pretrained(base, adapter=run, dtype=getattr(torch, stored))
    grown = new_words(pipe.model)
    merge_adapter(pipe.model)
    output.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=output.parent))
    try:
        # The other parts as they are, to the byte; of the model only the weights are others.
        for part in COMPONENTS[1:]:
            shutil.copytree(base / part, place / part)
        if grown:
            shutil.rmtree(place / "processor")
            pipe.processor.save_pretrained(place / "processor")
        words = adapter_directory(run) / "rehearsal.jsonl"  # the run's, where there is one: the new beside the old
        for file in [*base.glob("*.json*"), *([words] if words.is_file() else [])]:
            shutil.copy(file, place)
        pipe.model.save_pretrained(place / "model")
        check_model_directory(place)
        place.chmod(0o755)  # what mkdtemp makes is for its owner alone
        os.replace(place, output)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    typer.echo(output)


def default_steps(pictures: int, rows_a_step: int) -> int:
    """Steps for so many pictures: each comes a few hundred times where they are few, once at least where many."""
    rows = min(max(ROWS_A_PICTURE * pictures, FEWEST_ROWS), max(MOST_ROWS, pictures))
    return -(-rows // rows_a_step)


def default_learning_rate(base: Path, full: bool) -> float:
    """The peak rate for the model in the directory `base`: LEARNING_RATES times 192 / width, rounded to two digits."""
    trunk = json.loads((base / "model" / "config.json").read_text(encoding="utf-8"))["trunk"]
    return float(f"{LEARNING_RATES['full' if full else 'adapter'] * 192 / trunk['hidden_size']:.2g}")


def spelled_words(texts: Iterable[str], text_ids: Callable[[str], list[int]]) -> list[str]:
    """Words that come at least twice in the texts and are more than one token, the commonest first; at most 20."""
    counts = Counter(word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text))
    return [word for word, count in counts.most_common() if count > 1 and len(text_ids(f" {word}")) > 1][:20]


def words_to_add(data: PairedData, processor: Any) -> list[str]:
    """The `spelled_words` of the data that the model will have to write, in captions or answers.

    What is spelled in pieces is drawn after ten minutes and not yet written, for the pieces are found in any order
    (docs/log.md). Words of prompts alone are only read, which pieces do as well.
    """
    written = [row.texts[0] for row in data.rows if row.texts]
    written += [answer for row in data.rows for _, answers in row.questions for answer in answers[:1]]
    known = set(re.findall(r"[^\W\d_]{2,}", " ".join(written)))
    texts = [text for row in data.rows for text in row.texts]
    known -= set(processor.tokenizer.get_vocab())  # where it begins a text it has an id already
    return [word for word in spelled_words(texts, processor.text_ids) if word in known]


def as_written(words: Sequence[str], data: PairedData) -> list[str]:
    """The words as they stand in the data: with the space before them, " crab", without, where they begin a text, or
    both; what it does not have with the space."""
    texts = [text for row in data.rows for text in row.texts]
    texts += [text for row in data.rows for question, answers in row.questions for text in (question, *answers)]
    found = []
    for word in words:
        forms = {match.group() for text in texts for match in re.finditer(rf" ?(?<!\w){re.escape(word)}(?!\w)", text)}
        found += sorted(forms) or [f" {word}"]
    return found


def _open_data(source: str, held_out_share: float, seed: int) -> tuple[PairedData, PairedData]:
    from mmdlm.data.paired import open_pairs, split_pairs

    pairs = open_pairs(source)
    for where, reason in pairs.problems[:3]:
        typer.echo(f"left out: {where}: {reason}", err=True)
    if len(pairs.problems) > 3:
        typer.echo(f"and {len(pairs.problems) - 3} more: mmdlm data validate {source} names them all", err=True)
    if not any(row.texts for row in pairs.rows):
        why = f", {len(pairs.problems)} rows are broken" if pairs.problems else ""
        raise InputError(f"{source} has no picture with a caption{why}: see `mmdlm data validate {source}`.")
    train, held_out = split_pairs(pairs, held_out_share=held_out_share, seed=seed)
    if not all(any(row.texts for row in part.rows) for part in (train, held_out)):
        raise InputError(f"{source} has too few pictures with captions to hold some out: add some, or another --seed.")
    typer.echo(f"{len(pairs)} pictures in {source}: {len(train)} to train on, {len(held_out)} held out")
    return train, held_out


def _content(*parts: PairedData) -> str:
    import hashlib

    words = [(row.key, row.texts, row.questions) for part in parts for row in part.rows]
    return hashlib.sha256(repr([[part.hashes for part in parts], words]).encode()).hexdigest()[:16]


def _check_memory(base: Path, asked: dict[str, Any], device: str | None, keeps: bool) -> None:
    """Prints what the run needs. Raises InputError where that is more than is free; nothing is loaded for it."""
    import torch

    from mmdlm.cli.loading import usable_device
    from mmdlm.models.adapters import lora_parameters
    from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
    from mmdlm.training.memory import check_fits, free_memory, shown, training_memory

    with torch.device("meta"):
        shape = MaskPredictor(MaskPredictorConfig.from_pretrained(base / "model"))
    codes = shape.config.image_side**2
    where = torch.device(usable_device(device))
    rank = 0 if asked["full"] else asked["rank"]
    needed = training_memory(
        shape,
        rows=asked["train_batch_size"],
        length=shape.config.max_positions if not codes else min(shape.config.max_positions, codes + 64),
        trainable=lora_parameters(shape, rank) if rank else None,
        rank=rank,
        image_tokens=codes,
        mixed_precision=asked["mixed_precision"],
        gradient_checkpointing=asked["gradient_checkpointing"],
        teacher=asked["full"] and keeps,
        on_cpu=where.type == "cpu",
    )
    typer.echo(f"memory on {where}, {shown(free_memory(where))} free: {needed}")
    check_fits(needed, where)


def _open_run(run: Path, identity: dict[str, Any]) -> None:
    """Makes the run's directory, or finds the same run in it. Raises InputError where another one is there."""
    from mmdlm.evaluation.result_files import read_json, write_json

    file = run / "finetune.json"
    if file.is_file():
        found = read_json(file)
        changed = sorted(key for key in identity if found.get(key) != identity[key])
        if changed:
            raise InputError(f"{run} holds a run with other settings ({', '.join(changed)}): give another --out.")
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{run} cannot be made ({error.strerror}): choose another --out.") from error
    if any(run.iterdir()):
        raise InputError(f"{run} is not empty and holds no run of finetune: give another --out.")
    write_json(file, identity)


def _measured(pipe: Any, sets: dict[str, PairedData], place: Path, quiet: bool) -> dict[str, Any]:
    """`mmdlm.evaluation.before_after.Measured` of each set, kept in `place`."""
    from mmdlm.evaluation.before_after import load_measured, measure, save_measured
    from mmdlm.pipelines import ImageToText

    read = ImageToText(pipe.model, pipe.visual_tokenizer, pipe.processor)
    read.presets = pipe.presets
    for each in (pipe, read):
        each.set_progress_bar_config(disable=True)
    found = {}
    for name, data in sets.items():
        kept = place / name.replace(" ", "-")
        measured = load_measured(kept)
        if measured is None:
            if not quiet:
                typer.echo(f"measuring {place.name}: {min(len(data), MEASURED)} pictures {name}")
            pairs = [data[n] for n in range(min(len(data), MEASURED))]
            measured = measure(pipe, read, pairs)
            prompts = [pair.texts[0] for pair in pairs if pair.texts]
            save_measured(measured, kept, prompts=prompts, facts=model_facts(pipe))
        found[name] = measured
    return found


def _rehearsed(pipe: Any, base: Path, data: PairedData, run: Path, count: int, seed: int, quiet: bool) -> Path:
    from mmdlm.pipelines.rehearsal import rehearse
    from mmdlm.training.known_words import read_words

    known = read_words(base)
    questions = list(dict.fromkeys(question for row in data.rows for question, _ in row.questions))[:4]
    if not quiet:
        typer.echo(f"rehearsing: the model draws up to {count} pictures of what it knows")
    made, tried = rehearse(pipe, run / "rehearsal", count=count, known=known, questions=questions, seed=seed)
    typer.echo(f"rehearsal: {made} pictures of the model's own" + (f", of {tried} tried" if tried > made else ""))
    return run / "rehearsal"


def _train(run: Path, base: Path, sources: list[str], asked: dict[str, Any], settings: list[str]) -> None:
    """Runs train/supervised to its end on the first source, while what the model says of the others is kept; on
    SIGTERM it saves a checkpoint, and so does this."""
    from mmdlm.programs import program_path

    steps = asked["max_train_steps"]
    if (run / f"checkpoint-{steps}").is_dir() and ((run / "adapter").is_dir() or (run / "pipeline").is_dir()):
        return
    kept = [{"path": path, "weight": KEPT / (len(sources) - 1), "keep": True} for path in sources[1:]]
    asked = asked | {"out": str(run), "init_from": str(base), "data": [{"path": sources[0]}, *kept]}
    # The settings that say how often, in steps, follow the number of steps.
    asked |= {"lr_warmup_steps": max(steps // 20, 1), "validation_steps": max(steps // 4, 1)}
    asked |= {"checkpointing_steps": max(steps // 10, 1), "logging_steps": max(steps // 20, 1)}
    words = [f"{key}={json.dumps(value)}" for key, value in asked.items()]
    program = program_path("train/supervised")
    child = subprocess.Popen([sys.executable, str(program), "--config", "finetune", *words, *settings])
    previous = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        code = child.wait()
    except KeyboardInterrupt:
        code = child.wait() or 130  # it got the same signal and is saving
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code == 0 and not (run / f"checkpoint-{steps}").is_dir():
        typer.echo(f"stopped before step {steps}: the same command goes on from the last checkpoint in {run}")
        raise typer.Exit(0)
    if code:
        typer.echo(f"training ended with code {code}; the last checkpoint in {run} is whole", err=True)
        raise typer.Exit(code if code > 0 else 128 - code)


def _report(
    run: Path, sets: dict[str, PairedData], before: dict[str, Any], after: dict[str, Any], full: bool,
    base: Path | None, facts: dict[str, str],
) -> None:  # fmt: skip
    """Prints what changed and how to use it; writes the numbers and the sheets, which carry `facts`: of the model after
    its training."""
    from mmdlm.evaluation.before_after import before_after_sheet, comparison
    from mmdlm.evaluation.result_files import write_json
    from mmdlm.picture_files import png, write_whole

    results = {}
    for name, data in sets.items():
        pairs = [data[n] for n in range(min(len(data), MEASURED))]
        typer.echo(f"\n{name}, {len(pairs)} of {len(data)} pictures")
        for line in comparison(before[name], after[name]):
            typer.echo(line)
        content = png(before_after_sheet(pairs, before[name], after[name]), facts)
        write_whole(run / f"before-after-{name.replace(' ', '-')}.png", content)
        results[name] = {"before": before[name].numbers, "after": after[name].numbers, "pictures": len(pairs)}
    write_json(run / "results.json", results)
    prompt = next(row.texts[0] for row in sets["trained on"].rows if row.texts)
    given = f"--model {run / 'pipeline'}" if full else f"--adapter {run}" + (f" --model {base}" if base else "")
    typer.echo(f"\nsheets: {run}/before-after-*.png; training: {run}/report.html")
    typer.echo(f'mmdlm generate "{prompt}" {given}')
    if not full:
        typer.echo(f"mmdlm merge {run} -o {run}-merged" + (f" --model {base}" if base else ""))

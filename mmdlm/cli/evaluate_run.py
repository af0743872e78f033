"""What all of `mmdlm eval` shares: the command as it was given, the model's answers with resuming, and run.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.evaluation.vqa import Scores

OutOption = Annotated[Path, typer.Option("-o", "--output", help="Directory for run.json, rows.jsonl and result files.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Case i uses seed + i.")]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Rows in one forward.")]
PicturesOption = Annotated[
    Path | None, typer.Option("--pictures", help="Folder of the pictures; the model then answers.")
]
AnswersOption = Annotated[
    Path | None, typer.Option("--answers", help="Result file to score instead of asking a model.")
]
_NOT_SETTINGS = ("output", "quiet")


def command_line(ctx: typer.Context) -> list[str]:
    """The command that makes this run again, without its output directory: defaults are left out."""
    words = ["mmdlm", "eval", str(ctx.info_name)]
    for parameter in ctx.command.params:
        value = ctx.params.get(str(parameter.name))
        if parameter.name in _NOT_SETTINGS or value is None or (parameter.opts and value == parameter.get_default(ctx)):
            continue
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words += [parameter.opts[0]] if value else parameter.secondary_opts[:1]
        else:
            words += [parameter.opts[0], str(value)]
    return words


def settings_of(ctx: typer.Context) -> dict[str, Any]:
    """Every setting of the command, defaults included, as plain JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in ctx.params.items()
        if name not in _NOT_SETTINGS
    }


def finish(
    ctx: typer.Context, out: Path, kind: str, scores: Scores, started: float, model: Mapping[str, Any] | None = None
) -> None:
    """Write the run and print its numbers."""
    from mmdlm.evaluation.runs import write_run

    write_run(
        out,
        kind=kind,
        command=command_line(ctx),
        seed=int(ctx.params.get("seed", 0)),
        settings=settings_of(ctx),
        results=scores.summary,
        model=model,
        seconds=time.monotonic() - started,
        rows=scores.rows,
    )
    print_results(scores.summary)
    typer.echo(f"written to {out}")


def print_results(results: Mapping[str, Any], indent: str = "") -> None:
    """One line for each number, tables within tables further in."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            typer.echo(f"{indent}{name}")
            print_results(value, indent + "  ")
        else:
            shown = "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
            typer.echo(f"{indent}{name:28}  {shown}")


def model_facts(pipe: Any, model: Path | None) -> dict[str, Any]:
    """What the model was: its directory, the hash of its weights, and the presets it was sampled with."""
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import model_hash

    directory = model if model is not None else shipped_model()
    shown = str(model) if model is not None else "shipped"
    return {"directory": shown, "hash": model_hash(directory), "presets": pipe.presets}


def one_source(pictures: Path | None, answers: Path | None) -> None:
    """Raises InputError unless exactly one of --pictures and --answers is given."""
    if (pictures is None) == (answers is None):
        raise InputError("Give either --pictures, and the model answers, or --answers, a result file to be scored.")


def ask_model(
    pipe: Any,
    asked: Sequence[tuple[Any, Path, str | None]],
    out: Path,
    *,
    steps: int | None,
    seed: int,
    batch_size: int,
    quiet: bool,
    begun_with: Mapping[str, Any],
) -> dict[Any, str]:
    """The model's answer to every (id, picture, question or None for a caption).

    What is answered is kept in answers.part.jsonl at once; a run that was killed goes on from there, and ends with the
    same answers: every case has a generator of its own. Raises InputError where the part was begun otherwise.
    """
    import torch
    from tqdm import tqdm

    part = out / "answers.part.jsonl"
    settings = json.loads(json.dumps(dict(begun_with)))
    done = _answered(part, settings)
    places = {key: place for place, (key, _, _) in enumerate(asked)}
    left = [case for case in asked if case[0] not in done]
    pipe.set_progress_bar_config(disable=True)
    with (
        part.open("a", encoding="utf-8") as file,
        tqdm(total=len(asked), initial=len(done), disable=True if quiet else None, leave=False, unit="cases") as bar,
    ):
        if not done:
            file.truncate(0)
            file.write(json.dumps(settings) + "\n")
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            generators = [torch.Generator().manual_seed(seed + places[key]) for key, _, _ in batch]
            questions = [question for _, _, question in batch]
            texts = pipe(
                [picture for _, picture, _ in batch],
                None if None in questions else questions,
                num_inference_steps=steps,
                generator=generators,
            ).texts
            for (key, _, _), text in zip(batch, texts, strict=True):
                done[key] = " ".join(text.split())
                file.write(json.dumps({"id": key, "answer": done[key]}) + "\n")
            file.flush()
            bar.update(len(batch))
    return {key: done[key] for key, _, _ in asked}


def _answered(part: Path, settings: dict[str, Any]) -> dict[Any, str]:
    if not part.is_file():
        return {}
    # A line that a kill cut short is answered again.
    lines = part.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1]]
    if lines[-1]:
        part.write_text("".join(line + "\n" for line in lines[:-1]), encoding="utf-8")
    if rows and rows[0] != settings:
        raise InputError(f"{part} was begun with other settings: delete it, or give another output directory.")
    return {row["id"]: row["answer"] for row in rows[1:]}

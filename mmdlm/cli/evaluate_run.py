"""What all of `mmdlm eval` shares: the command as it was given, the model's answers with resuming, and run.json."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.evaluation.vqa import Scores

OutOption = Annotated[Path, typer.Option("-o", "--output", help="Directory for run.json, rows.jsonl and result files.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Case i uses seed + i.")]
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
    """Write the run and print its numbers, in the first process of several."""
    from mmdlm.evaluation.processes import share
    from mmdlm.evaluation.runs import write_run

    if not share().is_main:
        return
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


def model_record(pipe: Any, model: Path | None) -> dict[str, Any]:
    """What the model was: its directory, the hash of its weights, and the presets it was sampled with."""
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import model_hash
    from mmdlm.models.adapters import adapter_facts

    directory = model if model is not None else shipped_model()
    shown = str(model) if model is not None else "shipped"
    return {"directory": shown, "hash": model_hash(directory), **adapter_facts(pipe.model), "presets": pipe.presets}


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
) -> dict[Any, str] | None:
    """The model's answer to every (id, picture, question or None for a caption); None but in the first process.

    What is answered is kept at once (`mmdlm.evaluation.processes`); a run that was killed goes on from there, and ends
    with the same answers: every case has a generator of its own. Raises InputError where it was begun otherwise.
    """
    from mmdlm.evaluation.processes import run_batches

    def work(numbers: list[int], cases: list[tuple[Any, Path, str | None]]) -> list[dict[str, Any]]:
        texts = answers(pipe, numbers, cases, steps=steps, seed=seed)
        return [{"id": case[0], "answer": text} for case, text in zip(cases, texts, strict=True)]

    pipe.set_progress_bar_config(disable=True)
    rows = run_batches(
        out, "answers", asked, work, batch_size=batch_size, begun_with=begun_with, progress=not quiet
    )
    return None if rows is None else {case[0]: row["answer"] for case, row in zip(asked, rows, strict=True)}


def answers(
    pipe: Any, numbers: Sequence[int], cases: Sequence[tuple[Any, Path, str | None]], *, steps: int | None, seed: int
) -> list[str]:
    """The model's answers to one batch, on one line each; case n has the seed `seed` + n."""
    import torch

    questions = [question for _, _, question in cases]
    try:
        texts = pipe(
            [picture for _, picture, _ in cases],
            None if None in questions else questions,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed + number) for number in numbers],
        ).texts
    except InputError as error:
        raise InputError(f"Among the cases {cases[0][0]!r} to {cases[-1][0]!r}: {error}") from error
    return [" ".join(text.split()) for text in texts]

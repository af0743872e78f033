"""`mmdlm eval`: questions, captions, likelihood; runs made again, and held together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmdlm.cli.evaluate_pictures import images, tokenizer
from mmdlm.cli.evaluate_run import (
    AnswersOption,
    BatchOption,
    OutOption,
    PicturesOption,
    SeedOption,
    answers,
    ask_model,
    finish,
    model_record,
    one_source,
    print_results,
    settings_of,
)
from mmdlm.cli.loading import AdapterOption, DeviceOption, ModelOption, QuietOption, StepsOption, load_pipeline
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.evaluation.vqa import Question, Scores

Benchmark = Literal["vqav2", "gqa", "pope", "mme"]
SamplesOption = Annotated[int, typer.Option("--samples", min=2, help="Masks for each row; more are more exact.")]
REPRODUCIBLE = ("vqa", "choices", "captions", "likelihood", "images", "tokenizer")

evaluate = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure models, with the official metrics.")
evaluate.command()(images)
evaluate.command()(tokenizer)


@evaluate.command()
def vqa(
    ctx: typer.Context,
    benchmark: Annotated[Benchmark, typer.Argument(metavar="BENCHMARK", help="vqav2, gqa, pope or mme.")],
    questions: Annotated[Path, typer.Argument(metavar="QUESTIONS", help="The benchmark's own file; MME: its folder.")],
    output: OutOption,
    annotations: Annotated[Path | None, typer.Option("--annotations", help="VQAv2's file of people's answers.")] = None,
    pictures: PicturesOption = None,
    answers: AnswersOption = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer a benchmark's questions, or score a result file: its official metric, and its result file to upload.

    Without published answers (test splits) only the result file is written.
    """
    from mmdlm.evaluation.result_files import find_picture
    from mmdlm.evaluation.runs import check_new
    from mmdlm.evaluation.vqa import Scores

    started = time.monotonic()
    one_source(pictures, answers)
    asked = _questions(benchmark, questions, annotations)
    if not asked:
        raise InputError(f"{questions} has no questions, expected at least one: check the file.")
    facts = None
    if answers is not None:
        said = _answers(benchmark, answers, asked)
        check_new(output)
    else:
        assert pictures is not None
        cases = [(one.id, find_picture(pictures, one.pictures), one.text) for one in asked]
        check_new(output)
        pipe = load_pipeline("ImageToText", model, device, quiet, adapter=adapter)
        facts = model_record(pipe, model)
        begun_with = settings_of(ctx) | {"facts": facts}
        given = ask_model(
            pipe, cases, output, steps=steps, seed=seed, batch_size=batch_size, quiet=quiet, begun_with=begun_with
        )
        if given is None:
            return  # the first of several processes has it all
        said = given
    scored = any(one.answers for one in asked)
    unscored = Scores({"questions": len(asked), "scored": False}, [])
    scores = _score(benchmark, asked, said, answers or "the run") if scored else unscored
    _write_answers(benchmark, output, asked, said)
    finish(ctx, output, f"vqa {benchmark}", scores, started, facts)


def _questions(benchmark: Benchmark, path: Path, annotations: Path | None) -> list[Question]:
    from mmdlm.evaluation import vqa as open_ended
    from mmdlm.evaluation import yes_no

    if annotations is not None and benchmark != "vqav2":
        raise InputError(f"--annotations is for vqav2; {benchmark} has its answers beside its questions: leave it out.")
    if benchmark == "vqav2":
        return open_ended.read_vqav2(path, annotations)
    return {"gqa": open_ended.read_gqa, "pope": yes_no.read_pope, "mme": yes_no.read_mme}[benchmark](path)


def _answers(benchmark: Benchmark, path: Path, asked: Sequence[Question]) -> dict[Any, str]:
    from mmdlm.evaluation import vqa as open_ended
    from mmdlm.evaluation import yes_no

    if benchmark == "pope":
        return yes_no.read_pope_answers(path, asked)
    if benchmark == "mme":
        return yes_no.read_mme_answers(path, asked)
    keys = ("question_id", "answer") if benchmark == "vqav2" else ("questionId", "prediction")
    return open_ended.read_answers(path, *keys)


def _score(benchmark: Benchmark, asked: Sequence[Question], said: Mapping[Any, str], source: Path | str) -> Scores:
    from mmdlm.evaluation import vqa as open_ended
    from mmdlm.evaluation import yes_no

    scorers = {
        "vqav2": open_ended.score_vqav2,
        "gqa": open_ended.score_exact,
        "pope": yes_no.score_pope,
        "mme": yes_no.score_mme,
    }
    return scorers[benchmark](asked, said, source)


def _write_answers(benchmark: Benchmark, out: Path, asked: Sequence[Question], said: Mapping[Any, str]) -> None:
    from mmdlm.evaluation import vqa as open_ended
    from mmdlm.evaluation import yes_no

    if benchmark == "vqav2":
        open_ended.write_vqav2(out / "results.json", said)
    elif benchmark == "gqa":
        open_ended.write_gqa(out / "results.json", said)
    elif benchmark == "pope":
        yes_no.write_pope(out / "answers.jsonl", asked, said)
    else:
        yes_no.write_mme(out / "results", asked, said)


@evaluate.command()
def choices(
    ctx: typer.Context,
    questions: Annotated[
        Path, typer.Argument(metavar="QUESTIONS", help="JSON lines: id, image, question, choices, answer (from 0 on).")
    ],
    output: OutOption,
    pictures: Annotated[Path, typer.Option("--pictures", help="Folder of the pictures.")],
    samples: SamplesOption = 32,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 64,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Multiple choice twice: by the likelihood bound of every choice, and by what the model writes."""
    from mmdlm.evaluation.multiple_choice import choice_nats, read_choices, score_choices
    from mmdlm.evaluation.processes import run_batches
    from mmdlm.evaluation.result_files import find_picture
    from mmdlm.evaluation.runs import check_new

    started = time.monotonic()
    asked = read_choices(questions)
    paths = [find_picture(pictures, (one.picture,)) for one in asked]
    check_new(output)
    pipe = load_pipeline("ImageToText", model, device, quiet, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    facts = model_record(pipe, model)

    def work(numbers: list[int], places: list[int]) -> list[dict[str, Any]]:
        cases = [(asked[place].id, paths[place], asked[place].text) for place in places]
        said = answers(pipe, numbers, cases, steps=steps, seed=seed)
        judging = {"samples": samples, "seed": seed, "batch_size": batch_size}
        nats = [choice_nats(pipe, asked[place], paths[place], **judging) for place in places]
        return [{"answer": text, "nats": each} for text, each in zip(said, nats, strict=True)]

    begun_with = settings_of(ctx) | {"facts": facts}
    rows = run_batches(
        output, "choices", range(len(asked)), work, batch_size=8, begun_with=begun_with, progress=not quiet
    )
    if rows is None:
        return
    scores = score_choices(asked, [row["answer"] for row in rows], [row["nats"] for row in rows])
    finish(ctx, output, "choices", scores, started, facts)


@evaluate.command()
def captions(
    ctx: typer.Context,
    references: Annotated[
        Path, typer.Argument(metavar="REFERENCES", help="COCO's annotations, Flickr30k's .token, or Karpathy's JSON.")
    ],
    output: OutOption,
    split: Annotated[str | None, typer.Option("--split", help="Of Karpathy's JSON: test, for example.")] = None,
    pictures: PicturesOption = None,
    answers: AnswersOption = None,
    java: Annotated[bool, typer.Option("--java", help="METEOR too, SPICE where its models are.")] = False,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 8,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Describe pictures, or score a result file: CIDEr-D, BLEU-1 to 4, ROUGE-L; COCO's result file to upload."""
    from mmdlm.evaluation.captioning import (
        read_captions,
        read_coco_captions,
        read_flickr30k,
        score_captions,
        write_captions,
    )
    from mmdlm.evaluation.result_files import find_picture, read_json
    from mmdlm.evaluation.runs import check_new

    started = time.monotonic()
    one_source(pictures, answers)
    is_coco = references.suffix == ".json" and "annotations" in read_json(references)
    if is_coco and split is not None:
        raise InputError(f"{references} is COCO's own file and has no splits: leave --split out.")
    gold = read_coco_captions(references) if is_coco else read_flickr30k(references, split)
    facts = None
    if answers is not None:
        said = read_captions(answers)
        check_new(output)
    else:
        assert pictures is not None
        cases = [(one.id, find_picture(pictures, one.pictures), None) for one in gold]
        check_new(output)
        pipe = load_pipeline("ImageToText", model, device, quiet, adapter=adapter)
        facts = model_record(pipe, model)
        begun_with = settings_of(ctx) | {"facts": facts}
        given = ask_model(
            pipe, cases, output, steps=steps, seed=seed, batch_size=batch_size, quiet=quiet, begun_with=begun_with
        )
        if given is None:
            return
        said = given
    scores = score_captions(gold, said, answers or "the run", with_java=java)
    write_captions(output / "results.json", said)
    finish(ctx, output, "captions", scores, started, facts)


@evaluate.command()
def likelihood(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures with metadata.jsonl: file_name and text.")],
    output: OutOption,
    samples: SamplesOption = 32,
    pool: Annotated[int, typer.Option("--pool", min=0, help="Pictures of the matching; 0 for none.")] = 16,
    seed: SeedOption = 0,
    batch_size: BatchOption = 64,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """How likely texts are given pictures, and pictures given texts, in nats and bits per token; and matching them."""
    from mmdlm.evaluation.paired_likelihood import measure_pairs, read_pairs
    from mmdlm.evaluation.runs import check_new

    started = time.monotonic()
    pairs = read_pairs(folder)
    check_new(output)
    pipe = load_pipeline("ImageToText", model, device, quiet, adapter=adapter)
    facts = model_record(pipe, model)
    scores = measure_pairs(
        pipe, pairs, output, samples=samples, pool=pool, seed=seed, batch_size=batch_size, progress=not quiet,
        begun_with=settings_of(ctx) | {"facts": facts},
    )  # fmt: skip
    if scores is not None:
        finish(ctx, output, "likelihood", scores, started, facts)


@evaluate.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def harness(ctx: typer.Context) -> None:
    """lm_eval's own command line, which then knows the model mmdlm: run --model mmdlm --tasks ..."""
    from mmdlm.cli import lm_harness

    lm_harness.main(ctx.args)


@evaluate.command()
def reproduce(
    run: Annotated[Path, typer.Argument(metavar="RUN.JSON", help="The run.json of an evaluation.")],
    output: OutOption,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Relative difference that counts as equal.")] = 1e-6,
) -> None:
    """Make an evaluation again, where its paths hold, and say whether the numbers are the same; exit code 1 if not."""
    from mmdlm.evaluation.runs import differences, read_run

    made_again = [["mmdlm", "eval", name] for name in REPRODUCIBLE] + [["mmdlm", "run", "eval/pictures"]]
    then = read_run(run)
    command = then["command"]
    if not isinstance(command, list) or [*command, "", "", ""][:3] not in made_again:
        told = " ".join(command[:3]) if isinstance(command, list) else command
        known = ", ".join(REPRODUCIBLE)
        raise InputError(f"{run} was made by {told!r}, expected mmdlm eval {known}, or mmdlm run eval/pictures.")
    from mmdlm.cli import app

    # A program takes its directory as a setting, a command as an option.
    where = [f"out={output}"] if command[1] == "run" else ["-o", str(output)]
    code = app([*command[1:], *where], standalone_mode=False)
    if code:
        raise typer.Exit(code)
    now = read_run(output)
    was, is_now = (made["model"]["hash"] if made["model"] else None for made in (then, now))
    if was != is_now:
        typer.echo(f"The model is another one: {was} then, {is_now} now.")
    changed = differences(then["results"], now["results"], tolerance=tolerance)
    for line in changed:
        typer.echo(line)
    typer.echo(f"{len(changed)} numbers differ" if changed else "reproduced")
    if changed:
        raise typer.Exit(1)


@evaluate.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.JSON", help="A run.json.")],
    second: Annotated[Path, typer.Argument(metavar="B.JSON", help="Another of the same kind, over the same cases.")],
    score: Annotated[str, typer.Option("--score", help="Which score of the cases: rouge_l, psnr ...")] = "score",
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw the difference: a PNG.")] = None,
    resamples: Annotated[int, typer.Option("--resamples", min=100, help="Of the bootstrap.")] = 2000,
    seed: SeedOption = 0,
) -> None:
    """B less A, with the 95 % interval of a bootstrap over their cases, in pairs."""
    from mmdlm.evaluation.runs import compare_runs, plot_comparison
    from mmdlm.picture_files import check_writable

    if plot is not None:
        check_writable(plot, ".png")
    found = compare_runs(first, second, score=score, resamples=resamples, seed=seed)
    print_results(found)
    if plot is not None:
        plot_comparison(found, plot)

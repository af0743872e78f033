"""`mmdlm bench`: how much faster than the plain published loop every setting is, and what it costs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuietOption, load_pipeline, usable_device
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from mmdlm.evaluation.bench_workloads import Workload

PROMPTS = ("a red apple", "two cats on a blue background", "a star above a tree", "three bananas on a pink background")


class _Case(NamedTuple):
    """A model and what it is timed on. trained: it has learned something, and may be sure of it."""

    model: nn.Module
    work: Workload
    trained: bool


def bench(
    model: ModelOption = None,
    shape: Annotated[
        str | None, typer.Option("--shape", help="Random weights instead: small (for a CPU) or 8b (for a GPU).")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option("--tasks", help="t2i,text,describe, or some of them; all the model can if not given.")
    ] = None,
    rows: Annotated[
        str | None, typer.Option("--rows", help="Rows filled together; 1, and 8b's text also 8. 2,4 tries both.")
    ] = None,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Timed runs of each, beside the plain loop's.")] = 5,
    settings: Annotated[
        str | None, typer.Option("--settings", help="Only settings whose name holds one of these words: cache,steps")
    ] = None,
    answer: Annotated[
        int | None, typer.Option("--answer", help="New tokens of text, a pass each; 128 for a shape.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A prompt a line, to draw.")] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Folder of pictures to describe.")] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory, on a CPU in a process of its own each.")
    ] = True,
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile.")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, or bfloat16 (the default on a GPU).")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Of the CPU; torch's own choice.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of random weights and prompts.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every single measurement here.")] = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
    alone: Annotated[str | None, typer.Option("--alone", hidden=True)] = None,
) -> None:
    """Time every setting of the sampler against the plain published loop, both in turn, in one run.

    Exact settings have to give the loop's tokens: where one does not, in float32, the exit code is 1. Of the others the
    share of equal tokens is told. Tables come as Markdown. A random model says how fast, never how good; of the shape
    small, describe is done by the shipped model made as wide, zeros added, whose predictions are its own.
    """
    import torch

    from mmdlm.evaluation import benchmark as b
    from mmdlm.picture_files import check_writable, write_whole

    if model is not None and shape is not None:
        raise InputError("Give either --model, a directory, or --shape, random weights.")
    if output is not None:
        check_writable(output, ".json")
    given = {"model": model, "shape": shape, "answer": answer, "prompts": prompts, "pictures": pictures,
             "dtype": dtype, "threads": threads, "seed": seed, "device": device}  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    chosen = usable_device(device)
    kind = _dtype(dtype, chosen)
    counts = None if rows is None else _numbers(rows)
    cases = _cases(given, chosen, kind, _names(tasks), counts, plain_pictures=alone is not None)
    if alone is not None:
        _alone(cases, alone, compiled)
        return
    words = _arguments({**given, "tasks": tasks, "rows": rows, "pairs": pairs, "settings": settings})
    words += [] if memory else ["--no-memory"]
    run = b.facts(shlex.join(["mmdlm", "bench", *words]), seed, _named(model, shape))
    wrong, results, tell = [], [], _teller(quiet)
    for case in cases:
        every = b.settings_of(case.work, trained=case.trained, compiled=compiled)
        count = len(case.work.rows.canvas.ids)

        def peak(name: str, task: str = case.work.task, count: int = count) -> float | None:
            return _peak({**given, "tasks": task, "rows": count}, name) if memory and chosen == "cpu" else None

        found = b.measure(case.model, case.work, b.chosen(every, settings), pairs=pairs, fused=_fused(case.model),
                          peak=peak, progress=tell)
        tell("")
        typer.echo(b.table(found, case.work, float32=kind == torch.float32))
        typer.echo(f"\n{b.floor_line(case.model, found)}\n")
        wrong += b.unequal(found) if kind == torch.float32 else []
        results.append(b.as_json(found, case.work))
    run["load_average_after"] = b.load_average()
    typer.echo(f"`{run['command']}`, {run['model']}, {run['gpu'] or run['machine']}, {run['threads']} threads, torch "
               f"{run['versions']['torch']}, {str(kind).removeprefix('torch.')}, seed {seed}, {pairs} pairs, load "
               f"{run['load_average']} to {run['load_average_after']}.")
    if output is not None:
        write_whole(output, json.dumps(run | {"results": results}, indent=1).encode())
    if wrong:
        typer.echo(f"mmdlm: tokens differ from the plain loop's with exact settings: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)


def _named(model: Path | None, shape: str | None) -> str:
    """The model as the numbers remember it: a shape, or the hash of its weights."""
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import model_hash

    directory = model if model is not None else shipped_model()
    whole = (directory / "model_index.json").is_file()
    known = f"{model or 'shipped'}, {model_hash(directory)}" if whole else str(directory)
    return known if shape is None else f"random weights of the shape {shape}; describe: {known}"


# ---------------------------------------------------------------- models and workloads


def _cases(
    given: dict[str, Any],
    device: str,
    dtype: Any,
    tasks: list[str] | None,
    counts: list[int] | None,
    *,
    plain_pictures: bool,
) -> Iterator[_Case]:
    """Every task at every number of rows, made when it is its turn."""
    from mmdlm.assets import shipped_model

    directory = given["model"] if given["model"] is not None else shipped_model()
    if given["shape"] is not None:
        yield from _of_shape(given, device, dtype, tasks, counts, plain_pictures=plain_pictures)
    elif (directory / "model_index.json").is_file() or not any(
        (directory / part / "config.json").is_file() for part in ("", "model")
    ):
        pipe = _pipe(given["model"], device, dtype)
        words, known = pipe.processor.vocabulary, tasks or ["t2i", "describe"]
        if pipe.family == "mmada" or (pipe.family and min(words.draw_id, words.describe_id) < 0):  # another's layouts
            yield from _of_predictor(pipe.model.to(device), given, device, tasks, counts)
        else:
            yield from _of_pipe(pipe, given, device, known, counts, plain_pictures=plain_pictures)
    else:
        from mmdlm.convert import load_predictor

        model = load_predictor(directory, dtype=dtype, device_map=None if device == "cpu" else device).eval()
        yield from _of_predictor(model, given, device, tasks, counts)


def _of_predictor(
    model: Any, given: dict[str, Any], device: str, tasks: list[str] | None, counts: list[int] | None
) -> Iterator[_Case]:
    """The published workloads over random ids, for a predictor without a processor, or in another's layouts."""
    from mmdlm.evaluation.bench_shapes import shape_of, with_answer
    from mmdlm.evaluation.bench_workloads import shape_workload

    shape, words = with_answer(shape_of(model.config), given["answer"]), model.vocabulary
    able = ["text"] + (["t2i"] if words.image_size and min(words.boi_id, words.draw_id, words.bos_id) >= 0 else [])
    for task in tasks or able:
        if task not in able:
            raise InputError(f"--tasks has {task}, this model is timed as a predictor alone and can {', '.join(able)}.")
        for count in counts or [1]:
            yield _Case(model, shape_workload(shape, task, count, given["seed"], device), True)


def _of_shape(
    given: dict[str, Any],
    device: str,
    dtype: Any,
    tasks: list[str] | None,
    counts: list[int] | None,
    *,
    plain_pictures: bool,
) -> Iterator[_Case]:
    from mmdlm.evaluation import bench_shapes
    from mmdlm.evaluation.bench_workloads import shape_workload

    shape = bench_shapes.with_answer(bench_shapes.named_shape(given["shape"]), given["answer"])
    if shape.name == "8b" and not device.startswith("cuda"):
        raise InputError(f"--shape 8b is for a GPU, the device is {device}: take --shape small here.")
    share = bench_shapes.head_over_trunk(shape.config)
    typer.echo(f"Shape {shape.name}: the head is {100 * share:.1f} % of the trunk's weights.\n", err=True)
    random = [task for task in tasks or ["t2i", "text"] if task != "describe"]
    if random:
        model = bench_shapes.random_model(shape, device=device, dtype=dtype, seed=given["seed"])
        for task in random:
            for count in counts or ([1, 8] if shape.name == "8b" and task == "text" else [1]):
                yield _Case(model, shape_workload(shape, task, count, given["seed"], device), False)
        del model
    if "describe" in (tasks or (["describe"] if shape.name == "small" else [])):
        pipe = _pipe(None, "cpu", dtype)
        pipe.model = bench_shapes.widened(pipe.model, shape.config)
        yield from _of_pipe(pipe, given, device, ["describe"], counts, plain_pictures=plain_pictures)


def _pipe(model: Path | None, device: str, dtype: Any) -> Any:
    pipe = load_pipeline("TextToImage", model, device, True)
    for part in (pipe.model, pipe.visual_tokenizer):
        part.to(dtype).eval()
    return pipe


def _of_pipe(
    pipe: Any,
    given: dict[str, Any],
    device: str,
    tasks: list[str],
    counts: list[int] | None,
    *,
    plain_pictures: bool,
) -> Iterator[_Case]:
    """What a model directory can: pictures of prompts, and captions of pictures, at its own presets' steps."""
    import torch

    from mmdlm.evaluation.bench_workloads import describe_workload, picture_workload

    words, model = pipe.processor.vocabulary, pipe.model.to(device)
    lines = read_lines(given["prompts"]) if given["prompts"] is not None else list(PROMPTS)
    for task in tasks:
        for count in counts or [1]:
            texts = [lines[row % len(lines)] for row in range(count)]
            if task == "t2i":
                preset = pipe.presets["draw"]
                work = picture_workload([pipe.processor.text_ids(text) for text in texts], pipe.grid, words,
                                        steps=preset["num_inference_steps"], scale=preset["guidance_scale"],
                                        device=device)
            elif task == "describe":
                preset = pipe.presets["describe"]
                if plain_pictures:  # only memory is looked at
                    codes = torch.randint(words.image_size, (count, *pipe.grid))
                elif given["pictures"] is not None:
                    codes = picture_codes(pipe, given["pictures"])[:count]
                    count = len(codes)
                else:
                    chances = [torch.Generator().manual_seed(given["seed"] + row) for row in range(count)]
                    pipe.set_progress_bar_config(disable=True)
                    codes = pipe(texts, generator=chances).codes
                work = describe_workload(codes, pipe.grid, words, answer=preset["answer_length"],
                                         steps=preset["num_inference_steps"], device=device)
            else:
                raise InputError(f"The task {task!r} is for a shape or a predictor alone, expected t2i or describe.")
            _check_length(model, work)
            yield _Case(model, work, True)


def _check_length(model: Any, work: Workload) -> None:
    longest, limit = work.padded.canvas.ids.shape[1], model.config.max_positions
    if longest > limit:
        raise InputError(f"A row is too long by {longest - limit} tokens, the model has {limit} positions: shorten it.")


def picture_codes(pipe: Any, folder: Path) -> Any:
    """The codes [N, h, w] of a folder's pictures, by name; InputError where there is none."""
    import torch

    from mmdlm.processing import load_image

    files, codes = picture_files(folder), []
    for start in range(0, len(files), 16):
        pixels = pipe.processor.pixels([load_image(file) for file in files[start : start + 16]])
        with torch.no_grad():
            codes.append(pipe.visual_tokenizer.encode(pixels.to(pipe.model.device, pipe.visual_tokenizer.dtype)).cpu())
    return torch.cat(codes)


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}, expected one with pictures: check the path.")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise InputError(f"{folder} holds no PNG, JPEG or WebP, expected pictures: give another folder.")
    return files


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty; InputError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text ({error}): give a file with a prompt a line.") from error
    if not lines:
        raise InputError(f"{path} is empty, expected a prompt a line: write some.")
    return lines


def _fused(model: Any) -> Any:
    """The model once more with fused projections, None on a GPU that has no room for it."""
    import copy

    import torch

    from mmdlm.models.fused import fuse_projections

    weights = list(model.parameters())
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if weights[0].is_cuda and torch.cuda.mem_get_info()[0] < 1.5 * size:
        return None
    twin = copy.deepcopy(model)
    fuse_projections(twin)
    return twin


# ---------------------------------------------------------------- memory, in a process of its own


def _peak(arguments: dict[str, Any], setting: str) -> float | None:
    """MiB above the loaded model that a setting takes at most in its first passes; None where it cannot be told."""
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", "bench", *_arguments(arguments),
               "--alone", setting, "--quiet"]  # fmt: skip
    # what is freed goes back to the system at once: kept for later, it would hide what the next passes take
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return float(done.stdout.split()[-1])
    except (ValueError, IndexError):
        return None


def _alone(cases: Iterator[_Case], name: str, compiled: bool) -> None:
    from mmdlm.evaluation import benchmark as b
    from mmdlm.evaluation.sampling_settings import fitted

    case = next(cases)
    known = {setting.name: setting for setting in b.settings_of(case.work, trained=case.trained, compiled=compiled)}
    setting = known[name] if name else None
    if setting is not None:
        fitted(case.model, setting.sampling.levers)
    typer.echo(b.memory_of(lambda: b.first_passes(case.model, case.work, setting)))


def _arguments(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() if value not in (None, 0) for word in (f"--{name}", str(value))]


# ---------------------------------------------------------------- the command line's words


def _names(tasks: str | None) -> list[str] | None:
    from mmdlm.evaluation.bench_workloads import TASKS

    if tasks is None:
        return None
    names = [name.strip() for name in tasks.split(",")]
    for name in names:
        if name not in TASKS:
            raise InputError(f"--tasks has {name!r}, expected some of {','.join(TASKS)}.")
    return names


def _numbers(rows: str) -> list[int]:
    words = [word.strip() for word in rows.split(",")]
    if not all(word.isdecimal() and int(word) >= 1 for word in words):
        raise InputError(f"--rows is {rows!r}, expected a number from 1 on, or several as 1,8.")
    return [int(word) for word in words]


def _dtype(name: str | None, device: str) -> Any:
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    name = name or ("bfloat16" if device.startswith("cuda") else "float32")
    if name not in kinds:
        raise InputError(f"--dtype is {name!r}, expected {' or '.join(kinds)}.")
    return kinds[name]


def _teller(quiet: bool) -> Any:
    """What is being done, on one line of a terminal."""
    shown = not quiet and sys.stderr.isatty()
    return lambda line: typer.echo(f"\r\033[K{line}", nl=False, err=True) if shown else None

"""`mmdlm tune`: the fastest preset that keeps a stated quality on somebody's own prompts or pictures."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.cli.bench import picture_files, read_lines
from mmdlm.cli.loading import DeviceOption, ModelOption, QuietOption, load_pipeline
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from mmdlm.evaluation.tuning import Candidate, Cases


def tune(
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A prompt a line: tune drawing.")] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Folder of pictures: tune describing.")] = None,
    question: Annotated[str | None, typer.Option("--question", help="Tune answers to it about the pictures.")] = None,
    keep: Annotated[float, typer.Option("--keep", help="The least quality; the preset's own is 1.")] = 0.98,
    measure: Annotated[
        str | None, typer.Option("--measure", help="tokens for words; prompt (default) or codes for pictures.")
    ] = None,
    candidates: Annotated[
        Path | None, typer.Option("--candidates", help="YAML: name: {setting: value} to try instead of our own.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts or pictures at most.")] = 32,
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Timed runs of each, beside the preset's.")] = 3,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Case i uses seed + i.")] = 0,
    save: Annotated[bool, typer.Option("--save", help="Write the preset into the directory given to --model.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a copy of the model with the preset: for --model from then on.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every measurement here.")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Try settings on your own prompts or pictures; print how fast and how good each is; keep the fastest good one.

    Quality is against the model's own preset: of words the share of equal tokens; of pictures how likely their prompts
    are given them, by the model's bound (or, with --measure codes, the share of equal codes at the same seed). With
    --save or --out it becomes the preset of that task. The model that ships with the package is never changed.
    """
    from mmdlm.assets import shipped_model
    from mmdlm.picture_files import check_writable, write_whole

    if (prompts is None) == (pictures is None):
        raise InputError("Give either --prompts, a file to draw from, or --pictures, a folder to describe.")
    if question is not None and (pictures is None or not question.strip()):
        raise InputError("--question needs --pictures and some words: give both.")
    if not 0 < keep <= 1:
        raise InputError(f"--keep is {keep}, expected a share in (0, 1], 0.98 for instance.")
    if output is not None:
        check_writable(output, ".json")
    directory = model if model is not None else shipped_model()
    _check_place(directory, save, out, shipped_model())
    cases = _cases(prompts, pictures, question, limit, seed)
    tried_by_user = read_candidates(candidates) if candidates is not None else None
    pipe = load_pipeline("TextToImage" if cases.task == "draw" else "ImageToText", model, device, True, own="tuning")
    pipe.set_progress_bar_config(disable=True)

    from mmdlm.evaluation import tuning

    chosen_measure = measure or tuning.MEASURES[cases.task][0]
    those = tried_by_user or tuning.candidates_of(cases.task, pipe.presets[cases.task])
    tell = (lambda line: None) if quiet else (lambda line: typer.echo(f"  {line}", err=True))
    tried = tuning.try_candidates(pipe, cases, those, measure=chosen_measure, pairs=pairs, progress=tell)
    best = tuning.fastest(tried, keep)
    typer.echo(tuning.table(tried, keep, chosen_measure))
    typer.echo(f"\n{len(cases.inputs)} cases, {pairs} pairs, seed {seed}, quality against the preset as it is.")
    typer.echo(f"fastest that keeps {keep:g}: {best.candidate.name}{_flags(cases.task, best.candidate)}")
    preset = {**pipe.presets[cases.task], **best.candidate.changes}
    if save:
        write_preset(directory, cases.task, preset)
        typer.echo(f"written to {directory}")
    if out is not None:
        copy_with_preset(directory, out, cases.task, preset)
        typer.echo(f"written to {out}: use it with --model {shlex.quote(str(out))}")
    if output is not None:
        rows = [{**one._asdict(), "candidate": one.candidate._asdict()} for one in tried]
        told = {"task": cases.task, "measure": chosen_measure, "keep": keep, "seed": seed, "cases": len(cases.inputs),
                "chosen": best.candidate.name, "preset": preset, "tried": rows}  # fmt: skip
        write_whole(output, json.dumps(told, indent=1).encode())


def read_candidates(path: Path) -> list[Candidate]:
    """{name: {setting of the preset: value}} from a YAML. InputError where it is something else."""
    import yaml

    from mmdlm.evaluation.tuning import Candidate

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}): mend it.") from error
    if not isinstance(read, dict) or not read or not all(isinstance(value, dict) and value for value in read.values()):
        raise InputError(f"{path} is no table of candidates, expected for example fast: {{num_inference_steps: 4}}.")
    return [Candidate(str(name), changes) for name, changes in read.items()]


def write_preset(directory: Path, task: str, preset: Mapping[str, Any]) -> None:
    """Replace the preset of one task in a model directory's generation_config.json; the others stay as they are."""
    from mmdlm.model_directory import PRESETS
    from mmdlm.picture_files import write_whole

    path = directory / PRESETS
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    content = json.dumps({**saved, task: dict(preset)}, indent=2, sort_keys=True) + "\n"
    write_whole(path, content.encode())


def copy_with_preset(directory: Path, out: Path, task: str, preset: Mapping[str, Any]) -> None:
    """A copy of a model directory at `out`, which is not there yet, with one task's preset replaced."""
    beside = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        shutil.copytree(directory, beside)
        write_preset(beside, task, preset)
        os.replace(beside, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{out} cannot be written ({reason}): make room or choose another place.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_place(directory: Path, save: bool, out: Path | None, shipped: Path) -> None:
    if save and directory.resolve() == shipped.resolve():
        raise InputError("--save would change the model that ships with the package: write a copy with --out DIR.")
    if out is not None and os.path.lexists(out):
        raise InputError(f"{out} exists already, expected a new directory: give another name.")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out} cannot be written, there is no directory {out.parent}: create it first.")


def _cases(prompts: Path | None, pictures: Path | None, question: str | None, limit: int, seed: int) -> Cases:
    from mmdlm.evaluation.tuning import Cases
    from mmdlm.processing import load_image

    if prompts is not None:
        return Cases("draw", read_lines(prompts)[:limit], None, seed)
    assert pictures is not None
    loaded = [load_image(file) for file in picture_files(pictures)[:limit]]
    return Cases("describe" if question is None else "ask", loaded, question, seed)


def _flags(task: str, candidate: Candidate) -> str:
    """How to ask for it on the command line, where that can be said."""
    named = []
    for name, value in candidate.changes.items():
        if name == "num_inference_steps" and "policy" not in candidate.changes:  # a policy finds its own number
            named.append(f"--steps {value}")
        elif name == "guidance_scale":
            named.append(f"--guidance {value}")
        elif name == "guidance_interval":
            named.append(f"--guidance-interval {','.join(map(str, value))}")
        elif name in ("policy", "cache"):
            inside = ", ".join(f"{key}: {setting}" for key, setting in value.items())
            named.append(f'--{name} "{{{inside}}}"')
    command = {"draw": "generate", "describe": "caption", "ask": "ask"}[task]
    return f" (mmdlm {command} {' '.join(named)})" if named and task != "ask" else ""

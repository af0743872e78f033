"""`mmdlm`: what a person types.

torch, transformers and diffusers are imported inside the commands that need them, so that `mmdlm --help` answers at
once. A person's mistake (`InputError`) is one sentence on stderr and exit code 2; a bug keeps its traceback.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mmdlm import __version__
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from mmdlm.pipelines import TextToImage

ROWS_AT_ONCE = 8  # pictures drawn together: more would only cost memory on a laptop
LARGEST_SEED = 2**63 - 1


class _OneSentence(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            typer.echo(f"mmdlm: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneSentence, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False
)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build the material to train on.")
build = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Build a data set.")
data.add_typer(build, name="build")
app.add_typer(data, name="data")

ModelOption = Annotated[Path | None, typer.Option("--model", help="Model directory; the shipped model if not given.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps ...; the fastest at hand if not given.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps; the model's preset if not given.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


def main() -> None:
    """The console script."""
    # Whoever had the pipelines loaded before calls this from a program of their own, which must not be ended here.
    called_from_program = "mmdlm.pipelines" in sys.modules
    try:
        app()
    except SystemExit as finished:
        # Everything is written. Taking down torch, transformers and diffusers module by module would keep the person
        # waiting for another second (1.2 s of 7.7 s, measured); the system does it at once.
        if "mmdlm.pipelines" in sys.modules and not called_from_program and isinstance(finished.code, int):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(finished.code)
        raise


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Pictures from words and words from pictures, with one small model that ships with this package."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("picture.png"),
    count: Annotated[int, typer.Option("-n", help="Pictures of every prompt.", min=1)] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="All pictures on one sheet.")] = False,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance scale, 1 is none; the model's preset if not given.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=LARGEST_SEED, help="Picture i uses seed + i; random if not given."),
    ] = None,
    animation: Annotated[Path | None, typer.Option("--gif", help="Also write an animation of the process.")] = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw pictures. Several go to NAME-0.png, NAME-1.png ..., or with --grid onto one sheet.

    Every PNG carries its prompt, seed, steps, guidance, model hash and version as text; the same command with the
    same seed writes the same bytes.
    """
    from mmdlm.picture_files import check_writable, gif, numbered, png, sheet, write_whole

    wanted = [prompt for prompt in prompts for _ in range(count)]
    paths = [output] if grid else numbered(output, len(wanted))
    for path in paths:
        check_writable(path, ".png")
    if animation is not None:
        check_writable(animation, ".gif")
    pipe = _load("TextToImage", model, device, quiet)
    if seed is None:
        import secrets

        seed = secrets.randbelow(2**32)
    seeds = [(seed + index) % (LARGEST_SEED + 1) for index in range(len(wanted))]
    pictures, frames = _draw(pipe, wanted, seeds, steps, guidance, with_frames=animation is not None)

    # One row for each prompt; a single prompt's pictures make a square.
    columns = count if len(prompts) > 1 else _square_side(count)
    facts = _facts(pipe, steps, guidance)
    if grid:
        together = {"prompt": "\n".join(prompts), "seed": seed, "pictures": len(wanted), **facts}
        files = {output: png(sheet(pictures, columns), together)}
    else:
        files = {
            path: png(picture, {"prompt": prompt, "seed": number, **facts})
            for path, picture, prompt, number in zip(paths, pictures, wanted, seeds, strict=True)
        }
    if animation is not None:
        files[animation] = gif([sheet(frame, columns) for frame in frames])
    for path, content in files.items():
        write_whole(path, content)
        typer.echo(f"{path} (seed {seed})" if len(files) == 1 else str(path))


@app.command()
def caption(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures to describe.")],
    steps: StepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Describe pictures: one line for each."""
    from mmdlm.processing import load_image

    pictures = [load_image(image) for image in images]
    pipe = _load("ImageToText", model, device, quiet)
    for start in range(0, len(pictures), ROWS_AT_ONCE):
        texts = pipe(pictures[start : start + ROWS_AT_ONCE], num_inference_steps=steps).texts
        for image, text in zip(images[start:], texts, strict=False):
            typer.echo(_one_line(text) if len(images) == 1 else f"{image}\t{_one_line(text)}")


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, quoted.")],
    steps: StepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer a question about a picture."""
    from mmdlm.processing import load_image

    picture = load_image(image)
    pipe = _load("ImageToText", model, device, quiet)
    typer.echo(_one_line(pipe(picture, question, num_inference_steps=steps).texts[0]))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    add_help_option=False,
)
def run(
    ctx: typer.Context,
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="For example train/supervised, see `mmdlm ls`.")],
) -> None:
    """Run a program of tokenizers/, train/ or eval/ with the arguments that follow its name."""
    from mmdlm.programs import program_path

    path = program_path(program)
    interpreter = {".py": [sys.executable], ".sh": ["bash"]}.get(path.suffix)
    if interpreter is None:
        raise InputError(f"{path} is no program, expected a .py or .sh file: `mmdlm ls` lists what can be run.")
    raise typer.Exit(subprocess.run([*interpreter, str(path), *ctx.args], check=False).returncode)


@app.command()
def ls() -> None:
    """List the programs, their settings (YAML), and the shipped model."""
    from mmdlm.assets import shipped_model
    from mmdlm.programs import list_programs, program_path

    programs = list_programs()
    typer.echo("programs (mmdlm run PROGRAM ...)")
    for program in programs:
        typer.echo(f"  {program}")
    typer.echo("settings (mmdlm path NAME)")
    for folder in sorted({program_path(program).parent for program in programs}):
        for settings in sorted(folder.rglob("*.yaml")):
            typer.echo(f"  {settings.relative_to(folder.parent).as_posix()}")
    typer.echo("shipped model")
    try:
        typer.echo(f"  {shipped_model()}")
    except InputError:
        typer.echo("  none in this installation")


@app.command()
def path(
    program: Annotated[str, typer.Argument(metavar="PROGRAM", help="For example train/supervised.")],
) -> None:
    """Print where a program lies: accelerate launch "$(mmdlm path train/supervised)" ..."""
    from mmdlm.programs import program_path

    typer.echo(program_path(program))


@build.command()
def pictures(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to fill; resumes where it stopped.")],
    source: Annotated[
        Path | None, typer.Option("--source", help="Directory of the fetched packages, if not the usual one.")
    ] = None,
) -> None:
    """Render the drawings of the picture world; prints counts and licences."""
    from mmdlm.data.drawings import build_pictures

    standing = next(parent for parent in (output, *output.absolute().parents) if os.path.lexists(parent))
    if not os.path.isdir(standing) or not os.access(standing, os.W_OK):
        raise InputError(f"{output} cannot be written, {standing} is no directory you may write to: choose another.")
    build_pictures(output, source=source)


def _one_line(text: str) -> str:
    """A model of bytes can write any byte: line ends become spaces, and nothing steers the terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in " ".join(text.split()))


def _draw(
    pipe: TextToImage,
    prompts: list[str],
    seeds: list[int],
    steps: int | None,
    guidance: float | None,
    *,
    with_frames: bool,
) -> tuple[list[Image.Image], list[list[Image.Image]]]:
    """One picture per prompt and seed, and, if asked for, what all of them looked like after each step."""
    import torch

    drawn: list[Image.Image] = []
    films: list[list[Image.Image]] = []

    def keep_frame(pipe: Any, step: int, _: float, tensors: dict[str, Any]) -> None:
        for row, picture in enumerate(pipe.preview(tensors["codes"], tensors["undecided"])):
            if step == 0:
                films.append([])
            films[len(drawn) + row].append(picture)

    for start in range(0, len(prompts), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        # On the CPU whatever the device: the same seed then draws the same noise everywhere.
        drawn += pipe(
            prompts[part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            callback_on_step_end=keep_frame if with_frames else None,
        ).images
    longest = max((len(film) for film in films), default=0)
    frames = [[film[min(step, len(film) - 1)] for film in films] for step in range(longest)]
    return drawn, frames


def _facts(pipe: TextToImage, steps: int | None, guidance: float | None) -> dict[str, object]:
    """What every PNG carries beside its prompt and seed."""
    from mmdlm.model_directory import model_hash

    preset = pipe.presets["draw"]
    return {
        "steps": preset["num_inference_steps"] if steps is None else steps,
        "guidance_scale": float(preset["guidance_scale"] if guidance is None else guidance),
        "model_hash": model_hash(Path(pipe.name_or_path)),
        "mmdlm_version": __version__,
    }


def _square_side(count: int) -> int:
    """The columns of a sheet of `count` pictures that is square or a little wide."""
    import math

    return math.isqrt(count - 1) + 1


def _load(name: str, model: Path | None, device: str | None, quiet: bool) -> Any:
    """The pipeline `name` of a model directory, on its device. The model is looked at before anything slow happens."""
    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import check_model_directory

    directory = model if model is not None else shipped_model()
    check_model_directory(directory)
    # Collecting garbage while hundreds of modules are imported finds none and costs a fifth of the start.
    gc.disable()
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from mmdlm import pipelines

    gc.enable()
    chosen = _device(device)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipe = getattr(pipelines, name).from_pretrained(directory).to(torch.device(chosen))
    # None: tqdm is silent when stderr is no terminal.
    pipe.set_progress_bar_config(disable=True if quiet else None, leave=False)
    return pipe


def _device(device: str | None) -> str:
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if torch.device(device).type == "meta":
            raise InputError("Nothing can be computed on the device meta: use cpu, cuda or mps.")
        torch.zeros(1, device=device)
    except InputError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0][:160].rstrip(".")
        raise InputError(f"The device {device!r} cannot be used ({reason}): try --device cpu.") from error
    return device

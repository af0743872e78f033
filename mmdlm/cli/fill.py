"""`mmdlm fill`: what is missing of a picture, of a text, or of both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmdlm.cli.loading import (
    AdapterOption,
    DeviceOption,
    ModelOption,
    QuantizeOption,
    QuietOption,
    StepsOption,
    load_pipeline,
    model_facts,
)
from mmdlm.cli.watching import (
    ConfidenceOption,
    Films,
    FramesOption,
    GifOption,
    PolicyOption,
    ReplayOption,
    check_watching,
    confidence_sheet,
    keep_frames,
    parsed_policy,
    recording,
    seed_of,
    square_side,
    watched_files,
)
from mmdlm.cli.words import _one_line
from mmdlm.errors import InputError

STRENGTH = 0.5  # of a variation, if none is given
LARGEST_SEED = 2**63 - 1


def fill(
    text: Annotated[
        str | None,
        typer.Option("--text", help='Words, with holes: [MASK:2] two tokens, [MASK:{red|green}] a choice, [MASK:*].'),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", help="The picture.")] = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", help="A picture of the same size, white where to fill.")
    ] = None,
    extend: Annotated[
        str | None, typer.Option("--extend", help="Pixels to draw around the picture: LEFT,TOP,RIGHT,BOTTOM.")
    ] = None,
    variations: Annotated[
        int | None, typer.Option("--variations", min=1, help="So many different ones; without a mask, of the picture.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help=f"Share of a variation that is drawn anew; {STRENGTH}.")
    ] = None,
    keep_pixels: Annotated[
        bool, typer.Option("--keep-pixels", help="Pixels outside the mask stay as they are, too, not only tokens.")
    ] = False,
    together: Annotated[
        bool, typer.Option("--together", help="Words and picture in one run, for models trained so.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The PNG to write; without it, a text alone is filled.")
    ] = None,
    grid: Annotated[bool, typer.Option("--grid", help="All pictures on one sheet.")] = False,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance scale, 1 is none; the model's preset if not given.")
    ] = None,
    policy: PolicyOption = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Row i uses seed + i; random if not given.")
    ] = None,
    animation: GifOption = None,
    frames: FramesOption = None,
    confidence: ConfidenceOption = None,
    replay: ReplayOption = None,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fill what is missing: inpaint, outpaint, vary, complete a text, or make picture and words from parts of either.

    Prints the text, and how likely each choice was; writes the picture. What is not masked comes back as it was.
    """
    from mmdlm.picture_files import check_writable, numbered, write_whole

    borders = None if extend is None else _borders(extend)
    if image is not None and mask is None and borders is None and strength is None and variations is not None:
        strength = STRENGTH
    count = variations or 1
    if output is None and (mask is not None or borders is not None or strength is not None):
        output = Path("filled.png")
    paths = [] if output is None else [output] if grid else numbered(output, count)
    for path in paths:
        check_writable(path, ".png")
    if output is None and (animation or frames or confidence):
        raise InputError("There is no picture to watch, only words are filled: give -o to draw one.")
    check_watching(paths, animation, frames, confidence, replay)
    rule = parsed_policy(policy)
    played = recording(replay)
    pipe = load_pipeline("Fill", model, device, quiet, quantize, adapter=adapter)
    seed = seed_of(seed, played)
    facts = {"text": text or "", "seed": seed, **_facts(pipe, steps, guidance, policy)}
    if played is not None:
        task = {"image": image, "mask": mask, "extend": extend, "strength": strength, "together": together}
        played.check({"command": "fill", "rows": count, **task, **facts})

    import torch

    films: Films = []
    out = pipe(
        [text] * count if text is not None else None,
        None if image is None else [image] * count,
        mask,
        extend=borders,
        strength=strength,
        draw=output is not None,
        keep_pixels=keep_pixels,
        together=together,
        num_inference_steps=steps,
        guidance_scale=guidance,
        policy=rule,
        generator=[torch.Generator().manual_seed((seed + row) % (LARGEST_SEED + 1)) for row in range(count)],
        callback_on_step_end=keep_frames(films, 0) if animation or frames else None,
        replay=played,
    )
    files: dict[Path, bytes] = {}
    columns = square_side(count)
    if out.images is not None:
        alone = [
            {**facts, "seed": seed + row, **({"filled_text": out.texts[row]} if out.texts else {})}
            for row in range(count)
        ]
        of_all = {**facts, "pictures": count} if count > 1 else alone[0]
        files = _pictures(out.images, paths, columns, alone, of_all)
        files |= watched_files(films, columns, animation, frames, of_all)
        if confidence is not None:
            files[confidence] = confidence_sheet(out.confidence, columns, pipe.processor.image_size, of_all)
    if played is not None and not played.playing:
        files[played.path] = played.content()
    if frames is not None:
        frames.mkdir(exist_ok=True)
    for path, content in files.items():
        write_whole(path, content)
    _report(out, [path for path in files if frames is None or path.parent != frames], seed)


def _pictures(
    images: list[Any], paths: list[Path], columns: int, alone: list[dict[str, object]], of_all: dict[str, object]
) -> dict[Path, bytes]:
    """Every picture as a PNG with where it came from, or all on one sheet where there is one path for them."""
    from mmdlm.picture_files import png, sheet

    if len(paths) < len(images):
        return {paths[0]: png(sheet(images, columns), of_all)}
    return {path: png(image, told) for path, image, told in zip(paths, images, alone, strict=True)}


def _report(out: Any, written: list[Path], seed: int) -> None:
    """The words, the odds of the choices, and what was written."""
    for row, text in enumerate(out.texts or []):
        typer.echo(_one_line(text))
        for table in out.choices[row]:
            odds = sorted(table.items(), key=lambda pair: -pair[1])
            typer.echo("  " + ", ".join(f"{_one_line(choice)} {share:.1%}" for choice, share in odds))
    for path in written:
        typer.echo(f"{path} (seed {seed})" if len(written) == 1 else str(path))


def _facts(pipe: Any, steps: int | None, guidance: float | None, policy: str | None) -> dict[str, object]:
    preset = pipe.presets["draw"]
    return {
        "steps": preset["num_inference_steps"] if steps is None else steps,
        "guidance_scale": float(preset["guidance_scale"] if guidance is None else guidance),
        **({} if policy is None else {"policy": policy}),
        **model_facts(pipe),
    }


def _borders(text: str) -> list[int]:
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"--extend got {text!r}, expected LEFT,TOP,RIGHT,BOTTOM in pixels, for example 16,0,16,0.")
    return [int(part) for part in parts]

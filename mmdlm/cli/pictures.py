"""`mmdlm generate`: pictures from words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    CacheOption,
    ConfidenceOption,
    Films,
    FramesOption,
    GifOption,
    PolicyOption,
    ReplayOption,
    check_watching,
    confidence_sheet,
    keep_frames,
    parsed_cache,
    parsed_policy,
    recording,
    seed_of,
    square_side,
    watched_files,
)
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmdlm.pipelines import TextToImage

ROWS_AT_ONCE = 8  # pictures drawn together: more would only cost memory on a laptop
LARGEST_SEED = 2**63 - 1


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw; quote each prompt.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("picture.png"),
    count: Annotated[int, typer.Option("-n", help="Pictures of every prompt.", min=1)] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="All pictures on one sheet.")] = False,
    steps: StepsOption = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance scale, 1 is none; the model's preset if not given.")
    ] = None,
    interval: Annotated[
        str | None,
        typer.Option("--guidance-interval", help="LOW,HIGH: guide only while this share of the picture is masked."),
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="Guide away from this prompt instead of from none.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="A picture to change as the prompt says, for models trained on such pairs."),
    ] = None,
    cache: CacheOption = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", min=0, max=LARGEST_SEED, help="Picture i uses seed + i; random if not given."),
    ] = None,
    best_of: Annotated[
        int, typer.Option("--best-of", min=1, help="Draw so many for each; keep the one that says its prompt best.")
    ] = 1,
    policy: PolicyOption = None,
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
    """Draw pictures. Several go to NAME-0.png, NAME-1.png ..., or with --grid onto one sheet.

    Every PNG carries its prompt, seed, steps, guidance, model hash and version as text; the same command with the
    same seed writes the same bytes. With --best-of N candidate k of picture i has the seed + i * N + k.
    """
    from mmdlm.picture_files import check_writable, numbered, png, sheet, write_whole
    from mmdlm.processing import load_image

    wanted = [prompt for prompt in prompts for _ in range(count)]
    paths = [output] if grid else numbered(output, len(wanted))
    for path in paths:
        check_writable(path, ".png")
    check_watching(paths, animation, frames, confidence, replay)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings |= {"guidance_interval": _interval(interval), "negative_prompt": negative, "cache": parsed_cache(cache)}
    settings |= {"policy": parsed_policy(policy), "replay": recording(replay)}
    settings |= {"source": None if source is None else load_image(source)}
    played = settings["replay"]
    pipe = load_pipeline("TextToImage", model, device, quiet, quantize, adapter=adapter)
    seed = seed_of(seed, played)
    told = {"guidance_interval": interval, "negative_prompt": negative, "cache": cache, "policy": policy}
    facts = _facts(pipe, steps, guidance, told | {"source": None if source is None else source.name})
    for option, value in (("--negative", negative), ("--guidance-interval", interval)):
        if value is not None and facts["guidance_scale"] == 1:
            raise InputError(f"{option} needs guidance, and the guidance scale is 1, which is none: give --guidance 2.")
    if played is not None:
        played.check({"command": "generate", "prompts": wanted, "best_of": best_of, "seed": seed, **facts})
    candidates = [prompt for prompt in wanted for _ in range(best_of)]
    seeds = [(seed + index) % (LARGEST_SEED + 1) for index in range(len(candidates))]
    films: Films | None = [] if animation is not None or frames is not None else None
    drawn, codes, sure = _draw(pipe, candidates, seeds, settings, films)
    chosen = _best(pipe, candidates, codes, best_of)

    # One row for each prompt; a single prompt's pictures make a square.
    columns = count if len(prompts) > 1 else square_side(count)
    together: dict[str, object] = {"prompt": "\n".join(prompts), "seed": seed, "pictures": len(wanted), **facts}
    alone: list[dict[str, object]] = [{"prompt": candidates[row], "seed": seeds[row], **facts} for row in chosen]
    if grid:
        files = {output: png(sheet([drawn[row] for row in chosen], columns), together)}
    else:
        files = {path: png(drawn[row], told) for path, row, told in zip(paths, chosen, alone, strict=True)}
    of_all = together if grid or len(alone) > 1 else alone[0]
    if films is not None:
        files |= watched_files([films[row] for row in chosen], columns, animation, frames, of_all)
    if confidence is not None:
        sheets = [sure[row] for row in chosen]
        files[confidence] = confidence_sheet(sheets, columns, pipe.processor.image_size, of_all)
    if played is not None and not played.playing:
        files[played.path] = played.content()
    if frames is not None:
        frames.mkdir(exist_ok=True)
    for path, content in files.items():
        write_whole(path, content)
        if frames is None or path.parent != frames:
            typer.echo(f"{path} (seed {seed})" if len(files) == 1 else str(path))


def _draw(
    pipe: TextToImage,
    prompts: list[str],
    seeds: list[int],
    settings: dict[str, Any],
    films: Films | None,
) -> tuple[list[Image.Image], Tensor, Tensor]:
    """One picture per prompt and seed, their codes and confidences [B, h, w]; what they looked like goes to `films`."""
    import torch

    parts = []
    for start in range(0, len(prompts), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        # On the CPU whatever the device: the same seed then draws the same noise everywhere.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        callback = None if films is None else keep_frames(films, start)
        parts.append(pipe(prompts[part], generator=generators, callback_on_step_end=callback, **settings))
    codes, sure = (torch.cat([getattr(part, name).cpu() for part in parts]) for name in ("codes", "confidence"))
    return [picture for part in parts for picture in part.images], codes, sure


def _best(pipe: TextToImage, prompts: list[str], codes: Tensor, best_of: int) -> list[int]:
    """Of every `best_of` pictures the one that its own prompt is likeliest of."""
    if best_of == 1:
        return list(range(len(prompts)))
    from mmdlm.cli.score import SAMPLES
    from mmdlm.evaluation.scoring import words_given_picture

    nats = words_given_picture(pipe, prompts, codes, samples=SAMPLES, seed=0).nats.view(-1, best_of)
    return [row * best_of + int(best) for row, best in enumerate(nats.argmin(dim=1))]


def _interval(text: str | None) -> tuple[float, float] | None:
    """LOW,HIGH as numbers."""
    if text is None:
        return None
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise InputError(f"--guidance-interval got {text!r}, expected LOW,HIGH, for example 0.2,0.9.") from None
    return low, high


def _facts(
    pipe: TextToImage, steps: int | None, guidance: float | None, told: dict[str, str | None]
) -> dict[str, object]:
    """What every PNG carries beside its prompt and seed."""
    preset = pipe.presets["draw"]
    return {
        "steps": preset["num_inference_steps"] if steps is None else steps,
        "guidance_scale": float(preset["guidance_scale"] if guidance is None else guidance),
        **{name: value for name, value in told.items() if value is not None},
        **model_facts(pipe),
    }

"""`mmdlm eval images` and `mmdlm eval tokenizer`: sets of pictures against each other, and pictures through codes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.cli.evaluate_run import BatchOption, OutOption, SeedOption, finish, model_facts
from mmdlm.cli.loading import DeviceOption, ModelOption, QuietOption, StepsOption, load_pipeline, usable_device
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FeaturesOption = Annotated[
    str, typer.Option("--features", help="inception (FID; needs --weights), random, or a timm model's directory.")
]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="The weights of FID's Inception network.")]
DRAWN = "pictures"


def images(
    ctx: typer.Context,
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Folder of pictures, or a model directory.")],
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="Folder of pictures to compare with.")],
    output: OutOption,
    features: FeaturesOption = "inception",
    weights: WeightsOption = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A prompt a line, or metadata.jsonl: to draw, and for CLIPScore.")
    ] = None,
    clip: Annotated[Path | None, typer.Option("--clip", help="Directory of a CLIP of transformers: CLIPScore.")] = None,
    allow_few: Annotated[
        bool, typer.Option("--allow-few", help="Fewer pictures than features, and so hardly a number.")
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=0, help="Of the bootstrap; 0 for no interval.")] = 50,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the reference's features are kept.")] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 32,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """FID, KID, IS, precision, recall, density and coverage of pictures against others; CLIPScore against prompts.

    With other features than Inception's the distance is called feature distance, and is no FID. A model directory as
    GENERATED draws every prompt once, into the output, and goes on where it was stopped.
    """
    from mmdlm.evaluation.features import default_cache, extractor, folder_features, picture_files
    from mmdlm.evaluation.generation import compare_sets
    from mmdlm.evaluation.runs import check_new
    from mmdlm.evaluation.vqa import Scores

    started = time.monotonic()
    is_model = (generated / "model_index.json").is_file()
    if is_model and prompts is None:
        raise InputError(f"{generated} is a model and needs something to draw: give a file with --prompts.")
    if clip is not None and prompts is None:
        raise InputError("CLIPScore compares pictures with their prompts: give a file with --prompts.")
    chosen = usable_device(device)
    by = extractor(features, weights=weights, device=chosen)
    picture_files(reference)
    wanted = read_prompts(prompts) if prompts is not None else []
    check_new(output)
    facts, folder = None, generated
    if is_model:
        folder = output / DRAWN
        facts = _draw(generated, wanted, folder, steps=steps, seed=seed, device=device, quiet=quiet)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        # Generated pictures change with every run: only the reference is worth keeping.
        ours = folder_features(folder, by, batch_size=batch_size, progress=not quiet)
        kept = cache if cache is not None else default_cache()
        theirs = folder_features(reference, by, batch_size=batch_size, cache=kept, progress=not quiet)
        found = compare_sets(ours, theirs, by, allow_few=allow_few, resamples=resamples, seed=seed)
    notes = list(dict.fromkeys(str(one.message) for one in warned if one.category is UserWarning))
    for note in notes:
        typer.echo(f"mmdlm: {note}", err=True)
    rows: list[dict[str, Any]] = []
    if clip is not None:
        fit = _clip_scores(clip, folder, ours.files, wanted, chosen)
        found, rows = found | fit.summary, fit.rows
    finish(ctx, output, "images", Scores(found | {"warnings": notes}, rows), started, facts)


def read_prompts(path: Path) -> list[tuple[str | None, str]]:
    """(file name or None, prompt) from lines of text, or from JSON lines {"file_name", "text"}; never empty."""
    from mmdlm.evaluation.result_files import field, read_jsonl

    if path.suffix == ".jsonl":
        found = [(row.get("file_name"), str(field(row, "text", path)).strip()) for row in read_jsonl(path)]
    else:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): check the path given to --prompts.") from error
        found = [(None, line.strip()) for line in lines if line.strip()]
    if not found or not all(prompt for _, prompt in found):
        raise InputError(f"{path} has {'an empty prompt' if found else 'no prompts'}, expected one on every line.")
    return found


def _draw(
    model: Path,
    prompts: list[tuple[str | None, str]],
    folder: Path,
    *,
    steps: int | None,
    seed: int,
    device: str | None,
    quiet: bool,
) -> dict[str, Any]:
    """Draw what is not there yet, picture i with seed + i."""
    import torch
    from tqdm import tqdm

    from mmdlm.cli.pictures import ROWS_AT_ONCE
    from mmdlm.picture_files import png, write_whole

    pipe = load_pipeline("TextToImage", model, device, quiet)
    facts = model_facts(pipe, model)
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(exist_ok=True)
    digits = len(str(len(prompts) - 1))
    paths = [folder / f"{number:0{digits}}.png" for number in range(len(prompts))]
    left = [number for number, path in enumerate(paths) if not _is_drawn(path, facts["hash"], steps, seed + number)]
    unknown = set(folder.glob("*.png")) - set(paths)
    if unknown:
        raise InputError(f"{folder} holds {len(unknown)} pictures of another run: delete them, or change --output.")
    with tqdm(total=len(paths), initial=len(paths) - len(left), disable=True if quiet else None, leave=False) as bar:
        for start in range(0, len(left), ROWS_AT_ONCE):
            part = left[start : start + ROWS_AT_ONCE]
            generators = [torch.Generator().manual_seed(seed + number) for number in part]
            asked = [prompts[number][1] for number in part]
            drawn = pipe(asked, num_inference_steps=steps, generator=generators).images
            for number, picture in zip(part, drawn, strict=True):
                made = {"prompt": prompts[number][1], "seed": seed + number, "steps": steps, "model": facts["hash"]}
                write_whole(paths[number], png(picture, made))
            bar.update(len(part))
    return facts


def _is_drawn(path: Path, model: str, steps: int | None, seed: int) -> bool:
    """Whether the picture is there from an earlier start of the same run."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        text = getattr(picture, "text", {})
    if (text.get("model"), text.get("steps"), text.get("seed")) != (model, str(steps), str(seed)):
        raise InputError(f"{path} was drawn by another run: delete its folder, or choose another output.")
    return True


def _clip_scores(
    clip: Path, folder: Path, files: list[str], prompts: list[tuple[str | None, str]], device: str
) -> Any:
    from mmdlm.evaluation.clip_score import clip_score, load_clip
    from mmdlm.processing import load_image

    named = {name: prompt for name, prompt in prompts if name is not None}
    if named and folder.name != DRAWN:
        missing = [file for file in files if file not in named]
        if missing:
            raise InputError(f"{len(missing)} pictures have no prompt, {missing[0]} for one: name them in --prompts.")
        words = [named[file] for file in files]
    elif len(files) == len(prompts):
        words = [prompt for _, prompt in prompts]
    else:
        raise InputError(f"There are {len(prompts)} prompts for {len(files)} pictures, expected one for each in order.")
    return clip_score(load_clip(clip, device), [load_image(folder / file) for file in files], words, files)


def tokenizer(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of pictures.")],
    output: OutOption,
    features: Annotated[
        str | None, typer.Option("--features", help="Also rFID: inception (needs --weights), random, or a timm model.")
    ] = None,
    weights: WeightsOption = None,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="torchvision's AlexNet weights: also LPIPS.")] = None,
    codecs: Annotated[bool, typer.Option("--codecs/--no-codecs", help="JPEG and WebP at the same bits.")] = True,
    limit: Annotated[int | None, typer.Option("--limit", min=2, help="Only the first pictures.")] = None,
    batch_size: BatchOption = 16,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """What the visual tokenizer keeps of pictures: PSNR, SSIM, code use, bits per pixel, beside JPEG and WebP.

    Pictures are brought to the model's size first, and that is what the result is compared with.
    """
    from mmdlm.evaluation.features import extractor, picture_files
    from mmdlm.evaluation.reconstruction import lpips_network, measure_tokenizer
    from mmdlm.evaluation.runs import check_new

    started = time.monotonic()
    files = picture_files(folder)[:limit]
    chosen = usable_device(device)
    if weights is not None and features is None:
        features = "inception"
    by = None if features is None else extractor(features, weights=weights, device=chosen)
    network = None if lpips is None else lpips_network(lpips, chosen)
    check_new(output)
    pipe = load_pipeline("TextToImage", model, device, quiet)

    def batches() -> Iterator[tuple[list[str], Tensor]]:
        from tqdm import tqdm

        with tqdm(total=len(files), disable=True if quiet else None, leave=False, unit="pictures") as bar:
            for start in range(0, len(files), batch_size):
                part = files[start : start + batch_size]
                pixels = pipe.processor.pixels(part).to(pipe.model.device, pipe.visual_tokenizer.dtype)
                yield [path.relative_to(folder).as_posix() for path in part], pixels
                bar.update(len(part))

    scores = measure_tokenizer(pipe.visual_tokenizer, batches(), codecs=codecs, by=by, lpips=network)
    finish(ctx, output, "tokenizer", scores, started, model_facts(pipe, model))

"""`mmdlm eval images` and `mmdlm eval tokenizer`: sets of pictures against each other, and pictures through codes."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.cli.evaluate_run import BatchOption, OutOption, SeedOption, finish, model_record
from mmdlm.cli.loading import (
    AdapterOption,
    DeviceOption,
    ModelOption,
    QuietOption,
    StepsOption,
    load_pipeline,
    usable_device,
)
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FeaturesOption = Annotated[
    str, typer.Option("--features", help="inception (FID), random, or a timm model's directory.")
]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", help="The weights of FID's Inception network; those in torch's cache.")
]
DownloadOption = Annotated[
    bool, typer.Option("--download", help="Fetch weights that are not there from where they are published.")
]
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
    clip: Annotated[
        str | None, typer.Option("--clip", help="CLIPScore by a CLIP of transformers: its directory or Hub name.")
    ] = None,
    download: DownloadOption = False,
    allow_few: Annotated[
        bool, typer.Option("--allow-few", help="Fewer pictures than features, and so hardly a number.")
    ] = False,
    resamples: Annotated[int, typer.Option("--resamples", min=0, help="Of the bootstrap; 0 for no interval.")] = 50,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the reference's features are kept.")] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    batch_size: BatchOption = 32,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """FID, KID, IS, precision, recall, density and coverage of pictures against others; CLIPScore against prompts.

    With other features than Inception's the distance is called feature distance, and is no FID. A model directory as
    GENERATED draws every prompt once, into the output, and goes on where it was stopped.
    """
    from mmdlm.evaluation.clip_score import clip_score, load_clip
    from mmdlm.evaluation.features import default_cache, extractor, folder_features, picture_files
    from mmdlm.evaluation.fetched_weights import clip_directory
    from mmdlm.evaluation.generation import check_enough, compare_sets
    from mmdlm.evaluation.processes import share
    from mmdlm.evaluation.runs import check_new
    from mmdlm.evaluation.vqa import Scores

    started = time.monotonic()
    is_model = (generated / "model_index.json").is_file()
    if not is_model and not share().is_main:
        return  # only drawing is shared among processes
    if is_model and prompts is None:
        raise InputError(f"{generated} is a model and needs something to draw: give a file with --prompts.")
    if adapter is not None and not is_model:
        raise InputError(f"--adapter goes with a model as GENERATED, {generated} is none: leave it out.")
    if clip is not None and prompts is None:
        raise InputError("CLIPScore compares pictures with their prompts: give a file with --prompts.")
    if prompts is not None and clip is None and not is_model:
        raise InputError(f"--prompts is for CLIPScore or a model that draws, {generated} is none: give --clip too.")
    chosen = usable_device(device)
    wanted = read_prompts(prompts) if prompts is not None else []
    files = [] if is_model else [path.relative_to(generated).as_posix() for path in picture_files(generated)]
    counts = len(wanted) if is_model else len(files), len(picture_files(reference))
    if clip is not None and prompts is not None and not is_model:
        _prompts_of(files, wanted, prompts, drawn=False)
    by, of_clip, warned = None, None, list[warnings.WarningMessage]()
    if share().is_main:  # the others draw only
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            by = extractor(features, weights=weights, device=chosen, download=download, progress=not quiet)
        of_clip = None if clip is None else clip_directory(clip, download=download)
        if not allow_few:
            check_enough(*counts, by)  # before minutes of drawing and looking
    check_new(output)
    facts, folder = None, generated
    if is_model:
        folder = output / DRAWN
        drawn = _draw(generated, wanted, folder, steps=steps, seed=seed, adapter=adapter, device=device, quiet=quiet)
        if drawn is None or by is None:
            return  # the first of several processes measures
        facts = drawn
    assert by is not None
    with warnings.catch_warnings(record=True) as also:
        warnings.simplefilter("always")
        # Generated pictures change with every run: only the reference is worth keeping.
        ours = folder_features(folder, by, batch_size=batch_size, progress=not quiet)
        kept = cache if cache is not None else default_cache()
        theirs = folder_features(reference, by, batch_size=batch_size, cache=kept, progress=not quiet)
        found = compare_sets(ours, theirs, by, allow_few=allow_few, resamples=resamples, seed=seed)
    notes = _told([*warned, *also])
    rows: list[dict[str, Any]] = []
    if of_clip is not None and prompts is not None:
        words = _prompts_of(ours.files, wanted, prompts, drawn=is_model)
        fit = clip_score(load_clip(of_clip, chosen), [folder / file for file in ours.files], words, ours.files)
        found, rows = found | fit.summary, fit.rows
    finish(ctx, output, "images", Scores(found | {"warnings": notes}, rows), started, facts)


def _told(warned: list[warnings.WarningMessage]) -> list[str]:
    """What the library warned of, each once, and told to who waits."""
    notes = list(dict.fromkeys(str(one.message) for one in warned if one.category is UserWarning))
    for note in notes:
        typer.echo(f"mmdlm: {note}", err=True)
    return notes


def read_prompts(path: Path) -> list[tuple[str | None, str]]:
    """(file name or None, prompt) from lines of text, or from JSON lines {"file_name", "text"}; never empty."""
    from mmdlm.evaluation.result_files import read_jsonl, read_text, text_field

    if path.suffix == ".jsonl":
        found = [(row.get("file_name"), text_field(row, "text", path).strip()) for row in read_jsonl(path)]
    else:
        lines = read_text(path).splitlines()
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
    adapter: Path | None,
    device: str | None,
    quiet: bool,
) -> dict[str, Any] | None:
    """Draw what is not there yet, picture i with seed + i: the model's facts; None but in the first process."""
    import torch

    from mmdlm.cli.pictures import ROWS_AT_ONCE
    from mmdlm.evaluation.processes import run_batches
    from mmdlm.picture_files import png, write_whole

    pipe = load_pipeline("TextToImage", model, device, quiet, adapter=adapter)
    facts = model_record(pipe, model)
    weights = " ".join(str(facts[name]) for name in facts if name not in ("directory", "presets"))
    pipe.set_progress_bar_config(disable=True)
    folder.mkdir(exist_ok=True)
    digits = len(str(len(prompts) - 1))
    paths = [folder / f"{number:0{digits}}.png" for number in range(len(prompts))]
    for number, path in enumerate(paths):
        _check_own(path, weights, steps, seed + number)
    unknown = set(folder.glob("*.png")) - set(paths)
    if unknown:
        raise InputError(f"{folder} holds {len(unknown)} pictures of another run: delete them, or change --output.")

    def work(numbers: list[int], asked: list[str]) -> list[dict[str, Any]]:
        generators = [torch.Generator().manual_seed(seed + number) for number in numbers]
        drawn = pipe(asked, num_inference_steps=steps, generator=generators).images
        for number, prompt, picture in zip(numbers, asked, drawn, strict=True):
            made = {"prompt": prompt, "seed": seed + number, "steps": steps, "model": weights}
            write_whole(paths[number], png(picture, made))
        return [{"file": paths[number].name} for number in numbers]

    words = [prompt for _, prompt in prompts]
    begun_with = {"prompts": words, "steps": steps, "seed": seed, "facts": facts}
    rows = run_batches(
        folder.parent, "drawn", words, work, batch_size=ROWS_AT_ONCE, begun_with=begun_with, progress=not quiet
    )
    if rows is None:
        return None
    if missing := [row["file"] for row in rows if not (folder / row["file"]).is_file()]:
        raise InputError(f"{folder} has lost {len(missing)} pictures, {missing[0]} for one: delete {folder.parent}.")
    return facts


def _check_own(path: Path, model: str, steps: int | None, seed: int) -> None:
    """Raises InputError where the picture is there, and not from an earlier start of the same run."""
    from PIL import Image

    if not path.is_file():
        return
    with Image.open(path) as picture:
        text = getattr(picture, "text", {})
    if (text.get("model"), text.get("steps"), text.get("seed")) != (model, str(steps), str(seed)):
        raise InputError(f"{path} was drawn by another run: delete its folder, or choose another output.")


def _prompts_of(files: list[str], prompts: list[tuple[str | None, str]], source: Path, *, drawn: bool) -> list[str]:
    """Each picture's own prompt: by its name where the prompts have names, of drawn ones always in their order."""
    from mmdlm.evaluation.result_files import unique

    named = [] if drawn else [(name, prompt) for name, prompt in prompts if name is not None]
    if named:
        table = unique(named, source, "picture")
        missing = [file for file in files if file not in table]
        if missing:
            raise InputError(f"{len(missing)} pictures have no prompt, {missing[0]} for one: name them in {source}.")
        return [table[file] for file in files]
    if len(files) != len(prompts):
        raise InputError(f"There are {len(prompts)} prompts for {len(files)} pictures, expected one for each in order.")
    return [prompt for _, prompt in prompts]


def tokenizer(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of pictures.")],
    output: OutOption,
    features: Annotated[
        str | None, typer.Option("--features", help="Also rFID: inception, random, or a timm model's directory.")
    ] = None,
    weights: WeightsOption = None,
    lpips: Annotated[
        str | None,
        typer.Option("--lpips", help="Also LPIPS: torchvision's AlexNet weights, or alexnet: those in torch's cache."),
    ] = None,
    download: DownloadOption = False,
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
    from mmdlm.evaluation.processes import share
    from mmdlm.evaluation.reconstruction import lpips_network, measure_tokenizer
    from mmdlm.evaluation.runs import check_new

    started = time.monotonic()
    if not share().is_main:
        return  # it is quick: the first of several processes does it all
    files = picture_files(folder)[:limit]
    chosen = usable_device(device)
    if weights is not None and features is None:
        features = "inception"
    fetching: dict[str, Any] = {"device": chosen, "download": download, "progress": not quiet}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        by = None if features is None else extractor(features, weights=weights, **fetching)
    given = None if lpips is None or (lpips == "alexnet" and not Path(lpips).exists()) else Path(lpips)
    network = None if lpips is None else lpips_network(given, **fetching)
    check_new(output)
    notes = _told(warned)
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
    scores = scores._replace(summary=scores.summary | ({"warnings": notes} if notes else {}))
    finish(ctx, output, "tokenizer", scores, started, model_record(pipe, model))

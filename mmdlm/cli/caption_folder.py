"""`mmdlm caption-folder`: captions of a folder of pictures, however large."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuantizeOption, QuietOption, StepsOption, load_pipeline


def caption_folder(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The folder, with the folders in it.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder for captions.parquet and captions.jsonl.")],
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures described together.")] = 16,
    ray: Annotated[bool, typer.Option("--ray", help="Through Ray Data: a pool of processes, also over machines.")] = (
        False
    ),
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes of the pool of --ray.")] = 1,
    steps: StepsOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    quantize: QuantizeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Describe every picture below IN. The same command again goes on where a run was killed, and takes in new files.

    OUT gets captions.parquet and captions.jsonl: file, caption, confidence, width, height, error.
    """
    from tqdm import tqdm

    from mmdlm.assets import shipped_model
    from mmdlm.model_directory import check_model_directory, model_hash
    from mmdlm.serving.caption_folder import caption_folder as caption_all

    directory = (model or shipped_model()).resolve()
    check_model_directory(directory)
    # None: tqdm is silent when stderr is no terminal.
    with tqdm(unit="picture", disable=True if quiet else None) as bar:

        def progress(done: int, total: int, errors: int) -> None:
            bar.total = total
            bar.set_postfix(errors=errors, refresh=False)
            bar.update(done - bar.n)

        summary = caption_all(
            source,
            out,
            load=partial(load_pipeline, "ImageToText", directory, device, True, quantize),
            model_hash=model_hash(directory),
            batch_size=batch_size,
            steps=steps,
            workers=workers if ray else None,
            progress=progress,
        )
    before = f", {summary.before} of them done before" if summary.before else ""
    errors = f", {summary.errors} could not be read: see their error" if summary.errors else ""
    ignored = f"; {summary.ignored} files are no pictures" if summary.ignored else ""
    typer.echo(f"{out / 'captions.jsonl'}: {summary.pictures} pictures{before}{errors}{ignored}")

"""`mmdlm score`: how likely words are given a picture, and a picture given words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mmdlm.cli.loading import AdapterOption, DeviceOption, ModelOption, QuietOption, load_pipeline
from mmdlm.errors import InputError

SAMPLES = 32  # masks for each number, here and for --best-of


def score(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What is said of it; quote each.")],
    samples: Annotated[int, typer.Option("--samples", help="Masks for each number; more are more exact.")] = SAMPLES,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**31 - 1, help="Of the masks, alike for every text.")] = 0,
    model: ModelOption = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """How unlikely each text is given the picture, and the picture given each text: at most so many nats.

    Both are upper bounds of -log p by random masks (arXiv:2502.09992, eq. 6), with the standard error of the estimate;
    less is likelier. Texts of one picture are compared on the same masks.
    """
    from mmdlm.evaluation.scoring import picture_given_words, words_given_picture
    from mmdlm.processing import load_image

    if not all(text.strip() for text in texts):
        raise InputError("A text is empty, expected what is said of the picture: give some words.")
    picture = load_image(image)
    pipe = load_pipeline("ImageToText", model, device, quiet, adapter=adapter)
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes = pipe.visual_tokenizer.encode(pixels).cpu().expand(len(texts), -1, -1)
    words = words_given_picture(pipe, texts, codes, samples=samples, seed=seed)
    drawn = picture_given_words(pipe, texts, codes, samples=samples, seed=seed)
    typer.echo("text given picture\tpicture given text\t(nats, upper bound +- standard error)")
    for row, text in enumerate(texts):
        numbers = (f"{b.nats[row]:.2f} +- {b.standard_error[row]:.2f}" for b in (words, drawn))
        typer.echo("\t".join([*numbers, " ".join(text.split())]))

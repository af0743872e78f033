"""`mmdlm score`: how likely words are given a picture, and a picture given words; and the choice of the best by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmdlm.cli.loading import DeviceOption, ModelOption, QuietOption, load_pipeline
from mmdlm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from mmdlm.evaluation.likelihood import Bounds

SAMPLES = 32  # masks for each number


def score(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What is said of it; quote each.")],
    samples: Annotated[int, typer.Option("--samples", help="Masks for each number; more are more exact.")] = SAMPLES,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the masks, the same for every text.")] = 0,
    model: ModelOption = None,
    device: DeviceOption = None,
    quiet: QuietOption = False,
) -> None:
    """How unlikely each text is given the picture, and the picture given each text: at most so many nats.

    Both are upper bounds of -log p by random masks (arXiv:2502.09992, eq. 6), with the standard error of the estimate;
    less is likelier. Texts of one picture are compared on the same masks.
    """
    from mmdlm.processing import load_image

    if not all(text.strip() for text in texts):
        raise InputError("A text is empty, expected what is said of the picture: give some words.")
    picture = load_image(image)
    pipe = load_pipeline("ImageToText", model, device, quiet)
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes = pipe.visual_tokenizer.encode(pixels).cpu().expand(len(texts), -1, -1)
    words = words_given_picture(pipe, texts, codes, samples=samples, seed=seed)
    drawn = picture_given_words(pipe, texts, codes, samples=samples, seed=seed)
    typer.echo("text given picture\tpicture given text\t(nats, upper bound +- standard error)")
    for row, text in enumerate(texts):
        numbers = (f"{b.nats[row]:.2f} +- {b.standard_error[row]:.2f}" for b in (words, drawn))
        typer.echo("\t".join([*numbers, " ".join(text.split())]))


def words_given_picture(
    pipe: Any, texts: Sequence[str] | Sequence[list[int]], codes: Tensor, *, samples: int, seed: int
) -> Bounds:
    """The bound of -log p(text | picture), row by row: codes int [B, h, w]; all rows on the same masks.

    Texts may be given as ids. Every text has the same room, so that longer and shorter ones are compared fairly.
    """
    from mmdlm import sequence
    from mmdlm.evaluation.likelihood import bounds

    ids = [pipe.processor.text_ids(text) if isinstance(text, str) else text for text in texts]
    room = max(pipe.presets["describe"]["answer_length"], *(len(row) + 1 for row in ids))
    vocabulary = pipe.processor.vocabulary
    canvases = [sequence.describe_canvas(picture, pipe.grid, row, room, vocabulary)
                for picture, row in zip(codes, ids, strict=True)]
    _check_length(pipe, canvases)
    return bounds(pipe.model, canvases, vocabulary=vocabulary, samples=samples, seeds=[seed] * len(ids))


def picture_given_words(pipe: Any, texts: Sequence[str], codes: Tensor, *, samples: int, seed: int) -> Bounds:
    """The bound of -log p(picture | text), row by row: codes int [B, h, w]; all rows on the same masks."""
    from mmdlm import sequence
    from mmdlm.evaluation.likelihood import bounds

    vocabulary = pipe.processor.vocabulary
    canvases = [sequence.draw_canvas(pipe.processor.text_ids(text), picture, pipe.grid, vocabulary)
                for text, picture in zip(texts, codes, strict=True)]
    _check_length(pipe, canvases)
    return bounds(pipe.model, canvases, vocabulary=vocabulary, samples=samples, seeds=[seed] * len(canvases))


def _check_length(pipe: Any, canvases: Sequence[Any]) -> None:
    longest, limit = max(len(canvas.ids) for canvas in canvases), pipe.model.config.max_positions
    if longest > limit:
        raise InputError(
            f"The text is too long by {longest - limit} tokens, the model has {limit} positions: shorten it."
        )

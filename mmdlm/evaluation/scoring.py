"""How likely words are given a picture, and a picture given words: what `mmdlm score` prints and `--best-of` ranks by.

Both are upper bounds of -log p by random masks, in nats (LLaDA, arXiv:2502.09992, eq. 6); less is likelier. All rows
of a call get the same masks, so that they are compared on the same questions.

Shape letters: B rows, h x w the grid of codes. `pipe` is any pipeline of `mmdlm.pipelines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import Bounds, bounds


def words_given_picture(
    pipe: Any, texts: Sequence[str] | Sequence[list[int]], codes: Tensor, *, samples: int, seed: int
) -> Bounds:
    """The bound of -log p(text | picture), row by row: codes int [B, h, w]; all rows on the same masks.

    Texts may be given as ids. Every text has the same room, so that longer and shorter ones are compared fairly.
    """
    ids = [pipe.processor.text_ids(text) if isinstance(text, str) else text for text in texts]
    room = max(pipe.presets["describe"]["answer_length"], *(len(row) + 1 for row in ids))
    canvases = [pipe.answer_canvas(picture, None, room, row) for picture, row in zip(codes, ids, strict=True)]
    _check_length(pipe, canvases)
    return bounds(pipe.model, canvases, vocabulary=pipe.processor.vocabulary, samples=samples, seeds=[seed] * len(ids))


def picture_given_words(pipe: Any, texts: Sequence[str], codes: Tensor, *, samples: int, seed: int) -> Bounds:
    """The bound of -log p(picture | text), row by row: codes int [B, h, w]; all rows on the same masks."""
    canvases = [pipe.draw_canvas(text, picture) for text, picture in zip(texts, codes, strict=True)]
    _check_length(pipe, canvases)
    vocabulary, seeds = pipe.processor.vocabulary, [seed] * len(canvases)
    return bounds(pipe.model, canvases, vocabulary=vocabulary, samples=samples, seeds=seeds)


def _check_length(pipe: Any, canvases: Sequence[Any]) -> None:
    longest, limit = max(len(canvas.ids) for canvas in canvases), pipe.model.config.max_positions
    if longest > limit:
        raise InputError(
            f"The text is too long by {longest - limit} tokens, the model has {limit} positions: shorten it."
        )

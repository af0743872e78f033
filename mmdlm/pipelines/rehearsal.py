"""What a model knows already, as paired data: pictures and captions of its own, to rehearse while it learns.

Fine-tuning on a few pictures makes a model forget the rest, unless it sees some of the rest too. Where its training
data are not at hand, its own samples stand in for them: pseudo-rehearsal (Robins 1995), DreamBooth's prior preservation
(arXiv:2208.12242).

What is rehearsed is what is kept, so it must be as varied as what the model knows. A model directory says it with
`rehearsal.jsonl` (`mmdlm.training.known_words`): its captions are drawn. For a model without that file captions have to
be found: a picture drawn without a prompt is described, that caption is drawn, and the drawing is kept where its
description is that same caption. Such pictures are samples of the model's own distribution (ancestral, temperature 1),
for a preset's low temperature ends in the same few; even so, a model finds what it draws easily and misses the rest.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.pipelines import layouts
from mmdlm.pipelines.describing import ImageToText
from mmdlm.pipelines.drawing import TextToImage
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import categorical
from mmdlm.sampling.policies import ancestral
from mmdlm.sampling.predictors import full
from mmdlm.sequence import Canvas, batch, hide

METADATA = "metadata.jsonl"
_ROWS = 16  # drawn and described together
_TRIES = 4  # pictures without a prompt for each that is wanted
_ALIKE = 2  # at most so many of one caption: the commonest ones would crowd out the rest
_FOUND_STEPS, _DRAWN_STEPS = 8, 4  # what fewer steps get wrong is not said twice
_READ = {"name": "threshold", "tau": 0.9}  # as many places in a step as are sure


def rehearse(
    draw: TextToImage,
    out: Path,
    *,
    count: int,
    known: Sequence[Mapping[str, Any]] = (),
    questions: Sequence[str] = (),
    seed: int = 0,
) -> tuple[int, int]:
    """Writes at most `count` pictures with captions and answers as the folder `out`.

    known: rows of words (`read_words`) of which `count` are drawn; without any, captions are found by the model itself,
    which then answers `questions` too. A folder that is there already is kept as it is: it is written beside its place
    and renamed. Returns how many pictures it has, and how many captions were tried (0 where it was there). Raises
    InputError where the model says hardly anything twice: it has no world of its own to rehearse.
    """
    if (out / METADATA).is_file():
        return len((out / METADATA).read_text(encoding="utf-8").splitlines()), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=out.parent))
    tried = 0
    try:
        rows: list[dict[str, Any]] = []
        made = _drawn(draw, count, known, seed) if known else _kept(draw, count, questions, seed)
        for row, picture, tried in made:  # noqa: B007
            name = f"{len(rows):04}.png"
            picture.save(place / name)
            rows.append({"file_name": name} | row)
        if len(rows) < 2:
            raise InputError(
                f"Of {tried} pictures that the model drew it described {len(rows) or 'none'} in the same words twice, "
                "so it cannot rehearse what it knows: give pictures of its training with --replay, or --rehearse 0 to "
                "let it forget."
            )
        (place / METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        os.replace(place, out)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return len(rows), tried


def _drawn(
    draw: TextToImage, count: int, known: Sequence[Mapping[str, Any]], seed: int
) -> Iterator[tuple[dict[str, Any], Image.Image, int]]:
    """(row of words, its picture, rows drawn so far) for the first `count` rows: the first say most (`some_words`)."""
    room = _room(draw)
    rows = [dict(row) for row in known if len(draw.processor.text_ids(row["text"][0])) <= room][:count]
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        chance = torch.Generator().manual_seed(seed * 1_000_003 + start)
        drawn = draw([row["text"][0] for row in part], generator=chance, num_inference_steps=_DRAWN_STEPS)
        for row, picture in zip(part, cast(list[Image.Image], drawn.images), strict=True):
            yield row, picture, start + len(part)


def _room(draw: TextToImage) -> int:
    """Tokens that a caption may have beside a picture."""
    return draw.model.config.max_positions - len(layouts.draw_canvas("", draw.grid, draw.processor, draw.family).ids)


def _kept(
    draw: TextToImage, count: int, questions: Sequence[str], seed: int
) -> Iterator[tuple[dict[str, Any], Image.Image, int]]:
    """(row of words, its picture, captions tried so far), at most `count` times."""
    read = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    read.presets = draw.presets
    read.set_progress_bar_config(disable=True)
    room, known = _room(draw), Counter[str]()
    found = tried = 0
    while found < count and tried < _TRIES * count:
        chance = torch.Generator().manual_seed(seed * 1_000_003 + tried)
        rows = min(_ROWS, 2 * (count - found), _TRIES * count - tried)
        seen = read(unprompted(draw, rows, chance), policy=_READ).texts
        tried += rows
        captions = []
        for text in seen:
            # A model that knows little may say more than fits beside a picture.
            if text.strip() and known[text] < _ALIKE and len(draw.processor.text_ids(text)) <= room:
                captions.append(text)
                known[text] += 1
        if not captions:
            continue
        drawn = draw(captions, generator=chance, num_inference_steps=_DRAWN_STEPS)
        pictures = cast(list[Image.Image], drawn.images)
        again = read(pictures, policy=_READ).texts
        same = [n for n, text in enumerate(again) if text == captions[n]][: count - found]
        if not same:
            continue
        chosen = [pictures[n] for n in same]
        answers = [read(chosen, question, policy=_READ).texts for question in questions]
        for n, at in enumerate(same):
            found += 1
            asked = {"question": list(questions), "answers": [[of[n]] for of in answers]} if answers else {}
            yield {"text": [captions[at]]} | asked, pictures[at], tried


@torch.no_grad()
def unprompted(pipe: TextToImage, rows: int, generator: torch.Generator) -> list[Image.Image]:
    """`rows` pictures drawn without a prompt, as varied as the model knows them: the branch that guidance subtracts,
    sampled at temperature 1."""
    words = pipe.processor.vocabulary
    row = hide(layouts.draw_canvas("", pipe.grid, pipe.processor, pipe.family), words.mask_id)
    canvas = Canvas(*(part.to(pipe.model.device) for part in batch([row] * rows, pad_id=words.pad_id)[0]))
    columns = words.image_columns
    predict = full(pipe.model, position_ids=canvas.positions, grid=canvas.grid, columns=columns)
    for state in denoise(
        predict,
        canvas.ids,
        ancestral(schedule="cosine"),
        editable=canvas.editable,
        mask_id=words.mask_id,
        steps=_FOUND_STEPS,
        draw=categorical(temperature=1.0),
        generator=generator,
        first_id=columns[0],
    ):
        ids = state.x0[canvas.editable]
    codes = words.image_codes(ids).view(rows, *pipe.grid)
    images: list[Image.Image] = pipe.processor.images(pipe.visual_tokenizer.decode(codes))
    return images

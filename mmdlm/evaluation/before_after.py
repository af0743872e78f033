"""A model before and after it was trained on somebody's pictures: the same pictures, prompts, masks and seeds.

    before = measure(draw, read, pairs, seed=0)      # TextToImage, ImageToText; pairs: of mmdlm.data.paired
    ...                                              # training
    after = measure(draw, read, pairs, seed=0)
    before_after_sheet(pairs, before, after)

The bound is LLaDA's (`mmdlm.evaluation.likelihood`), CIDEr-D pycocoevalcap's. The distance of a drawing from the
picture that its prompt came with is between features of fixed random weights: comparable with itself only, no FID.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from mmdlm.data.paired import Pair
from mmdlm.errors import InputError
from mmdlm.evaluation.captioning import Captioned, score_captions
from mmdlm.evaluation.features import extractor, pixels
from mmdlm.evaluation.likelihood import bounds, per_token
from mmdlm.evaluation.result_files import read_json, write_json
from mmdlm.evaluation.sheets import BESIDE, RIGHT, WRONG, Exhibit, labelled_sheet
from mmdlm.picture_files import png, write_whole
from mmdlm.picture_reading import fit_square
from mmdlm.sequence import Canvas, describe_canvas, draw_canvas

_ROWS = 8  # drawn or described together
SEED = 0
METRICS = (  # key, what a person reads, whether less is better
    ("image_nats", "image, nats per code (bound)", True),
    ("text_nats", "caption, nats per token (bound)", True),
    ("cider_d", "caption, CIDEr-D", False),
    ("exact", "caption, exact match", False),
    ("answers", "answers, exact match", False),
    ("feature_distance", "drawing, feature distance", True),
)


class Measured(NamedTuple):
    """`numbers`: METRICS' keys, None where there is nothing to measure it on; `captions` and `drawings` of each pair
    with a caption, in order."""

    numbers: dict[str, float | None]
    captions: list[str]
    drawings: list[Image.Image]


@torch.no_grad()
def measure(draw: Any, read: Any, pairs: Sequence[Pair], *, samples: int = 8, seed: int = SEED) -> Measured:
    """Likelihood, captions, answers and drawings of `pairs`, whose first caption is the prompt and the one expected.

    draw, read: a model's TextToImage and ImageToText, which share its parts.

    exact: the share of captions that are one of their picture's, to the letter. Without pycocoevalcap, and for a single
    picture, there is no CIDEr-D. Raises InputError where no pair has a caption.
    """
    shown = [pair for pair in pairs if pair.texts]
    if not shown:
        raise InputError("There is no picture with a caption to measure before and after, expected at least one.")
    draw.model.eval()
    pictures = [pair.image for pair in shown]
    said = [text for part in _parts(pictures) for text in read(part).texts]
    drawings: list[Image.Image] = []
    for start in range(0, len(shown), _ROWS):
        prompts = [pair.texts[0] for pair in shown[start : start + _ROWS]]
        chances = [torch.Generator().manual_seed(seed + start + n) for n in range(len(prompts))]
        drawings += draw(prompts, generator=chances).images
    numbers = _bounds(draw, shown, samples, seed)
    numbers["exact"] = sum(text in pair.texts for text, pair in zip(said, shown, strict=True)) / len(shown)
    numbers["cider_d"] = _cider(shown, said)
    numbers["answers"] = _answers(read, pairs)
    numbers["feature_distance"] = _distance(pictures, drawings, draw.processor.image_size)
    return Measured({key: numbers[key] for key, _, _ in METRICS}, said, drawings)


def comparison(before: Measured, after: Measured) -> list[str]:
    """The numbers side by side, as lines to print."""
    lines = [f"{'':34}{'before':>10}{'after':>10}"]
    for key, words, _ in METRICS:
        pair = (before.numbers[key], after.numbers[key])
        if None not in pair:
            lines.append(f"{words:34}" + "".join(f"{value:10.3f}" for value in pair))
    return lines


def before_after_sheet(
    pairs: Sequence[Pair], before: Measured, after: Measured, *, most: int = 24, side: int = 96
) -> Image.Image:
    """Threes of the given picture and its prompt, the drawing before, the drawing after; under each its caption.

    The captions are of the given picture in all three: expected, said before, said after; red where they are not it.
    """
    exhibits = []
    shown = [pair for pair in pairs if pair.texts]
    for n, pair in enumerate(shown[:most]):
        exhibits.append(Exhibit(pair.image, [(pair.texts[0], BESIDE)]))
        for found in (before, after):
            right = found.captions[n] in pair.texts
            exhibits.append(Exhibit(found.drawings[n], [(found.captions[n], RIGHT if right else WRONG)]))
    return labelled_sheet(exhibits, columns=12, side=side)


def save_measured(
    found: Measured, directory: Path, *, prompts: Sequence[str], facts: Mapping[str, object], seed: int = SEED
) -> None:
    """Keeps a measurement: a PNG for each drawing, and numbers.json, which is written last.

    Every PNG carries its prompt, its seed (`seed` is that of `measure`) and `facts`: of which model, by which version.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for n, (drawing, prompt) in enumerate(zip(found.drawings, prompts, strict=True)):
        write_whole(directory / f"{n:04}.png", png(drawing, {"prompt": prompt, "seed": seed + n, **facts}))
    write_json(directory / "numbers.json", {"numbers": found.numbers, "captions": found.captions})


def load_measured(directory: Path) -> Measured | None:
    """What `save_measured` wrote; None where it did not finish."""
    if not (directory / "numbers.json").is_file():
        return None
    content: dict[str, Any] = read_json(directory / "numbers.json")
    drawings = [Image.open(directory / f"{n:04}.png").convert("RGB") for n in range(len(content["captions"]))]
    return Measured(content["numbers"], content["captions"], drawings)


def _parts(pictures: Sequence[Image.Image]) -> list[list[Image.Image]]:
    return [list(pictures[start : start + _ROWS]) for start in range(0, len(pictures), _ROWS)]


def _bounds(pipe: Any, pairs: Sequence[Pair], samples: int, seed: int) -> dict[str, float | None]:
    """Nats per code of a picture given its caption, and per token (with one end) of a caption given its picture."""
    words, ids = pipe.processor.vocabulary, pipe.processor.text_ids
    room = int(pipe.presets["describe"]["answer_length"])
    drawn: list[Canvas] = []
    told: list[Canvas] = []
    counted: list[int] = []
    for part in _parts([pair.image for pair in pairs]):
        rows = pairs[len(drawn) : len(drawn) + len(part)]
        levels = pipe.processor.pixels(part).to(pipe.model.device, pipe.visual_tokenizer.dtype)
        for pair, codes in zip(rows, pipe.visual_tokenizer.encode(levels).cpu(), strict=True):
            caption = ids(pair.texts[0])
            drawn.append(draw_canvas(caption, codes, pipe.grid, words))
            if len(caption) < room:
                told.append(describe_canvas(codes, pipe.grid, caption, room, words))
                counted.append(len(caption) + 1)
    settings: dict[str, Any] = {"vocabulary": words, "samples": samples, "seeds": seed, "batch_size": 16}
    image = per_token(bounds(pipe.model, drawn, **settings))["nats_per_token"]
    text = per_token(bounds(pipe.model, told, **settings), counted=counted)["nats_per_token"] if told else None
    return {"image_nats": image, "text_nats": text}


def _cider(pairs: Sequence[Pair], said: Sequence[str]) -> float | None:
    if len(pairs) < 2:  # it weighs words by how rare they are among the pictures: of one picture, nothing is
        return None
    references = [Captioned(n, (), tuple(pair.texts)) for n, pair in enumerate(pairs)]
    try:
        return float(score_captions(references, dict(enumerate(said))).summary["cider_d"])
    except InputError:  # the extra `eval` is not installed
        return None


def _answers(read: Any, pairs: Sequence[Pair]) -> float | None:
    asked = [(pair.image, question, answers) for pair in pairs for question, answers in pair.questions]
    right = 0
    for start in range(0, len(asked), _ROWS):
        part = asked[start : start + _ROWS]
        texts = read([case[0] for case in part], [case[1] for case in part]).texts
        right += sum(text in case[2] for text, case in zip(texts, part, strict=True))
    return right / len(asked) if asked else None


def _distance(pictures: Sequence[Image.Image], drawings: Sequence[Image.Image], side: int) -> float:
    """The mean squared distance of each drawing's features from its own picture's, both at the model's size."""
    by = extractor("random")
    sets = [torch.stack([pixels(fit_square(one, side)) for one in some]) for some in (pictures, drawings)]
    real, made = (by.extract(some)[0].double() for some in sets)
    return float((real - made).square().sum(1).mean())

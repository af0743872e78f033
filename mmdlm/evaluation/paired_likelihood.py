"""Pictures with captions, judged both ways: the bound of each given the other, and who belongs to whom."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import Bounds, bounds, per_token, retrieval
from mmdlm.evaluation.processes import run_batches
from mmdlm.evaluation.result_files import find_picture, read_jsonl, text_field, unique
from mmdlm.evaluation.vqa import Scores
from mmdlm.sequence import Canvas

_LN2 = math.log(2)


class Pair(NamedTuple):
    """A picture and its caption."""

    id: str
    picture: Path
    text: str


def read_pairs(folder: Path) -> list[Pair]:
    """The pictures of a folder with metadata.jsonl, lines {"file_name", "text"} (the imagefolder format).

    Raises InputError without that file, for a picture that is missing or named twice, and for an empty text.
    """
    path = folder / "metadata.jsonl"
    found = []
    for row in read_jsonl(path):
        name, text = text_field(row, "file_name", path), text_field(row, "text", path)
        if not text.strip():
            raise InputError(f"{path} has an empty text for {name}, expected its caption.")
        found.append(Pair(name, find_picture(folder, (name,)), text))
    if not found:
        raise InputError(f"{path} names no pictures, expected at least one line.")
    unique(((one.id, None) for one in found), path, "picture")
    return found


def measure_pairs(
    pipe: Any,
    pairs: list[Pair],
    out: Path,
    *,
    samples: int,
    pool: int,
    seed: int,
    batch_size: int,
    begun_with: Mapping[str, Any],
    progress: bool = False,
) -> Scores | None:
    """The bound of texts given pictures, of pictures given texts and alone, and retrieval@1 over the first `pool`.

    A text counts for its own tokens and one eos; the bound is that of the whole answer area. `score` of a row is the
    bits per text token, where less is better. pipe: an ImageToText of a model that draws as well. What is measured is
    kept in `out` as it comes, and shared among processes (`mmdlm.evaluation.processes`); None but in the first.
    """
    texts = [pipe.processor.text_ids(pair.text) for pair in pairs]
    most = pipe.presets["describe"]["answer_length"] - 1
    if too_long := [(pair.id, len(ids)) for pair, ids in zip(pairs, texts, strict=True) if len(ids) > most]:
        raise InputError(
            f"{len(too_long)} texts are longer than the model's captions, that of {too_long[0][0]} has "
            f"{too_long[0][1]} tokens, expected at most {most}: shorten them."
        )
    shared: dict[str, Any] = {"samples": samples, "batch_size": batch_size}

    def judge(numbers: list[int], places: list[int]) -> list[dict[str, Any]]:
        seeds = [seed + number for number in numbers]
        found = {
            name: bounds(pipe.model, canvases, vocabulary=pipe.processor.vocabulary, seeds=seeds, **shared)
            for name, canvases in _canvases(pipe, [pairs[p] for p in places], [texts[p] for p in places]).items()
        }
        return [{name: _row(bound, row) for name, bound in found.items()} for row in range(len(places))]

    size = min(pool, len(pairs)) if pool > 1 and len(pairs) > 1 else 0

    def match_one(numbers: list[int], places: list[int]) -> list[dict[str, Any]]:
        room = pipe.presets["describe"]["answer_length"]
        rows = []
        for place in places:
            codes = _codes(pipe, pairs[place].picture)
            canvases = [pipe.answer_canvas(codes, None, room, ids) for ids in texts[:size]]
            # the same masks for all texts and pictures
            found = bounds(pipe.model, canvases, vocabulary=pipe.processor.vocabulary, seeds=[seed] * size, **shared)
            rows.append({"nats": found.nats.tolist()})
        return rows

    keeping: dict[str, Any] = {"begun_with": begun_with, "progress": progress}
    # As many pairs at once as fill one forward: what a pair's numbers are then depends on no other batch.
    at_once = max(1, batch_size // samples)
    rows = run_batches(out, "pairs", range(len(pairs)), judge, batch_size=at_once, **keeping)
    matched = run_batches(out, "pool", range(size), match_one, batch_size=1, **keeping)
    if rows is None or matched is None:
        return None
    tokens = [len(ids) + 1 for ids in texts]
    found = {name: _bounds([row[name] for row in rows]) for name in rows[0]}
    summary: dict[str, Any] = {
        name: per_token(bound, counted=tokens if name == "text_given_picture" else None)
        for name, bound in found.items()
    }
    if size:
        nats = torch.tensor([row["nats"] for row in matched], dtype=torch.float64)
        summary["retrieval_at_1"] = retrieval(nats) | {"pool": size}
    scored = [
        {"id": pair.id, **{name: row[name][0] for name in row}, "score": row["text_given_picture"][0] / _LN2 / counted}
        for pair, row, counted in zip(pairs, rows, tokens, strict=True)
    ]
    return Scores(summary | {"samples": samples, "pictures": len(pairs)}, scored)


def _canvases(pipe: Any, pairs: list[Pair], texts: list[list[int]]) -> dict[str, list[Canvas]]:
    """What is judged of each pair."""
    room, codes = pipe.presets["describe"]["answer_length"], [_codes(pipe, pair.picture) for pair in pairs]
    return {
        "text_given_picture": [pipe.answer_canvas(one, None, room, ids) for one, ids in zip(codes, texts, strict=True)],
        "picture_given_text": [pipe.draw_canvas(pair.text, one) for one, pair in zip(codes, pairs, strict=True)],
        "picture_alone": [pipe.draw_canvas("", one) for one in codes],
    }


@torch.no_grad()
def _codes(pipe: Any, picture: Path) -> Tensor:
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes: Tensor = pipe.visual_tokenizer.encode(pixels)[0].cpu()
    return codes


def _bounds(rows: list[list[float]]) -> Bounds:
    """What `_row` made of every row, back in tensors."""
    nats, error, text, image, tokens = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return Bounds(nats, error, text, image, tokens.long())


def _row(bound: Bounds, row: int) -> list[float]:
    """One row of a bound as plain numbers, in the order of its fields."""
    return [part[row].item() for part in bound]

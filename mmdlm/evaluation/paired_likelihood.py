"""Pictures with captions, judged both ways: the bound of each given the other, and who belongs to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import Bounds, bounds, match, per_token, retrieval
from mmdlm.evaluation.result_files import field, find_picture, read_jsonl, unique
from mmdlm.evaluation.vqa import Scores


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
        name, text = str(field(row, "file_name", path)), str(field(row, "text", path))
        if not text.strip():
            raise InputError(f"{path} has an empty text for {name}, expected its caption.")
        found.append(Pair(name, find_picture(folder, (name,)), text))
    if not found:
        raise InputError(f"{path} names no pictures, expected at least one line.")
    unique(((one.id, None) for one in found), path, "picture")
    return found


def measure_pairs(
    pipe: Any, pairs: list[Pair], *, samples: int, pool: int, seed: int, batch_size: int, progress: bool = False
) -> Scores:
    """The bound of texts given pictures, of pictures given texts and alone, and retrieval@1 over the first `pool`.

    A text counts for its own tokens and one eos; the bound is that of the whole answer area. `score` of a row is the
    bits per text token, where less is better. pipe: an ImageToText of a model that draws as well.
    """
    from tqdm import tqdm

    vocabulary, processor = pipe.processor.vocabulary, pipe.processor
    length = pipe.presets["describe"]["answer_length"]
    with torch.no_grad():
        codes = [
            pipe.visual_tokenizer.encode(
                processor.pixels(pair.picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
            )[0].cpu()
            for pair in pairs
        ]
    texts = [processor.text_ids(pair.text) for pair in pairs]
    grid = (codes[0].shape[0], codes[0].shape[1])
    canvases = {
        "text_given_picture": [
            sequence.describe_canvas(one, grid, ids, length, vocabulary) for one, ids in zip(codes, texts, strict=True)
        ],
        "picture_given_text": [
            sequence.draw_canvas(ids, one, grid, vocabulary) for one, ids in zip(codes, texts, strict=True)
        ],
        "picture_alone": [sequence.draw_canvas([], one, grid, vocabulary) for one in codes],
    }
    found: dict[str, Bounds] = {}
    for name in tqdm(canvases, disable=not progress, leave=False):
        found[name] = bounds(
            pipe.model, canvases[name], vocabulary=vocabulary, samples=samples, seeds=seed, batch_size=batch_size
        )
    tokens = [len(ids) + 1 for ids in texts]
    summary: dict[str, Any] = {
        "text_given_picture": per_token(found["text_given_picture"], counted=tokens),
        "picture_given_text": per_token(found["picture_given_text"]),
        "picture_alone": per_token(found["picture_alone"]),
    }
    bits = found["text_given_picture"].nats / torch.log(torch.tensor(2.0, dtype=torch.float64))
    rows: list[dict[str, Any]] = [
        {"id": pair.id, **{name: float(bound.nats[row]) for name, bound in found.items()}}
        for row, pair in enumerate(pairs)
    ]
    for row, counted, total in zip(rows, tokens, bits.tolist(), strict=True):
        row["score"] = total / counted
    size = min(pool, len(pairs))
    if size > 1:
        settings = {"vocabulary": vocabulary, "answer_length": length, "samples": samples, "batch_size": batch_size}
        matrix = match(pipe.model, codes[:size], texts[:size], seed=seed, **settings)
        summary["retrieval_at_1"] = retrieval(matrix) | {"pool": size}
    return Scores(summary | {"samples": samples, "pictures": len(pairs)}, rows)

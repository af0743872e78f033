"""Multiple choice, twice: by the likelihood bound of every choice, and by what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import bounds
from mmdlm.evaluation.result_files import field, id_field, read_jsonl, text_field, unique
from mmdlm.evaluation.vqa import Scores, mean_percent, normalise


class Choices(NamedTuple):
    """A question about a picture, with its choices."""

    id: Any
    picture: str
    text: str
    choices: tuple[str, ...]
    answer: int  # which of them is right, from 0 on


def read_choices(path: Path) -> list[Choices]:
    """Lines {"id", "image", "question", "choices": [...], "answer": place from 0 on, or the choice itself}.

    Raises InputError for fewer than two choices, choices that come twice, and an answer that is none of them.
    """
    found = []
    for row in read_jsonl(path):
        key, listed = id_field(row, "id", path), field(row, "choices", path)
        offered = tuple(str(one) for one in listed) if isinstance(listed, list) else ()
        if len(offered) < 2 or len(set(offered)) < len(offered) or not all(one.strip() for one in offered):
            raise InputError(
                f"{path}: question {key!r} has the choices {listed!r}, expected a list of two or more, different."
            )
        answer = field(row, "answer", path)
        place = offered.index(answer) if isinstance(answer, str) and answer in offered else answer
        if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < len(offered):
            raise InputError(f"{path}: the answer to {key!r} is {answer!r}, expected one of its choices.")
        found.append(Choices(key, text_field(row, "image", path), text_field(row, "question", path), offered, place))
    if not found:
        raise InputError(f"{path} has no questions, expected at least one line.")
    unique(((one.id, None) for one in found), path)
    return found


@torch.no_grad()
def choice_nats(pipe: Any, one: Choices, picture: Path, *, samples: int, seed: int, batch_size: int) -> list[float]:
    """The bound of every choice as answer to its question, in nats, on the same masks. pipe: an ImageToText."""
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes = pipe.visual_tokenizer.encode(pixels)[0]
    ids = [pipe.processor.text_ids(choice) for choice in one.choices]
    room = max(pipe.presets["ask"]["answer_length"], *(len(choice) + 1 for choice in ids))
    canvases = [pipe.answer_canvas(codes, one.text, room, choice) for choice in ids]
    longest, limit = max(len(canvas.ids) for canvas in canvases), pipe.model.config.max_positions
    if longest > limit:
        raise InputError(
            f"Question {one.id!r} with its choices is too long by {longest - limit} tokens, the model has {limit} "
            "positions: shorten it."
        )
    found = bounds(
        pipe.model, canvases, vocabulary=pipe.processor.vocabulary, samples=samples, seeds=[seed] * len(ids),
        batch_size=batch_size,
    )  # fmt: skip
    nats: list[float] = found.nats.tolist()
    return nats


def score_choices(asked: Sequence[Choices], written: Sequence[str], nats: Sequence[list[float]]) -> Scores:
    """Percent right by likelihood (`score`) and by generation: what was written is, normalised, the right choice.

    What is written and is no choice at all is wrong, and counted as `no_choice`. Of equally likely choices the first
    is taken.
    """
    rows = []
    for one, answer, each in zip(asked, written, nats, strict=True):
        normal = [normalise(choice) for choice in one.choices]
        picked = normal.index(normalise(answer)) if normalise(answer) in normal else None
        likeliest = each.index(min(each))
        rows.append(
            {
                "id": one.id,
                "answer": answer,
                "likeliest": likeliest,
                "score": float(likeliest == one.answer),
                "generation_score": float(picked == one.answer),
                "written_is_choice": picked is not None,
                "nats": list(each),
            }
        )
    summary = {
        "by_likelihood": mean_percent(row["score"] for row in rows),
        "by_generation": mean_percent(row["generation_score"] for row in rows),
        "chance": mean_percent(1 / len(one.choices) for one in asked),
        "no_choice": sum(not row["written_is_choice"] for row in rows),
        "questions": len(rows),
    }
    return Scores(summary, rows)

"""Some of the words that a model was trained on, kept beside its weights: what tuning must not make it forget.

A model cannot be asked what it knows: pictures that it draws without a prompt are the few that it draws most easily.
So a run writes a sample of its rows' words, no pictures, as `rehearsal.jsonl`, a line for a row:

    {"text": [phrasing ...], "question": [...], "answers": [[...] ...]}
"""

from __future__ import annotations

import json
import os
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdlm.errors import InputError
from mmdlm.training.rows import Pool

FILE = "rehearsal.jsonl"
ROWS, PHRASINGS, QUESTIONS = 512, 3, 2  # kept of a run, and of a row
_AT_HAND = 16  # rows that one is chosen from


def every_text(pools: Sequence[Pool]) -> list[str]:
    """All captions of the pools' rows, then all questions and answers: what a text tokenizer is learned on."""
    captions = [text for pool in pools for texts in pool.rows.captions for text in texts]
    return captions + [text for pool in pools for pairs in pool.rows.questions for pair in pairs for text in pair]


def some_words(pools: Sequence[Pool], *, count: int = ROWS, seed: int = 0) -> list[dict[str, Any]]:
    """Words of `count` rows, no caption twice, sources as often as their weights say; fewer where there are fewer.

    Of a few rows at hand that which says most that no row before said is taken, so that few rows name many things.
    """
    chance = random.Random(f"words-{seed}")
    left = {number: deque(chance.sample(range(len(pool.rows)), len(pool.rows))) for number, pool in enumerate(pools)}
    found: dict[str, dict[str, Any]] = {}
    said: set[str] = set()
    while len(found) < count and left:
        numbers = list(left)
        number = chance.choices(numbers, [max(pools[n].weight, 1e-9) for n in numbers])[0]
        rows, waiting = pools[number].rows, left[number]
        few = [waiting.pop() for _ in range(min(_AT_HAND, len(waiting)))]
        few = [at for at in few if rows.captions[at] and rows.captions[at][0] not in found]
        if few:
            at = max(few, key=lambda one: len(_words(rows.captions[one][0]) - said))
            waiting.extendleft(one for one in few if one != at)
        if not waiting:
            del left[number]
        if not few:
            continue
        captions, pairs = rows.captions[at], rows.questions[at]
        said |= _words(captions[0])
        row: dict[str, Any] = {"text": [captions[0], *chance.sample(captions[1:], min(PHRASINGS, len(captions)) - 1)]}
        asked = dict(chance.sample(pairs, min(QUESTIONS, len(pairs))))
        if asked:
            row |= {"question": list(asked), "answers": [[answer] for answer in asked.values()]}
        found[captions[0]] = row
    return list(found.values())


def _words(text: str) -> set[str]:
    return set(text.lower().split())


def write_words(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes them into a model's or an adapter's directory, beside the place and renamed."""
    beside = directory / f".{FILE}-{os.getpid()}"
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(beside, directory / FILE)


def read_words(directory: Path) -> list[dict[str, Any]]:
    """The rows in a model's directory, [] where it has none. Raises InputError for a file that is no such list."""
    path = directory / FILE
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        whole = all(row["text"] and len(row.get("question", [])) == len(row.get("answers", [])) for row in rows)
        whole &= all(isinstance(text, str) for row in rows for text in [*row["text"], *row.get("question", [])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is broken ({error}): copy the model directory again, or delete the file.") from error
    if not whole:
        raise InputError(f"{path} has a row without captions or answers: copy the model directory again.")
    return rows

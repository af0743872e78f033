"""Templates: text with holes, and where its tokens stand.

    The [MASK:2] is [MASK:1] and sits on a [MASK:{red|green|blue}] background [MASK:*]

[MASK] and [MASK:1] is one token, [MASK:n] n tokens, [MASK:{a|b}] one of the words named, [MASK:*] all that follows, its
end included; [MASK:n:/re/] and [MASK:*:/re/] must match the regular expression as well. A byte-level tokenizer's words
carry the space before them, so a hole takes the space in front of it, which the expression does not name.

Shape letters: A places for words, C combinations of the choices.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.vocabulary import Vocabulary

MOST_COMBINATIONS = 512  # of choices: each is scored by itself
EXAMPLE = '"a [MASK:1] apple" or "a [MASK:{red|green}] apple"'
_HOLE = re.compile(r"\[MASK(?::(\d+|\*):/(.+?)/\]|(?::([^\]]*))?\])")


class Hole(NamedTuple):
    """A gap of `length` tokens (0: up to the end of the text), or one of the `choices`.

    `pattern`: what its text must match, the space in front of it included; "" for anything.
    """

    length: int = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""


class Layout(NamedTuple):
    """A template as tokens: [A] each, or [C, A] one row for each combination of its choices."""

    ids: Tensor  # int64: masks in the holes, eos after the end
    free: Tensor  # bool: a hole's place, to be filled
    open: Tensor  # bool: in [MASK:*], where the text may end
    chosen: Tensor  # bool: a choice's token
    pattern: Tensor  # int64: n in the n-th hole with a pattern, from 1; else 0


def parse_template(text: str) -> list[str | Hole]:
    """Text and holes in reading order. InputError for a hole that is not understood, with an example of one that is."""
    parts: list[str | Hole] = []
    start = 0
    for found in _HOLE.finditer(text):
        parts += [text[start : found.start()], _hole(found, spaced=text[: found.start()].endswith(" "))]
        start = found.end()
    parts.append(text[start:])
    for part in parts:
        if isinstance(part, str) and "[MASK" in part:
            raise InputError(f"A hole in {text!r} is not closed, expected for example {EXAMPLE}: add the missing ].")
    holes = [part for part in parts if isinstance(part, Hole)]
    ends = [index for index, part in enumerate(parts) if isinstance(part, Hole) and not (part.length or part.choices)]
    if ends and (len(ends) > 1 or any(parts[ends[0] + 1 :])):
        raise InputError(f"[MASK:*] stands before the end of {text!r}, expected it last: give a number of tokens.")
    if math.prod(len(hole.choices) or 1 for hole in holes) > MOST_COMBINATIONS:
        raise InputError(f"The choices of {text!r} make more than {MOST_COMBINATIONS} combinations: name fewer.")
    return [part for part in parts if part != ""]


def _hole(found: re.Match[str], spaced: bool) -> Hole:
    if found[1] is not None:
        if found[1] != "*" and int(found[1]) < 1:
            raise InputError(f"{found[0]} has no tokens, expected 1 or more, for example [MASK:2:/[a-z ]+/].")
        pattern = f" (?:{found[2]})" if spaced else found[2]
        return Hole(length=0 if found[1] == "*" else int(found[1]), pattern=pattern)
    inside = "1" if found[3] is None else found[3].strip()
    if inside == "*":
        return Hole()
    if inside.startswith("{") and inside.endswith("}"):
        choices = tuple(choice.strip() for choice in inside[1:-1].split("|"))
        if len(choices) < 2 or not all(choices) or len(set(choices)) < len(choices):
            raise InputError(f"{found[0]} names no two different choices, expected for example [MASK:{{red|green}}].")
        return Hole(choices=choices)
    if not inside.isdecimal() or int(inside) < 1:
        raise InputError(f"{found[0]} is no hole, expected a number of tokens, choices or *, for example {EXAMPLE}.")
    return Hole(length=int(inside))


def patterns(parts: Sequence[str | Hole]) -> list[str]:
    """The patterns of the holes that have one, in the order of `Layout.pattern`."""
    return [part.pattern for part in parts if isinstance(part, Hole) and part.pattern]


def combinations(parts: Sequence[str | Hole]) -> list[tuple[str, ...]]:
    """Every way to take one of each hole's choices, in order; [()] where there are no choices."""
    return list(itertools.product(*(part.choices for part in parts if isinstance(part, Hole) and part.choices)))


def lay_out(
    parts: Sequence[str | Hole],
    text_ids: Callable[[str], list[int]],
    vocabulary: Vocabulary,
    *,
    least: int = 0,
) -> Layout:
    """The tokens of a template, [C, A]: a row for each of its `combinations`, all of one length A of `least` or more.

    There is always one eos after the text. [MASK:*] takes all places up to `least`, at least one.
    """
    rows = [_row(parts, picked, text_ids, vocabulary) for picked in combinations(parts)]
    longest = max(len(row) for row in rows)
    last = parts[-1] if parts else ""
    width = max(least, longest + 1)
    after = (vocabulary.eos_id, False, False, False, 0)
    if isinstance(last, Hole) and not (last.length or last.choices):
        after = (vocabulary.mask_id, True, True, False, len(patterns(parts)) if last.pattern else 0)
    filled = [row + [after] * (width - len(row)) for row in rows]
    columns = zip(*(zip(*row, strict=True) for row in filled), strict=True)
    return Layout(*(torch.tensor(column) for column in columns))


def _row(
    parts: Sequence[str | Hole], picked: Sequence[str], text_ids: Callable[[str], list[int]], vocabulary: Vocabulary
) -> list[tuple[int, bool, bool, bool, int]]:
    """(id, free, open, chosen, pattern) of every token up to the text's end, or up to [MASK:*]."""
    left, row, space = list(picked), [], ""
    for index, part in enumerate(parts):
        if isinstance(part, str):
            before_hole = index + 1 < len(parts)
            words = part[:-1] if before_hole and part.endswith(" ") else part
            space = " " if words != part else ""
            row += [(token, False, False, False, 0) for token in text_ids(words)]
            continue
        if part.choices:
            row += [(token, False, False, True, 0) for token in text_ids(space + left.pop(0))]
        number = len(patterns(parts[: index + 1])) if part.pattern else 0
        row += [(vocabulary.mask_id, True, False, False, number)] * part.length
        space = ""
    return row

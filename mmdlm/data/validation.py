"""What stands in paired data before anybody trains on it: counts, lengths, duplicates, leaks, and every bad row."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from mmdlm.data.duplicates import NEAR, near_pairs
from mmdlm.data.paired import PairedData, Problem, open_pairs
from mmdlm.data.paired_sources import splits

CountTokens = Callable[[str], int]
_SHOWN = 6  # kinds of a thing that a summary names


@dataclass(frozen=True)
class Report:
    """`parts`: split -> its data. `problems`: rows that are left out. `notes`: rows that stay, with what to know of
    them, duplicates among them. `leaks`: rows of one part whose picture is in another. `numbers`: per part."""

    parts: dict[str, PairedData]
    numbers: dict[str, dict[str, Any]]
    problems: list[Problem]
    notes: list[Problem]
    leaks: list[Problem]

    @property
    def clean(self) -> bool:
        """Is there nothing at all to report?"""
        return not (self.problems or self.notes or self.leaks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        lists = {"problems": self.problems, "notes": self.notes, "leaks": self.leaks}
        return {"parts": self.numbers, **{name: [found._asdict() for found in those] for name, those in lists.items()}}


def validate(
    source: str | Path, *, held_out: str | Path | None = None, count_tokens: CountTokens | None = None
) -> Report:
    """Reads all splits of `source`, and of `held_out` where it is given, and looks for what is wrong between rows.

    count_tokens: tokens of a caption. Raises InputError where there is no such source.
    """
    parts = {split: open_pairs(source, split=split) for split in splits(source)}
    if held_out is not None:
        for split in splits(held_out):
            parts[f"{held_out} ({split})"] = open_pairs(held_out, split=split)
    notes, leaks = [], []
    for data in parts.values():
        notes += data.notes + _duplicates(data)
    for (_, first), (_, second) in combinations(parts.items(), 2):
        leaks += _leaks(first, second)
    problems = [problem for data in parts.values() for problem in data.problems]
    numbers = {name: summary(data, count_tokens) for name, data in parts.items()}
    return Report(parts, numbers, list(dict.fromkeys(problems)), list(dict.fromkeys(notes)), leaks)


def summary(data: PairedData, count_tokens: CountTokens | None = None) -> dict[str, Any]:
    """Counts, pixels, modes, formats, and the lengths of captions in characters and tokens."""
    texts = [text for row in data.rows for text in row.texts]
    found: dict[str, Any] = {
        "rows": len(data),
        "pictures": len(set(data.hashes)),
        "captions": len(texts),
        "questions": sum(len(row.questions) for row in data.rows),
        "conversations": sum(row.messages is not None for row in data.rows),
        "masks": sum(row.mask is not None for row in data.rows),
        "sources": sum(row.source is not None for row in data.rows),
        "left_out": len(data.problems),
    }
    if data.seen:
        found["width"] = _spread([seen.width for seen in data.seen])
        found["height"] = _spread([seen.height for seen in data.seen])
        found["sizes"] = _commonest(f"{seen.width}x{seen.height}" for seen in data.seen)
        found["modes"] = _commonest(seen.mode for seen in data.seen)
        found["formats"] = _commonest(seen.format for seen in data.seen)
    if texts:
        found["caption_characters"] = _spread([len(text) for text in texts])
        if count_tokens is not None:
            found["caption_tokens"] = _spread([count_tokens(text) for text in texts])
        found["different_captions"] = len(set(texts))
    return found


def written(report: Report) -> str:
    """The report as people read it: numbers first, then every row of which something is to be said."""
    lines = []
    for name, numbers in report.numbers.items():
        lines.append(f"{name}: {numbers['rows']} rows, {numbers['left_out']} left out")
        for key, value in numbers.items():
            if key in ("rows", "left_out") or value == 0:
                continue
            if isinstance(value, dict) and set(value) == {"least", "median", "most"}:
                value = f"{value['least']} to {value['most']}, median {value['median']}"
            elif isinstance(value, dict):
                value = ", ".join(f"{kind} ({count})" for kind, count in value.items())
            lines.append(f"  {key.replace('_', ' ')}: {value}")
    for title, problems in (
        ("left out", report.problems), ("kept, but look at them", report.notes), ("in two parts", report.leaks),
    ):  # fmt: skip
        if problems:
            lines.append(f"{title} ({len(problems)})")
            lines += [f"  {problem.where}: {problem.reason}" for problem in problems]
    if report.clean:
        lines.append("nothing to complain about")
    # A file's name may hold anything: nothing of it steers the terminal.
    return "\n".join("".join(c if c.isprintable() else "\ufffd" for c in line) for line in lines)


def _duplicates(data: PairedData) -> list[Problem]:
    """Equal pictures under other names, and those that look the same (dHash, at most NEAR of 128 bits apart)."""
    found = []
    by_hash: dict[str, list[int]] = defaultdict(list)
    for number, seen in enumerate(data.hashes):
        by_hash[seen].append(number)
    for first, *others in by_hash.values():
        for other in others:
            if _read(data, other) != _read(data, first):
                same = set(data.rows[first].texts) == set(data.rows[other].texts)
                words = "the same captions" if same else "other captions"
                reason = f"its picture is that of {data.rows[first].where} to the pixel, with {words}"
                found.append(Problem(data.rows[other].where, reason))
    firsts = [numbers[0] for numbers in by_hash.values()]
    for i, j in near_pairs([data.seen[number].perceptual for number in firsts]):
        first, other = firsts[i], firsts[j]
        reason = f"its picture looks like that of {data.rows[first].where} (dHash, at most {NEAR} of 128 bits apart)"
        found.append(Problem(data.rows[other].where, reason))
    return found


def _leaks(first: PairedData, second: PairedData) -> list[Problem]:
    """Rows of `second` whose picture, or one that looks the same, is in `first`."""
    known = {seen: number for number, seen in reversed(list(enumerate(first.hashes)))}
    found = []
    same = {number for number, seen in enumerate(second.hashes) if seen in known}
    for number in sorted(same):
        where = first.rows[known[second.hashes[number]]].where
        found.append(Problem(_of(second, number), f"its picture is in {first.name} too, to the pixel ({where})"))
    near: dict[int, int] = {}
    for i, j in near_pairs([seen.perceptual for seen in first.seen], [seen.perceptual for seen in second.seen]):
        if j not in same:
            near.setdefault(j, i)
    for j, i in sorted(near.items()):
        reason = f"its picture looks like {first.rows[i].where} of {first.name} (dHash, at most {NEAR} of 128 bits)"
        found.append(Problem(_of(second, j), reason))
    return found


def _of(data: PairedData, number: int) -> str:
    return f"{data.name}: {data.rows[number].where}"


def _read(data: PairedData, number: int) -> Any:
    """Where the picture is read from: one file in two rows is no duplicate."""
    image = data.rows[number].image
    return (image.func, image.args) if isinstance(image, partial) else image


def _spread(values: Sequence[int]) -> dict[str, int]:
    return {"least": min(values), "median": int(statistics.median(values)), "most": max(values)}


def _commonest(values: Iterable[str]) -> dict[str, int]:
    counts = Counter(values)
    shown = dict(counts.most_common(_SHOWN))
    rest = len(counts) - len(shown)
    return shown | ({f"{rest} others": sum(counts.values()) - sum(shown.values())} if rest else {})

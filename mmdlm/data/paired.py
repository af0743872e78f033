"""Paired data: pictures with captions, questions, conversations, masks and sources, out of a folder, a table or a tar.

`open_pairs` reads everything once: what is broken is left out and reported with its place and reason, never fatal, and
nothing outside the source is read. Pictures are decoded again when they are asked for, in any mode that Pillow reads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from mmdlm.data.paired_rows import Record, Row, part_picture, row
from mmdlm.data.paired_sources import find_records
from mmdlm.data.picture_contents import Seen, look, picture
from mmdlm.errors import InputError

_EXTREME = 20  # a picture so many times longer than wide is probably a mistake


class Pair(NamedTuple):
    """One row. `image`, `mask`, `source` are decoded when asked; the mask is grey ("L"), white where it is set.

    `texts`: phrasings of one caption, perhaps none where there are questions or messages. `questions`: pairs of a
    question and its accepted answers. `messages`: a conversation whose image parts hold the picture under `image`.
    """

    key: str
    image: Image.Image
    texts: list[str]
    questions: list[tuple[str, list[str]]]
    messages: list[dict[str, Any]] | None
    mask: Image.Image | None
    source: Image.Image | None


class Problem(NamedTuple):
    """`where`: the file and line, or the row, as in "metadata.jsonl:3"; `reason`: what is wrong with it."""

    where: str
    reason: str


class PairedData:
    """Rows that are whole: `len(data)`, `data[n]` -> Pair, iteration.

    `problems`: rows left out; `notes`: rows kept of which something should be known; `rows[n]` and `seen[n]`: row n
    without decoding it, and what its picture looked like; `hashes`: of the pictures, equal for equal pixels.
    """

    def __init__(
        self, name: str, rows: Sequence[Row], seen: Sequence[Seen], problems: Iterable[Problem] = (),
        notes: Iterable[Problem] = (),
    ) -> None:
        self.name, self.rows, self.seen = name, list(rows), list(seen)
        self.problems, self.notes = list(problems), list(notes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Pair:
        found = self.rows[n]
        image = picture(found.image)
        return Pair(
            found.key,
            image,
            list(found.texts),
            [(question, list(answers)) for question, answers in found.questions],
            _shown(found, image) if found.messages else None,
            picture(found.mask).convert("L") if found.mask else None,
            picture(found.source) if found.source else None,
        )

    def __iter__(self) -> Iterator[Pair]:
        return (self[n] for n in range(len(self)))

    @property
    def hashes(self) -> list[str]:
        return [seen.hash for seen in self.seen]

    def subset(self, numbers: Sequence[int], name: str | None = None) -> PairedData:
        """The rows `numbers`, in that order; problems and notes are the whole data's."""
        chosen = [self.rows[n] for n in numbers], [self.seen[n] for n in numbers]
        return PairedData(name or self.name, *chosen, self.problems, self.notes)


def open_pairs(source: str | Path, *, split: str = "train") -> PairedData:
    """The paired data of `source`: a folder of pictures (`metadata.jsonl`, `.csv` or `.parquet`, or a .txt beside each
    picture, one phrasing a line), parquet files, webdataset tars, a saved datasets directory, or a name on the Hub.

    split: a sub-folder or part of a file's name, as datasets has them; data without splits is all "train".
    Raises InputError where there is no such source or split; broken rows are in `problems`.
    """
    return checked(find_records(source, split=split), name=str(source))


def open_pictures(source: str | Path, *, split: str = "train") -> PairedData:
    """As `open_pairs`, for pictures that need no words: every picture of a folder is a row, perhaps without texts."""
    return checked(find_records(source, split=split, need_text=False), name=str(source), need_text=False)


def checked(records: Iterable[Record], *, name: str, need_text: bool = True) -> PairedData:
    """Reads and decodes everything once; keeps the rows that are whole and says why the others are not."""
    rows: list[Row] = []
    seen: list[Seen] = []
    problems: list[Problem] = []
    notes: list[Problem] = []
    keys: dict[str, int] = {}
    told: set[tuple[str, tuple[str, ...], str]] = set()
    folded: dict[str, str] = {}
    for record in tqdm(records, desc=f"reading {Path(name).name}", unit="row", delay=3, leave=False):
        if record.note:
            notes.append(Problem(record.where, record.note))
        if record.reason:
            problems.append(Problem(record.where, record.reason))
            continue
        if not record.columns:
            continue
        try:
            found = row(record, need_text=need_text)
            facts = look_at_row(found)
        except InputError as error:
            problems.append(Problem(record.where, str(error)))
            continue
        said = (found.key, tuple(found.texts), repr((found.questions, found.messages)))
        if said in told:
            problems.append(Problem(record.where, f"{found.key} stands here a second time with the same words"))
            continue
        told.add(said)
        notes += [Problem(found.where, note) for note in _remarks(found, facts, keys, folded)]
        keys[found.key] = count = keys.get(found.key, 0) + 1
        rows.append(found if count == 1 else found.__class__(**vars(found) | {"key": f"{found.key}#{count}"}))
        seen.append(facts)
    return PairedData(name, rows, seen, problems, notes)


def split_pairs(data: PairedData, *, held_out_share: float, seed: int) -> tuple[PairedData, PairedData]:
    """(train, held out): a share of the pictures, chosen by a hash of the pixels and the seed.

    Rows of equal pictures go together, so that none straddles; another picture changes the side of at most one. With a
    share above 0 each side has at least one picture. Raises InputError for a share outside [0, 1) and where a share is
    asked of fewer than two pictures.
    """
    away = held_out_hashes(data.hashes, held_out_share, seed, data.name)
    parts = [[n for n, found in enumerate(data.hashes) if (found in away) == held] for held in (False, True)]
    return data.subset(parts[0], f"{data.name} (train)"), data.subset(parts[1], f"{data.name} (held out)")


def held_out_hashes(hashes: Iterable[str], share: float, seed: int, name: str) -> set[str]:
    """Which of the pictures are held out, see `split_pairs`."""
    if not 0 <= share < 1:
        raise InputError(f"held_out_share is {share}, expected a number from 0 to less than 1.")
    pictures = sorted(set(hashes), key=lambda found: hashlib.sha256(f"{seed}-{found}".encode()).digest())
    if share and len(pictures) < 2:
        raise InputError(f"{name} has {len(pictures)} different pictures, expected at least 2 to hold some out.")
    count = min(max(round(share * len(pictures)), 1), len(pictures) - 1) if share else 0
    return set(pictures[:count])


def look_at_row(found: Row) -> Seen:
    """Decodes every picture of a row once: what is seen of its own. Raises InputError that names the broken one."""
    facts = look(found.image)
    for what, content in (("mask", found.mask), ("source", found.source), *found.pictures.items()):
        if content is None:
            continue
        try:
            other = look(content)
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        if what == "mask" and (other.width, other.height) != (facts.width, facts.height):
            raise InputError(
                f"the mask has {other.width} x {other.height} pixels, expected {facts.width} x {facts.height} as the "
                "picture has"
            )
    return facts


def _remarks(found: Row, facts: Seen, keys: dict[str, int], folded: dict[str, str]) -> list[str]:
    notes = []
    if found.key in keys:
        notes.append(f"{found.key} stands in more than one row, here with other words")
    other = folded.setdefault(found.key.casefold(), found.key)
    if other != found.key:
        notes.append(f"{found.key} and {other} differ in upper and lower case only: some systems take them for one")
    if max(facts.width, facts.height) > _EXTREME * min(facts.width, facts.height):
        notes.append(f"the picture has the extreme shape of {facts.width} x {facts.height} pixels")
    return notes


def _shown(found: Row, image: Image.Image) -> list[dict[str, Any]]:
    """The messages with decoded pictures in their image parts."""
    messages = []
    for message in found.messages or []:
        parts = message["content"] if isinstance(message["content"], list) else [_text_part(message["content"])]
        shown: list[dict[str, Any]] = []
        for part in parts:
            if part["type"] == "text":
                shown.append(_text_part(part["text"]))
            else:
                name = part_picture(part)
                shown.append({"type": "image", "image": image if name is None else picture(found.pictures[name])})
        messages.append({"role": message["role"], "content": shown})
    return messages


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}

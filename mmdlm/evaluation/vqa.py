"""Questions about pictures: VQAv2's official metric and GQA's exact match, their files in, their result files out.

VQAv2 (arXiv:1505.00468, section 4; the rules of the normalisation: visualqa.org/evaluation): an answer is as right as
people agree with it, min(n/3, 1) for n of the others' answers, averaged over leaving out each of the ten in turn.
GQA (arXiv:1902.09506): right or wrong, one answer. Yes-or-no benchmarks are in `mmdlm.evaluation.yes_no`.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdlm.errors import InputError
from mmdlm.evaluation.result_files import (
    answers_for,
    field,
    id_field,
    read_json,
    text_field,
    unique,
    write_json,
)


class Question(NamedTuple):
    """One question of a benchmark."""

    id: Any  # int or str, as in the benchmark's file
    pictures: tuple[str, ...]  # the names its picture may have, with or without an ending
    text: str
    answers: tuple[str, ...] = ()  # what people answered; empty where the benchmark keeps that to itself
    kinds: tuple[str, ...] = ()  # what it is counted under, besides everything together


class Scores(NamedTuple):
    """`summary`: what is printed, shares in percent. `rows`: one {"id", "answer", "score"} for each question."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]


# ------------------------------------------------------------------------------------------------ normalisation

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
ARTICLES = frozenset(("a", "an", "the"))
# Their apostrophe is put back where it is missing. Left out are those that are other words without one: its, well,
# were, ill, id, hell, shell, shed, wed, lets.
CONTRACTIONS = {
    contraction.replace("'", ""): contraction
    for contraction in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've "
        "mustn't must've needn't not've o'clock oughtn't shan't she'd've she's should've shouldn't shouldn't've "
        "somebody'd somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd "
        "something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're "
        "they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've "
        "who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
        "y'all'd've you'd you'd've you'll you're you've"
    ).lower().split()
}
# Of two apostrophes one may be there: "couldn'tve" and "couldnt've" are "couldn't've".
CONTRACTIONS |= {
    contraction[:place] + contraction[place + 1 :]: contraction
    for contraction in list(CONTRACTIONS.values())
    if contraction.count("'") == 2
    for place, letter in enumerate(contraction)
    if letter == "'"
}
# What the official evaluation takes for punctuation. An apostrophe may belong to a possessive and a colon to a time;
# %, $, &, # and * are part of an answer.
_PUNCTUATION = re.compile(r"""[;/\[\]"{}()=+\\_><@`,?!-]""")
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")


def normalise(answer: str) -> str:
    """An answer as VQAv2 compares it: lower case, digits for number words, no articles or punctuation, contractions.

    "The two dogs." -> "2 dogs"; "1,000" -> "1000"; "dont" -> "don't"; "red-brown" -> "red brown"; 3.5 and 2:50 stay.
    """
    words = _PERIOD.sub("", _PUNCTUATION.sub(" ", _COMMA_IN_NUMBER.sub("", answer.lower()))).split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def agreement(answer: str, people: Sequence[str]) -> float:
    """How right `answer` is, in [0, 1]: the mean over leaving out each person of min(n/3, 1), n others saying it.

    Compared to the letter: normalise first. With ten people: 0, 0.3, 0.6, 0.9, 1 for 0, 1, 2, 3, 4 or more of them.
    Raises ValueError for no people.
    """
    if not people:
        raise ValueError("agreement got no answers of people, expected at least one (VQAv2 has ten)")
    same = sum(person == answer for person in people)
    return sum(min((same - (person == answer)) / 3, 1.0) for person in people) / len(people)


# ------------------------------------------------------------------------------------------------ VQAv2

_PEOPLE = 10  # who answered each question


def read_vqav2(questions: Path, annotations: Path | None = None) -> list[Question]:
    """VQAv2's questions file, with the answers of its annotations file where that is published.

    Pictures are COCO's, by number: COCO_val2014_000000000042, 000000000042 or 42. Raises InputError for files of
    another form, ids that come twice, and questions without an annotation.
    """
    content = read_json(questions)
    subtype = content.get("data_subtype", "") if isinstance(content, dict) else ""
    known: dict[Any, Any] = {}
    if annotations is not None:
        rows = field(read_json(annotations), "annotations", annotations)
        known = unique(((id_field(row, "question_id", annotations), row) for row in rows), annotations)
    found = []
    for row in field(content, "questions", questions):
        key, number = id_field(row, "question_id", questions), id_field(row, "image_id", questions)
        long = f"{number:012d}" if isinstance(number, int) else str(number)
        people: tuple[str, ...] = ()
        kinds: tuple[str, ...] = ()
        if annotations is not None:
            if key not in known:
                raise InputError(f"{annotations} has no answers to question {key!r}: give those of its split.")
            people = tuple(
                text_field(one, "answer", annotations) for one in field(known[key], "answers", annotations)
            )
            if len(people) != _PEOPLE:
                raise InputError(
                    f"{annotations} has {len(people)} answers to question {key!r}, expected {_PEOPLE}, by which the "
                    "metric counts: give VQAv2's own file."
                )
            kinds = tuple(
                f"{name.removesuffix('_type')}: {known[key][name]}"
                for name in ("answer_type", "question_type")
                if name in known[key]
            )
        pictures = (f"COCO_{subtype}_{long}", long, str(number))
        found.append(Question(key, pictures, _question(row, key, questions), people, kinds))
    unique(((question.id, None) for question in found), questions)
    return found


def score_vqav2(questions: Sequence[Question], answers: Mapping[Any, str], source: Path | str = "the run") -> Scores:
    """VQAv2's accuracy, overall and by type of answer and question, in percent.

    `overall` is the official number, which leaves a question's answers as they are written where all ten people wrote
    the same: "yes!" is then not "yes". `always_normalised` normalises these too, as its published rules read.
    """
    rows = []
    for question, answer in zip(questions, answers_for(ids(questions), answers, source), strict=True):
        people, said = [_trimmed(person) for person in question.answers], _trimmed(answer)
        normal = agreement(normalise(said), [normalise(person) for person in people])
        official = normal if len(set(people)) > 1 else agreement(said, people)
        rows.append({"id": question.id, "answer": answer, "score": official, "normalised_score": normal})
    summary = {"overall": mean_percent(row["score"] for row in rows), **_by_kind(questions, rows)}
    summary["always_normalised"] = mean_percent(row["normalised_score"] for row in rows)
    return Scores(summary | {"questions": len(rows)}, rows)


def write_vqav2(path: Path, answers: Mapping[Any, str]) -> None:
    """The file that VQAv2's evaluation server takes: [{"question_id", "answer"}]."""
    write_json(path, [{"question_id": key, "answer": answer} for key, answer in answers.items()])


def read_answers(path: Path, key: str = "question_id", answer: str = "answer") -> dict[Any, str]:
    """A result file [{key, answer}] -> {id: answer}. Raises InputError for another form and an id that comes twice."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds a {type(rows).__name__}, expected a list of {{{key!r}, {answer!r}}}.")
    return unique(((id_field(row, key, path), text_field(row, answer, path)) for row in rows), path)


# ------------------------------------------------------------------------------------------------ GQA


def read_gqa(questions: Path) -> list[Question]:
    """GQA's questions file, {id: {"imageId", "question", "answer", "types"}}; without answers for its test splits."""
    content = read_json(questions, unique_keys=True)
    if not isinstance(content, dict):
        raise InputError(f"{questions} holds a {type(content).__name__}, expected GQA's table of questions by id.")
    found = []
    for key, row in content.items():
        types = row.get("types") if isinstance(row, dict) else None
        kinds = tuple(f"{name}: {types[name]}" for name in ("structural", "semantic") if name in types) if types else ()
        asked = isinstance(row, dict) and row.get("answer") is not None
        people = (text_field(row, "answer", questions),) if asked else ()
        picture = text_field(row, "imageId", questions)
        found.append(Question(key, (picture,), _question(row, key, questions), people, kinds))
    return found


def score_exact(
    questions: Sequence[Question],
    answers: Mapping[Any, str],
    source: Path | str = "the run",
    *,
    normalised: bool = False,
) -> Scores:
    """The share of answers that are one of those given, in percent, overall and by kind.

    Compared as GQA does, in lower case without spaces around it and without a last period; with `normalised`, as
    VQAv2 normalises.
    """
    form = normalise if normalised else _plain
    rows = []
    for question, answer in zip(questions, answers_for(ids(questions), answers, source), strict=True):
        right = form(answer) in {form(one) for one in question.answers}
        rows.append({"id": question.id, "answer": answer, "score": float(right)})
    summary = {"accuracy": mean_percent(row["score"] for row in rows), **_by_kind(questions, rows)}
    return Scores(summary | {"questions": len(rows)}, rows)


def write_gqa(path: Path, answers: Mapping[Any, str]) -> None:
    """The file that GQA's evaluation takes: [{"questionId", "prediction"}], answers in its own form."""
    write_json(path, [{"questionId": key, "prediction": _plain(answer)} for key, answer in answers.items()])


# ------------------------------------------------------------------------------------------------ shared


def ids(questions: Sequence[Question]) -> list[Hashable]:
    """The ids, for scoring. Raises InputError where there is no question, or one has no answers to compare with."""
    if not questions:
        raise InputError("There is no question to score, expected at least one: check the file of questions.")
    without = [question.id for question in questions if not question.answers]
    if without:
        raise InputError(
            f"{len(without)} of {len(questions)} questions have no answers to compare with, {without[0]!r} for one: "
            "give the annotations, or upload the result file."
        )
    return [question.id for question in questions]


def mean_percent(scores: Any) -> float:
    """100 times the mean of scores in [0, 1], to two digits as the benchmarks print it."""
    values = list(scores)
    return round(100 * sum(values) / len(values), 2)


def _by_kind(questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    kinds: dict[str, list[float]] = {}
    for question, row in zip(questions, rows, strict=True):
        for kind in question.kinds:
            kinds.setdefault(kind, []).append(row["score"])
    return {kind: mean_percent(scores) for kind, scores in sorted(kinds.items())}


def _question(row: Mapping[str, Any], key: Any, source: Path) -> str:
    words = text_field(row, "question", source)
    if not words.strip():
        raise InputError(f"{source} has an empty question {key!r}, expected some words: mend the row.")
    return words


def _trimmed(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _plain(answer: str) -> str:
    return answer.strip().lower().removesuffix(".").strip()

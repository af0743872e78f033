"""Yes or no: POPE, which asks for things that are not there, and MME, which asks twice about each picture.

POPE (arXiv:2305.10355): accuracy, precision, recall and F1 of "yes", and the share of "yes", by which a model that
says yes to everything is found out. MME (arXiv:2306.13394, section 2.2): for each of 14 subtasks accuracy plus
accuracy+ (both questions about a picture right), each in percent, so 200 at most.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdlm.errors import InputError
from mmdlm.evaluation.result_files import (
    answers_for,
    id_field,
    read_jsonl,
    read_text,
    text_field,
    unique,
    write_jsonl,
)
from mmdlm.evaluation.vqa import Question, Scores, ids, mean_percent
from mmdlm.picture_files import write_whole

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


# ------------------------------------------------------------------------------------------------ POPE


def read_pope(questions: Path) -> list[Question]:
    """POPE's lines {"question_id", "image", "text", "label"}, label yes or no."""
    found = []
    for row in read_jsonl(questions):
        label = text_field(row, "label", questions).strip().lower()
        if label not in ("yes", "no"):
            raise InputError(f"{questions} has the label {label!r}, expected yes or no: give POPE's own file.")
        key, picture = id_field(row, "question_id", questions), text_field(row, "image", questions)
        found.append(Question(key, (picture,), text_field(row, "text", questions), (label,)))
    unique(((question.id, None) for question in found), questions)
    return found


def read_pope_answers(path: Path, questions: Sequence[Question]) -> dict[Any, str]:
    """POPE's answer lines {"question", "answer"}: by question_id where the lines have one, else line by line.

    Without ids the questions' words must be those asked, in their order: a shifted file is an InputError.
    """
    rows = read_jsonl(path)
    if all("question_id" in row for row in rows):
        return unique(((id_field(row, "question_id", path), text_field(row, "answer", path)) for row in rows), path)
    if len(rows) != len(questions):
        raise InputError(f"{path} has {len(rows)} answers to {len(questions)} questions, expected one for each.")
    for number, (row, question) in enumerate(zip(rows, questions, strict=True), start=1):
        if text_field(row, "question", path).strip() != question.text.strip():
            raise InputError(
                f"{path} answers {row['question']!r} on line {number}, where {question.text!r} was asked: "
                "give the answers in the order of the questions."
            )
    return {question.id: text_field(row, "answer", path) for question, row in zip(questions, rows, strict=True)}


def write_pope(path: Path, questions: Sequence[Question], answers: Mapping[Any, str]) -> None:
    """The lines that POPE's evaluation takes; our question_id is one field more."""
    write_jsonl(
        path, ({"question_id": one.id, "question": one.text, "answer": answers[one.id]} for one in questions)
    )


def pope_yes(answer: str) -> bool:
    """What POPE takes for a yes: whatever does not say no, not, in its first sentence."""
    first = answer.split(".")[0].replace(",", "")
    return not {"no", "not"} & set(first.lower().split())


def score_pope(questions: Sequence[Question], answers: Mapping[Any, str], source: Path | str = "the run") -> Scores:
    """Accuracy, precision, recall, F1 and the share of yes, in percent; None where there is nothing to divide by."""
    rows, counts = [], {"true_yes": 0, "false_yes": 0, "true_no": 0, "false_no": 0}
    for question, answer in zip(questions, answers_for(ids(questions), answers, source), strict=True):
        said, true = pope_yes(answer), question.answers[0] == "yes"
        counts[f"{'true' if said == true else 'false'}_{'yes' if said else 'no'}"] += 1
        rows.append({"id": question.id, "answer": answer, "score": float(said == true)})
    right, said_yes = counts["true_yes"], counts["true_yes"] + counts["false_yes"]
    summary = {
        "accuracy": mean_percent(row["score"] for row in rows),
        "precision": _percent(right, said_yes),
        "recall": _percent(right, right + counts["false_no"]),
        "f1": _percent(2 * right, said_yes + right + counts["false_no"]),
        "yes_share": _percent(said_yes, len(rows)),
        **counts,
        "questions": len(rows),
    }
    return Scores(summary, rows)


# ------------------------------------------------------------------------------------------------ MME


def read_mme(folder: Path) -> list[Question]:
    """MME's folder: SUBTASK.txt for each subtask, lines of picture, question and answer (Yes or No) with tabs between.

    Ids are "subtask/picture/1" and "/2". A fourth column, a model's answer, is passed over. Raises InputError for
    another form, and unless every picture of a subtask has exactly two questions.
    """
    found = []
    for path in _subtask_files(folder):
        pictures: dict[str, int] = {}
        for number, columns in enumerate(_lines(path), start=1):
            if len(columns) < 3 or columns[2].strip().lower() not in ("yes", "no"):
                raise InputError(
                    f"{path} has {len(columns)} columns on line {number}, expected picture, question and Yes or No "
                    "with tabs between: give MME's own file."
                )
            picture, text, answer = columns[:3]
            pictures[picture] = pictures.get(picture, 0) + 1
            names = (f"{path.stem}/{picture}", f"{path.stem}/images/{picture}", picture)
            key = f"{path.stem}/{picture}/{pictures[picture]}"
            found.append(Question(key, names, text, (answer.strip().lower(),), (path.stem,)))
        odd = [picture for picture, asked in pictures.items() if asked != 2]
        if odd:
            raise InputError(f"{path} asks {pictures[odd[0]]} questions about {odd[0]}, expected two: mend the file.")
    return found


def read_mme_answers(folder: Path, questions: Sequence[Question]) -> dict[Any, str]:
    """A folder of MME's result files: the same lines with the model's answer as fourth column, in any order.

    Raises InputError for another form, a line that was not asked, and one that comes twice.
    """
    asked: dict[tuple[str, str, str], list[Any]] = {}
    for one in questions:
        asked.setdefault((one.kinds[0], one.pictures[-1], one.text.strip()), []).append(one.id)
    answers: dict[Any, str] = {}
    for path in _subtask_files(folder):
        for number, columns in enumerate(_lines(path), start=1):
            if len(columns) != 4:
                raise InputError(
                    f"{path} has {len(columns)} columns on line {number}, expected picture, question, truth and answer."
                )
            open_ = asked.get((path.stem, columns[0], columns[1].strip()))
            if not open_:
                what = "that was not asked" if open_ is None else "twice"
                raise InputError(
                    f"{path} answers a question {what} on line {number}, {columns[1][:60]!r} about {columns[0]}: give "
                    "the results of these questions."
                )
            answers[open_.pop(0)] = columns[3]
    return answers


def write_mme(folder: Path, questions: Sequence[Question], answers: Mapping[Any, str]) -> None:
    """SUBTASK.txt for each subtask, in the form that MME's own calculation takes."""
    folder.mkdir(parents=True, exist_ok=True)
    for subtask in dict.fromkeys(question.kinds[0] for question in questions):
        lines = [
            "\t".join((one.pictures[-1], one.text, one.answers[0].capitalize(), " ".join(answers[one.id].split())))
            for one in questions
            if one.kinds[0] == subtask
        ]
        write_whole(folder / f"{subtask}.txt", ("\n".join(lines) + "\n").encode())


def mme_answer(answer: str) -> str:
    """yes, no, or other: what an answer starts with decides, within its first four characters."""
    start = answer.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score_mme(questions: Sequence[Question], answers: Mapping[Any, str], source: Path | str = "the run") -> Scores:
    """Each subtask's accuracy + accuracy+ (0 to 200), their sums over perception and cognition, and the whole.

    An answer that is neither yes nor no is wrong, and counted as `other`. Sums are over the subtasks at hand, and
    None where there is none.
    """
    rows: list[dict[str, Any]] = []
    pairs: dict[tuple[str, str], list[bool]] = {}
    other = 0
    for question, answer in zip(questions, answers_for(ids(questions), answers, source), strict=True):
        said = mme_answer(answer)
        other += said == "other"
        right = said == question.answers[0]
        pairs.setdefault((question.kinds[0], question.pictures[-1]), []).append(right)
        rows.append({"id": question.id, "answer": answer, "score": float(right)})
    subtasks: dict[str, dict[str, float]] = {}
    for subtask in dict.fromkeys(question.kinds[0] for question in questions):
        asked = [rights for (kind, _), rights in pairs.items() if kind == subtask]
        accuracy = 100 * sum(map(sum, asked)) / sum(map(len, asked))
        plus = 100 * sum(map(all, asked)) / len(asked)
        subtasks[subtask] = {"accuracy": accuracy, "accuracy_plus": plus, "score": accuracy + plus}

    def total(names: Sequence[str]) -> float | None:
        scores = [subtasks[name]["score"] for name in names if name in subtasks]
        return sum(scores) if scores else None

    summary = {
        "perception": total(PERCEPTION),
        "cognition": total(COGNITION),
        "subtasks": subtasks,
        "other": other,
        "questions": len(rows),
    }
    return Scores(summary, rows)


# ------------------------------------------------------------------------------------------------ shared


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None


def _subtask_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InputError(f"{folder} has no .txt files, expected one for each of MME's subtasks: check the path.")
    return files


def _lines(path: Path) -> list[list[str]]:
    lines = read_text(path).splitlines()
    return [line.split("\t") for line in lines if re.search(r"\S", line)]

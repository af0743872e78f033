"""POPE and MME on files that were counted by hand."""

from __future__ import annotations

import json

import pytest

from mmdlm.errors import InputError
from mmdlm.evaluation.yes_no import (
    mme_answer,
    pope_yes,
    read_mme,
    read_mme_answers,
    read_pope,
    read_pope_answers,
    score_mme,
    score_pope,
    write_mme,
    write_pope,
)

LABELS = ["yes", "yes", "yes", "no", "no"]


@pytest.fixture
def pope(tmp_path):
    path = tmp_path / "coco_pope_random.json"
    rows = [
        {"question_id": number, "image": "a.jpg", "text": f"Is there a thing {number}?", "label": label}
        for number, label in enumerate(LABELS, 1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pope_counted_by_hand(pope, tmp_path):
    questions = read_pope(pope)
    said = ["Yes, there is.", "No, there is not.", "yes", "There is a dog. No cat.", "no"]
    scores = score_pope(questions, dict(zip(range(1, 6), said, strict=True)))
    # true yes 1, 3; false no 2; false yes 4 (its first sentence says no no); true no 5
    counts = {"true_yes": 2, "false_yes": 1, "true_no": 1, "false_no": 1}
    assert {name: scores.summary[name] for name in counts} == counts
    assert scores.summary["accuracy"] == 60.0
    assert scores.summary["precision"] == scores.summary["recall"] == scores.summary["f1"] == 66.67
    assert scores.summary["yes_share"] == 60.0
    answers = {row["id"]: row["answer"] for row in scores.rows}
    write_pope(tmp_path / "answers.jsonl", questions, answers)
    assert read_pope_answers(tmp_path / "answers.jsonl", questions) == answers


def test_pope_always_no_has_no_precision(pope):
    scores = score_pope(read_pope(pope), dict.fromkeys(range(1, 6), "no"))
    assert scores.summary["precision"] is None and scores.summary["recall"] == 0.0 and scores.summary["f1"] == 0.0


@pytest.mark.parametrize(
    ("answer", "yes"), [("No", False), ("not really", False), ("Yes", True), ("I know. No.", True), ("yes, no", False)]
)
def test_what_pope_takes_for_a_yes(answer, yes):
    assert pope_yes(answer) is yes


def test_pope_answers_out_of_order(pope, tmp_path):
    questions, path = read_pope(pope), tmp_path / "answers.jsonl"
    rows = [{"question": one.text, "answer": "yes"} for one in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_pope_answers(path, questions)) == 5
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    with pytest.raises(InputError, match="line 1"):
        read_pope_answers(path, questions)
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(InputError, match="1 answers to 5 questions"):
        read_pope_answers(path, questions)


@pytest.fixture
def mme(tmp_path):
    folder = tmp_path / "mme"
    folder.mkdir()
    (folder / "existence.txt").write_text(
        "a.jpg\tIs there a dog?\tYes\na.jpg\tIs there a cat?\tNo\nb.jpg\tIs it red?\tYes\nb.jpg\tIs it blue?\tNo\n"
    )
    (folder / "code_reasoning.txt").write_text("c.png\tDoes it print 1?\tYes\nc.png\tDoes it print 2?\tNo\n")
    return folder


def test_mme_counted_by_hand(mme, tmp_path):
    questions = read_mme(mme)
    said = {
        "existence/a.jpg/1": "Yes", "existence/a.jpg/2": "no.", "existence/b.jpg/1": "yes", "existence/b.jpg/2": "Yes",
        "code_reasoning/c.png/1": "I think so", "code_reasoning/c.png/2": "No",
    }  # fmt: skip
    scores = score_mme(questions, said)
    assert scores.summary["subtasks"]["existence"] == {"accuracy": 75.0, "accuracy_plus": 50.0, "score": 125.0}
    assert scores.summary["perception"] == 125.0
    assert scores.summary["cognition"] == 50.0  # one of two questions, no picture with both
    assert scores.summary["other"] == 1
    write_mme(tmp_path / "out", questions, said)
    assert (tmp_path / "out" / "existence.txt").read_text().splitlines()[0] == "a.jpg\tIs there a dog?\tYes\tYes"
    assert read_mme_answers(tmp_path / "out", questions) == said
    # the lines of a result file may stand in any order: each answers the question that it holds
    turned = (tmp_path / "out" / "existence.txt").read_text().splitlines()[::-1]
    (tmp_path / "out" / "existence.txt").write_text("\n".join(turned))
    assert read_mme_answers(tmp_path / "out", questions) == said
    (tmp_path / "out" / "existence.txt").write_text("\n".join([*turned, turned[0]]))
    with pytest.raises(InputError, match="answers a question twice on line 5"):
        read_mme_answers(tmp_path / "out", questions)
    (tmp_path / "out" / "existence.txt").write_text("a.jpg\tIs there a bird?\tYes\tYes\n")
    with pytest.raises(InputError, match="answers a question that was not asked on line 1"):
        read_mme_answers(tmp_path / "out", questions)
    (tmp_path / "out" / "existence.txt").write_text("\n".join(turned[::-1]))
    assert score_mme(read_mme(tmp_path / "out"), said).summary == scores.summary


@pytest.mark.parametrize(("answer", "taken"), [("Yes, it", "yes"), ("No", "no"), ("Maybe not", "other"), ("", "other")])
def test_what_mme_takes_for_an_answer(answer, taken):
    assert mme_answer(answer) == taken


def test_mme_files_that_do_not_fit(mme, tmp_path):
    (mme / "existence.txt").write_text("a.jpg\tIs there a dog?\tYes\n")
    with pytest.raises(InputError, match="1 questions about a"):
        read_mme(mme)
    (mme / "existence.txt").write_text("a.jpg\tIs there a dog?\tperhaps\n")
    with pytest.raises(InputError, match="line 1"):
        read_mme(mme)
    with pytest.raises(InputError, match="truth and answer"):
        read_mme_answers(mme, [])
    with pytest.raises(InputError, match="has no"):
        read_mme(tmp_path)

"""VQAv2's and GQA's scores: pairs made from the published rules, files of the official form, counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdlm.errors import InputError
from mmdlm.evaluation.vqa import (
    CONTRACTIONS,
    agreement,
    normalise,
    read_answers,
    read_gqa,
    read_vqav2,
    score_exact,
    score_vqav2,
    write_gqa,
    write_vqav2,
)

# Each pair follows from one published rule (visualqa.org/evaluation); the rules' own examples are among them.
PAIRS = {
    "lower case": [("YES", "yes"), ("New York", "new york")],
    "periods but in decimals": [("yes.", "yes"), ("3.5", "3.5"), ("U.S.A.", "usa"), (".5 miles.", ".5 miles")],
    "number words": [("two", "2"), ("Ten dogs", "10 dogs"), ("none", "0"), ("eleven", "eleven"), ("zero", "0")],
    "articles": [("a dog", "dog"), ("the left one", "left 1"), ("an apple", "apple"), ("thebes", "thebes"), ("a", "")],
    "contractions": [
        ("dont", "don't"), ("don't", "don't"), ("couldntve", "couldn't've"), ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"), ("oclock", "o'clock"), ("im", "i'm"), ("its", "its"), ("well", "well"),
    ],
    "punctuation": [
        ("100,978", "100978"), ("red, white", "red white"), ("red,white", "red white"), ("black/white", "black white"),
        ("black-and-white", "black and white"), ("really?!", "really"), ("girl's", "girl's"), ("2:50 pm", "2:50 pm"),
        ("(left)", "left"), ("50%", "50%"), ("  two\n dogs ", "2 dogs"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "normal"), [pair for pairs in PAIRS.values() for pair in pairs], ids=lambda words: repr(words)
)
def test_normalisation(said: str, normal: str):
    assert normalise(said) == normal
    assert normalise(normal) == normal


def test_no_contraction_is_another_word():
    assert not {"its", "well", "were", "ill", "hell", "shell", "shed", "wed", "lets", "id"} & set(CONTRACTIONS)
    assert all(short.replace("'", "") == long.replace("'", "") for short, long in CONTRACTIONS.items())


@pytest.mark.parametrize(("same", "right"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_people(same: int, right: float):
    assert agreement("yes", ["yes"] * same + ["no"] * (10 - same)) == pytest.approx(right, abs=1e-12)


def test_agreement_with_nobody_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        agreement("yes", [])


def vqav2_files(folder: Path, people: dict[int, list[str]]) -> tuple[Path, Path]:
    asked = [{"image_id": 42, "question": f"what is {key}?", "question_id": key} for key in people]
    told = [
        {
            "question_id": key,
            "image_id": 42,
            "question_type": "what is",
            "answer_type": "other" if key % 2 else "yes/no",
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, 1)
            ],
        }
        for key, answers in people.items()
    ]
    questions, annotations = folder / "questions.json", folder / "annotations.json"
    questions.write_text(json.dumps({"data_subtype": "val2014", "task_type": "Open-Ended", "questions": asked}))
    annotations.write_text(json.dumps({"annotations": told}))
    return questions, annotations


def test_vqav2_from_files_to_files(tmp_path):
    people = {1: ["A dog"] * 2 + ["dog."] * 2 + ["cat"] * 6, 2: ["yes"] * 10, 3: ["two"] * 1 + ["3"] * 9}
    questions = read_vqav2(*vqav2_files(tmp_path, people))
    assert questions[0].pictures[0] == "COCO_val2014_000000000042"
    write_vqav2(tmp_path / "results.json", {1: "dog", 2: "Yes.", 3: "2"})
    assert json.loads((tmp_path / "results.json").read_text())[0] == {"question_id": 1, "answer": "dog"}
    scores = score_vqav2(questions, read_answers(tmp_path / "results.json"))
    # 1: four of ten; 2: all ten wrote "yes", so "Yes." counts only when normalised; 3: one of ten
    assert [row["score"] for row in scores.rows] == pytest.approx([1.0, 0.0, 0.3])
    assert scores.summary["overall"] == 43.33
    assert scores.summary["always_normalised"] == 76.67
    assert scores.summary["answer: other"] == 65.0 and scores.summary["answer: yes/no"] == 0.0
    assert scores.summary["question: what is"] == 43.33


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(1, "x")], "'?2'? for one is missing"),
        ([(1, "x"), (2, "y"), (2, "z")], "2 twice"),
        ([(1, "x"), (2, "y"), (3, "z")], "not asked, 3 for one"),
    ],
)
def test_result_files_that_do_not_fit(tmp_path, rows, complaint):
    questions = read_vqav2(*vqav2_files(tmp_path, {1: ["yes"] * 10, 2: ["no"] * 10}))
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"question_id": key, "answer": answer} for key, answer in rows]))
    with pytest.raises(InputError, match=complaint):
        score_vqav2(questions, read_answers(results), results)


def test_a_question_without_an_answer(tmp_path):
    questions, annotations = vqav2_files(tmp_path, {1: ["yes"] * 10})
    with pytest.raises(InputError, match="no answers to compare"):
        score_vqav2(read_vqav2(questions), {1: "yes"})
    annotations.write_text('{"annotations": []}')
    with pytest.raises(InputError, match="no answers to question 1"):
        read_vqav2(questions, annotations)
    annotations.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        read_vqav2(questions, annotations)
    with pytest.raises(InputError, match="without 'annotations'"):
        read_vqav2(questions, questions)


def test_gqa(tmp_path):
    path = tmp_path / "gqa.json"
    rows = {
        "201": {"imageId": "n1", "question": "what colour?", "answer": "red", "types": {"structural": "query"}},
        "202": {"imageId": "n2", "question": "is it?", "answer": "yes", "types": {"structural": "verify"}},
    }
    path.write_text(json.dumps(rows))
    questions = read_gqa(path)
    scores = score_exact(questions, {"201": "Red.", "202": "a yes"})
    assert scores.summary["accuracy"] == 50.0 and scores.summary["structural: query"] == 100.0
    assert score_exact(questions, {"201": "Red.", "202": "a yes"}, normalised=True).summary["accuracy"] == 100.0
    write_gqa(tmp_path / "out.json", {"201": "Red.", "202": "yes"})
    assert json.loads((tmp_path / "out.json").read_text())[0] == {"questionId": "201", "prediction": "red"}
    assert read_answers(tmp_path / "out.json", "questionId", "prediction") == {"201": "red", "202": "yes"}

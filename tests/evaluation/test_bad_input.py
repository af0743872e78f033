"""Bad input to `mmdlm eval`: each one sentence that names what is wrong and exit code 2, never a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app

COMMON = ("--device", "cpu", "--quiet")


def refused(tmp_path: Path, complaint: str, *arguments: object) -> None:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "-o", str(tmp_path / "out")])
    assert result.exit_code == 2, (arguments, result.output, result.exception)
    assert complaint in result.output and result.output.startswith("mmdlm: ") and result.output.count("\n") == 1
    assert not (tmp_path / "out" / "run.json").exists()


def write(path: Path, content: Any) -> Path:
    lines = content if isinstance(content, list) else [content]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) if path.suffix == ".jsonl" else
                    json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of two sizes, one file that is none, and captions of all."""
    path = tmp_path / "pictures"
    path.mkdir()
    Image.new("RGB", (16, 16), "red").save(path / "0.png")
    Image.new("RGB", (40, 24), "blue").save(path / "1.png")
    (path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return path


def test_folders_and_pictures(tiny_model: Path, folder: Path, tmp_path: Path):
    empty, alone = tmp_path / "empty", tmp_path / "alone"
    empty.mkdir()
    alone.mkdir()
    (alone / "0.png").write_bytes((folder / "0.png").read_bytes())
    model = ("--model", tiny_model, *COMMON)
    random = ("--features", "random", "--allow-few", "--resamples", 0, "--cache", tmp_path / "cache", *COMMON)
    refused(tmp_path, "has 0 pictures", "images", empty, folder, *random)
    refused(tmp_path, "has 1 pictures", "images", alone, folder, *random)
    refused(tmp_path, "2.png", "images", folder, folder, *random)
    refused(tmp_path, "has 0 pictures", "tokenizer", empty, *model)
    refused(tmp_path, "has 1 pictures", "tokenizer", alone, *model)
    refused(tmp_path, "2.png", "tokenizer", folder, *model)
    refused(tmp_path, "metadata.jsonl cannot be read", "likelihood", empty, *model)
    (empty / "metadata.jsonl").touch()
    refused(tmp_path, "names no pictures", "likelihood", empty, *model)
    rows = [{"file_name": f"{number}.png", "text": "a red apple"} for number in range(3)]
    write(folder / "metadata.jsonl", rows)
    refused(tmp_path, "2.png", "likelihood", folder, "--samples", 2, "--pool", 0, *model)
    write(folder / "metadata.jsonl", [*rows[:2], rows[0]])
    refused(tmp_path, "twice", "likelihood", folder, *model)
    # sizes that differ are brought to the model's, and one picture alone has a number and no matching
    write(folder / "metadata.jsonl", rows[:2])
    arguments = ("likelihood", folder, "--samples", 2, *model, "-o", tmp_path / "both")
    assert CliRunner().invoke(app, ["eval", *map(str, arguments)]).exit_code == 0
    write(folder / "metadata.jsonl", rows[:1])
    arguments = ("likelihood", folder, "--samples", 2, *model, "-o", tmp_path / "one")
    assert CliRunner().invoke(app, ["eval", *map(str, arguments)]).exit_code == 0
    assert "retrieval_at_1" not in json.loads((tmp_path / "one" / "run.json").read_text())["results"]


def test_questions_and_results(tmp_path: Path):
    questions = tmp_path / "questions.json"
    asked = [{"image_id": 1, "question": "what is it?", "question_id": key} for key in (1, 2)]
    annotations = write(tmp_path / "annotations.json", {"annotations": [
        {"question_id": key, "answers": [{"answer": "red"}] * 10} for key in (1, 2)]})
    results = tmp_path / "results.json"
    command = ("vqa", "vqav2", questions, "--annotations", annotations, "--answers", results)
    said = [{"question_id": key, "answer": "red"} for key in (1, 2)]
    write(questions, {"questions": asked})
    for rows, complaint in (
        (said[:1], "2 for one is missing"), ([*said, said[0]], "1 twice"), ([{"answer": "red"}], "question_id"),
        ([*said, {"question_id": 3, "answer": "red"}], "not asked"), ({"1": "red"}, "expected a list"),
    ):  # fmt: skip
        write(results, rows)
        refused(tmp_path, complaint, *command)
    write(results, said)
    write(questions, {"questions": [*asked, asked[0]]})
    refused(tmp_path, "1 twice", *command)
    write(questions, {"questions": [*asked, asked[0] | {"question_id": 3}]})
    refused(tmp_path, "no answers to question 3", *command)
    write(questions, {"questions": []})
    refused(tmp_path, "has no questions", *command)
    gqa = tmp_path / "gqa.json"
    row = '{"imageId": "1", "question": "what?", "answer": "red"}'
    gqa.write_text(f'{{"1": {row}, "1": {row}}}')
    refused(tmp_path, "the key '1' twice", "vqa", "gqa", gqa, "--answers", results)
    unanswered = '{"imageId": "1", "question": "what?"}'
    gqa.write_text(f'{{"1": {row}, "2": {unanswered}}}')
    write(results, [{"questionId": key, "prediction": "red"} for key in ("1", "2")])
    refused(tmp_path, "no answer", "vqa", "gqa", gqa, "--answers", results)


def test_files_that_are_none(tmp_path: Path):
    answers = write(tmp_path / "answers.json", [])
    refused(tmp_path, "missing.token cannot be read", "captions", tmp_path / "missing.token", "--answers", answers)
    latin = tmp_path / "latin.token"
    latin.write_bytes(b"1.jpg#0\ta caf\xe9\n")
    refused(tmp_path, "no UTF-8", "captions", latin, "--answers", answers)
    mme = tmp_path / "mme"
    mme.mkdir()
    (mme / "existence.txt").write_bytes(b"a.jpg\tcaf\xe9?\tYes\n")
    refused(tmp_path, "no UTF-8", "vqa", "mme", mme, "--answers", mme)
    choices = tmp_path / "choices.jsonl"
    row = {"id": "q", "image": "0.png", "question": "what?", "choices": ["red", "blue"]}
    write(choices, [row])
    refused(tmp_path, "without 'answer'", "choices", choices, "--pictures", tmp_path)
    write(choices, [row | {"answer": 0}] * 2)
    refused(tmp_path, "'q' twice", "choices", choices, "--pictures", tmp_path)
    write(choices, [row | {"answer": 0}])
    refused(tmp_path, "no picture 0.png", "choices", choices, "--pictures", tmp_path)


def test_rows_that_hold_something_else_than_text(tmp_path: Path):
    """str() would make the answer 'None' of a missing one, and five choices of the word 'green'."""
    questions, results = tmp_path / "questions.json", tmp_path / "results.json"
    annotations = tmp_path / "annotations.json"
    asked: dict[str, Any] = {"image_id": 1, "question": "what is it?", "question_id": 1}
    people = [{"answer": "red"}] * 10
    command = ("vqa", "vqav2", questions, "--annotations", annotations, "--answers", results)
    for row, answers, said, complaint in (
        (asked | {"question": None}, people, "red", "null as 'question' of 1"),
        (asked | {"question": "  "}, people, "red", "an empty question 1"),
        (asked | {"question_id": [1]}, people, "red", "[1] as 'question_id'"),
        (asked, people[:3], "red", "has 3 answers to question 1, expected 10"),
        (asked, [*people[:9], {"answer": None}], "red", "null as 'answer'"),
        (asked, people, None, "null as 'answer' of 1"),
        (asked, people, ["red"], "[\"red\"] as 'answer' of 1"),
    ):
        write(questions, {"questions": [row]})
        write(annotations, {"annotations": [{"question_id": 1, "answers": answers}]})
        write(results, [{"question_id": 1, "answer": said}])
        refused(tmp_path, complaint, *command)
    references = write(tmp_path / "coco.json", {
        "images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "..."}]})
    write(results, [{"image_id": 1, "caption": "a thing"}])
    refused(tmp_path, "captions of picture 1 have no words", "captions", references, "--answers", results)
    choices = tmp_path / "choices.jsonl"
    row = {"id": 1, "image": "0.png", "question": "what?", "choices": ["red", "green"], "answer": 0}
    for change in ({"choices": "green"}, {"choices": ["red", " "]}, {"choices": ["red", "red"]}):
        write(choices, [row | change])
        refused(tmp_path, "expected a list of two or more, different", "choices", choices, "--pictures", tmp_path)
    write(choices, [row | {"answer": True}])
    refused(tmp_path, "the answer to 1 is True", "choices", choices, "--pictures", tmp_path)


def test_what_is_too_long_is_named(tiny_model: Path, tmp_path: Path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    model = ("--model", tiny_model, *COMMON)
    write(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": "word " * 30}])
    refused(tmp_path, "longer than the model's captions, that of 0.png has", "likelihood", tmp_path, *model)
    write(tmp_path / "metadata.jsonl", [{"file_name": "0.png", "text": ["a", "b"]}])
    refused(tmp_path, "[\"a\", \"b\"] as 'text' of '0.png'", "likelihood", tmp_path, *model)
    row = {"id": "q", "image": "0.png", "question": "what?", "choices": ["red", "word " * 30], "answer": 0}
    asked = write(tmp_path / "choices.jsonl", [row])
    refused(tmp_path, "Question 'q' with its choices is too long by", "choices", asked, "--pictures", tmp_path, *model)
    (tmp_path / "out").rename(tmp_path / "before")  # what was answered before it is kept there
    asked = write(tmp_path / "questions.json", {"questions": [
        {"image_id": 0, "question": "word " * 60, "question_id": 7}]})
    refused(tmp_path, "Among the cases 7 to 7: The question is too long", "vqa", "vqav2", asked, "--pictures", tmp_path,
            *model)


def test_what_is_named_like_a_picture_counts_as_one(folder: Path, tmp_path: Path):
    random = ("--features", "random", "--allow-few", "--resamples", 0, "--cache", tmp_path / "cache", *COMMON)
    (folder / "2.png").unlink()
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    refused(tmp_path, "gone.png cannot be read (No such file or directory)", "images", folder, folder, *random)
    (folder / "gone.png").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(folder / "hidden.png")  # a JPEG under another name
    result = CliRunner().invoke(app, ["eval", "images", *map(str, (folder, folder, *random, "-o", tmp_path / "x"))])
    assert result.exit_code == 0 and "1 of 3 pictures" in result.output
    prompts = write(tmp_path / "prompts.jsonl", [{"file_name": "0.png", "text": "a"}] * 2)
    refused(tmp_path, "the picture '0.png' twice", "images", folder, folder, *random, "--clip", folder, "--prompts",
            prompts)
    refused(tmp_path, "give --clip too", "images", folder, folder, *random, "--prompts", prompts)

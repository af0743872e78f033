"""`mmdlm eval` on a tiny model: files in, files out, made again, held together; every mistake one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.evaluation.runs import read_run


def evaluated(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def folder(tmp_path):
    """Four pictures of one colour each, with captions."""
    path = tmp_path / "pictures"
    path.mkdir()
    rows = []
    for number, colour in enumerate(("red", "blue", "green", "yellow")):
        Image.new("RGB", (16, 16), colour).save(path / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"a {colour} apple"})
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def coco(tmp_path):
    path = tmp_path / "captions.json"
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(4)]
    said = [{"image_id": number, "id": number, "caption": f"a {number} thing"} for number in range(4)]
    path.write_text(json.dumps({"images": images, "annotations": said}))
    return path


@pytest.fixture
def vqav2(tmp_path):
    questions, annotations = tmp_path / "questions.json", tmp_path / "annotations.json"
    rows = [{"image_id": number, "question": "what colour is it?", "question_id": number + 10} for number in range(3)]
    questions.write_text(json.dumps({"data_subtype": "val2014", "questions": rows}))
    people = [{"answer": "red"}] * 5 + [{"answer": "blue"}] * 5
    told = [{"question_id": row["question_id"], "answers": people} for row in rows]
    annotations.write_text(json.dumps({"annotations": told}))
    return questions, annotations


def options(model: Path) -> tuple[object, ...]:
    return ("--model", model, "--device", "cpu", "--quiet")


def test_questions_answered_scored_resumed_made_again_and_compared(tiny_model, folder, vqav2, tmp_path):
    questions, annotations = vqav2
    for number in range(3):
        (folder / f"{number:012d}.png").write_bytes((folder / f"{number}.png").read_bytes())
    asked = ("vqa", "vqav2", questions, "--annotations", annotations, "--pictures", folder, "--steps", 2)
    asked += ("--batch-size", 1)
    evaluated(*asked, *options(tiny_model), "-o", tmp_path / "a")
    run = read_run(tmp_path / "a")
    assert run["kind"] == "vqa vqav2" and run["results"]["questions"] == 3 and run["model"]["hash"]
    assert run["command"][:4] == ["mmdlm", "eval", "vqa", "vqav2"] and "-o" not in run["command"]
    assert run["settings"]["steps"] == 2 and run["settings"]["seed"] == 0
    answers = json.loads((tmp_path / "a" / "results.json").read_text())
    assert [row["question_id"] for row in answers] == [10, 11, 12]

    # killed after the first answer, in the middle of the second
    (tmp_path / "b" / "parts").mkdir(parents=True)
    lines = (tmp_path / "a" / "parts" / "answers.0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "parts" / "answers.0.jsonl").write_text("".join(lines[:2]) + lines[2][:9])
    evaluated(*asked, *options(tiny_model), "-o", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "results.json").read_text()) == answers
    (tmp_path / "c" / "parts").mkdir(parents=True)
    (tmp_path / "c" / "parts" / "answers.0.jsonl").write_text(lines[0])
    assert "other settings" in evaluated(*asked, *options(tiny_model), "--seed", 5, "-o", tmp_path / "c", code=2)

    assert "reproduced" in evaluated("reproduce", tmp_path / "a" / "run.json", "-o", tmp_path / "again")
    content = json.loads((tmp_path / "a" / "run.json").read_text())
    content["results"]["overall"] = 99.0
    (tmp_path / "a" / "run.json").write_text(json.dumps(content))
    printed = evaluated("reproduce", tmp_path / "a" / "run.json", "-o", tmp_path / "once more", code=1)
    assert "results.overall: 99.0 then" in printed and "1 numbers differ" in printed
    content["command"] = ["mmdlm", "run", "anything"]
    (tmp_path / "a" / "run.json").write_text(json.dumps(content))
    assert "expected mmdlm eval" in evaluated("reproduce", tmp_path / "a" / "run.json", "-o", tmp_path / "d", code=2)

    right = tmp_path / "right.json"
    right.write_text(json.dumps([{"question_id": key, "answer": "red"} for key in (10, 11, 12)]))
    scored = ("vqa", "vqav2", questions, "--annotations", annotations, "--answers", right)
    assert "100" in evaluated(*scored, "-o", tmp_path / "right")
    assert read_run(tmp_path / "right")["model"] is None
    printed = evaluated("compare", tmp_path / "b", tmp_path / "right" / "run.json", "--plot", tmp_path / "plot.png")
    assert "difference" in printed and (tmp_path / "plot.png").is_file()
    # a test split: answers to upload, no score
    evaluated("vqa", "vqav2", questions, "--answers", right, "-o", tmp_path / "test")
    assert read_run(tmp_path / "test")["results"] == {"questions": 3, "scored": False}


def test_captions(tiny_model, folder, coco, tmp_path):
    asked = ("captions", coco, "--pictures", folder, "--steps", 2, *options(tiny_model))
    evaluated(*asked, "-o", tmp_path / "a")
    results = read_run(tmp_path / "a")["results"]
    assert {"cider_d", "bleu_4", "rouge_l"} <= results.keys() and results["pictures"] == 4
    evaluated("captions", coco, "--answers", tmp_path / "a" / "results.json", "-o", tmp_path / "b")
    assert read_run(tmp_path / "b")["results"] == results


def test_likelihood_and_choices(tiny_model, folder, tmp_path):
    evaluated("likelihood", folder, "--samples", 2, "--pool", 2, *options(tiny_model), "-o", tmp_path / "a")
    results = read_run(tmp_path / "a")["results"]
    assert results["text_given_picture"]["bits_per_token"] > 0
    assert results["picture_given_text"]["tokens"] == results["picture_alone"]["tokens"] == 4 * 16
    assert results["retrieval_at_1"]["pool"] == 2
    assert len((tmp_path / "a" / "rows.jsonl").read_text().splitlines()) == 4
    questions = tmp_path / "choices.jsonl"
    row = {"id": "q", "image": "0.png", "question": "what colour is it?", "choices": ["red", "blue"], "answer": "red"}
    questions.write_text(json.dumps(row) + "\n")
    asked = ("choices", questions, "--pictures", folder, "--samples", 2, "--steps", 2, *options(tiny_model))
    evaluated(*asked, "-o", tmp_path / "b")
    results = read_run(tmp_path / "b")["results"]
    assert results["chance"] == 50.0 and results["by_likelihood"] in (0.0, 100.0)
    questions.write_text(json.dumps(row | {"answer": 2}) + "\n")
    assert "expected one of its choices" in evaluated(*asked, "-o", tmp_path / "c", code=2)


def test_tokenizer_and_images(tiny_model, folder, tmp_path):
    evaluated("tokenizer", folder, *options(tiny_model), "--features", "random", "-o", tmp_path / "a")
    results = read_run(tmp_path / "a")["results"]
    assert results["bits_per_pixel"] == 16 * 6 / 256 and results["feature_distance"] >= 0
    assert "psnr" in results and "jpeg_ssim" in results
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\n\na blue car\n")
    drawn = ("images", tiny_model, folder, "--prompts", prompts, "--features", "random", "--allow-few", "--steps", 2)
    drawn += ("--resamples", 2, "--cache", tmp_path / "cache", "--device", "cpu", "--quiet")
    evaluated(*drawn, "-o", tmp_path / "b")
    results = read_run(tmp_path / "b")["results"]
    assert "feature_distance" in results and "fid" not in results and results["generated"] == 2
    # stopped after the first picture
    (tmp_path / "c" / "pictures").mkdir(parents=True)
    first = (tmp_path / "b" / "pictures" / "0.png").read_bytes()
    (tmp_path / "c" / "pictures" / "0.png").write_bytes(first)
    evaluated(*drawn, "-o", tmp_path / "c")
    assert read_run(tmp_path / "c")["results"] == results
    (tmp_path / "d" / "pictures").mkdir(parents=True)
    (tmp_path / "d" / "pictures" / "0.png").write_bytes(first)
    assert "by another run" in evaluated(*drawn, "--seed", 1, "-o", tmp_path / "d", code=2)
    assert "feature_distance" in evaluated("compare", tmp_path / "b", tmp_path / "c")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("vqa", "vqav2", "missing.json", "--answers", "a.json"), "missing.json cannot be read"),
        (("vqa", "vqav2", "missing.json"), "Give either --pictures"),
        (("captions", "missing.json", "--answers", "a.json"), "missing.json cannot be read"),
        (("likelihood", "missing"), "metadata.jsonl cannot be read"),
        (("images", "missing", "missing"), "no folder of pictures"),
        (("images", "missing", "missing", "--features", "random"), "no folder of pictures"),
        (("tokenizer", "missing"), "no folder of pictures"),
        (("compare", "missing", "missing"), "cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(arguments, complaint, tmp_path):
    extra = () if arguments[0] == "compare" else ("-o", tmp_path / "out")
    printed = evaluated(*arguments, *extra, code=2)
    assert complaint in printed and printed.startswith("mmdlm: ") and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()

"""`mmdlm eval` on two processes and after kill -9: the files of one process, to the byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures with captions and questions, in the forms of all commands."""
    path = tmp_path / "pictures"
    path.mkdir()
    names = [f"{number}.png" for number in range(5)]
    for name, colour in zip(names, ("red", "blue", "green", "yellow", "black"), strict=True):
        Image.new("RGB", (16, 16), colour).save(path / name)
    rows = [{"file_name": name, "text": f"a {name} apple"} for name in names]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    said = [{"image_id": number, "id": number, "caption": f"a {number} thing"} for number in range(5)]
    (path / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    (path / "choices.jsonl").write_text("".join(
        json.dumps({"id": n, "image": f"{n}.png", "question": "what?", "choices": ["red", "a car"], "answer": 0}) + "\n"
        for n in range(17)
    ))  # fmt: skip
    for number in range(5, 17):
        (path / f"{number}.png").write_bytes((path / "0.png").read_bytes())
    (path / "prompts.txt").write_text("".join(f"{number} red apples\n" for number in range(20)))
    return path


def evaluated(arguments: tuple[object, ...], out: Path) -> None:
    result = CliRunner().invoke(app, ["eval", *map(str, arguments), "--device", "cpu", "--quiet", "-o", str(out)])
    assert result.exit_code == 0, (result.output, result.exception)


def files(out: Path) -> dict[str, Any]:
    """What a run has written but for the parts, which say who did what, and but for its time."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and "parts" not in path.parts):
        found[path.relative_to(out).as_posix()] = path.read_bytes()
    found["run.json"] = json.loads(found["run.json"])["results"]
    return found


def test_two_processes_write_what_one_writes(tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch):
    likelihood = ("likelihood", folder, "--samples", 2, "--pool", 3, "--batch-size", 4)
    commands = {
        "captions": ("captions", folder / "captions.json", "--pictures", folder, "--steps", 2, "--batch-size", 2),
        "likelihood": likelihood,
        "choices": ("choices", folder / "choices.jsonl", "--pictures", folder, "--samples", 2, "--steps", 2),
        "images": ("images", tiny_model, folder, "--prompts", folder / "prompts.txt", "--features", "random",
                   "--allow-few", "--steps", 2, "--resamples", 2, "--cache", tmp_path / "cache"),
    }  # fmt: skip
    # A sum over two threads may round as a sum over one does not: numbers of threads are not compared here.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, command in commands.items():
        arguments = command if name == "images" else (*command, "--model", tiny_model)
        evaluated(arguments, tmp_path / name / "one")
        two = tmp_path / name / "two"
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        evaluated(arguments, two)  # the second process does its share and writes no run
        assert not (two / "run.json").exists() and list((two / "parts").glob("*.1.jsonl"))
        monkeypatch.setenv("RANK", "0")
        evaluated(arguments, two)
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")
        assert files(two) == files(tmp_path / name / "one"), name
        for part in (two / "parts").glob("*.1.jsonl"):
            if part.name != "drawn.1.jsonl":  # twenty pictures may be fewer batches than processes
                assert len(part.read_text().splitlines()) > 1, part  # more than its settings
    torch.set_num_threads(threads)


def test_a_run_killed_by_sigkill_goes_on(tiny_model: Path, folder: Path, tmp_path: Path):
    asked = [{"image_id": n % 5, "question": f"what is {n}?", "question_id": n} for n in range(60)]
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps({"questions": asked}))
    command = ("vqa", "vqav2", questions, "--pictures", folder, "--batch-size", 1, "--steps", 4, "--model", tiny_model)
    out, kept = tmp_path / "killed", tmp_path / "killed" / "parts" / "answers.0.jsonl"
    words = ["eval", *map(str, command), "--device", "cpu", "--quiet", "-o", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [sys.executable, "-c", "from mmdlm.cli import main; main()", *words], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while running.poll() is None and (not kept.is_file() or kept.read_bytes().count(b"\n") < 4):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert kept.read_bytes().count(b"\n") >= 4, "it was not killed after its first answers"
    (out / "run.json").unlink(missing_ok=True)  # on a machine so busy that it was done before the kill
    evaluated(command, out)
    evaluated(command, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert len(kept.read_text().splitlines()) == 1 + len(asked)  # nothing was asked twice

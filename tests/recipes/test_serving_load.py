"""eval/serving.py on a tiny model: what it counts, compares and writes. Nothing here depends on how fast it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from mmdlm.programs import program_path


@pytest.fixture(scope="module")
def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("program_serving", program_path("eval/serving"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_level_is_measured_compared_and_written_down(
    program, tiny_model: Path, tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # one lane: six clients share its steps, on any machine
    program.main([f"model={tiny_model}", f"out={tmp_path}", "clients=[1,6]", "requests=12", "minutes=0.02",
                  "soak_clients=3", "options=--budget 512 --timeout 900"])  # fmt: skip
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["kind"] == "serving" and found["command"][:3] == ["mmdlm", "run", "eval/serving"]
    alone, several = found["results"]["levels"]
    assert (alone["clients"], several["clients"]) == (1, 6) and alone["times"] == 1
    for one in (alone, several):
        assert one["equal"] == one["asked"] == len(one["seconds_of_requests"]) == 12 and one["failed"] == 0
        assert one["latency"].keys() == {"picture", "caption"} and one["latency_all"].keys() == {"p50", "p95", "p99"}
    assert several["rows_per_step"] > alone["rows_per_step"] >= 1
    soak = found["results"]["soak"]
    assert soak["failed"] == 0 and soak["answered"] >= 3 and found["results"]["server_errors"] == 0
    report = (tmp_path / "results.md").read_text()
    assert report in capsys.readouterr().out and "| 6 | " in report and "12 of 12" in report
    assert Image.open(tmp_path / "serving.png").width > 500


def test_files_are_others_with_the_same_pixels(program):
    first, again, other = (program.drawing(seed, mark) for seed, mark in ((1, "a"), (1, "b"), (2, "a")))
    pixels = [Image.open(program.io.BytesIO(content)).tobytes() for content in (first, again, other)]
    assert first != again and pixels[0] == pixels[1] != pixels[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["clients=[0]"], "expected 1 to 512"), (["requests=1"], "requests 1"), (["model=/nowhere"], "/nowhere"),
     (["minutes=-1"], "minutes -1")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(program, arguments: list[str], sentence: str, tmp_path: Path):
    with pytest.raises(program.InputError, match=sentence):
        program.main([*arguments, f"out={tmp_path}"])

"""`mmdlm bench` and `mmdlm tune` on a tiny model: what they print and write, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mmdlm.assets import shipped_model
from mmdlm.cli import app
from mmdlm.cli.bench import _peak
from mmdlm.pipelines import TextToImage

LLADA = Path(__file__).parent.parent / "parity" / "recorded" / "llada-generate"


@pytest.fixture(scope="module")
def quick(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with presets of few steps."""
    own = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("bench") / "quick"))
    presets = {
        "draw": {"num_inference_steps": 4, "guidance_scale": 2.0},
        "describe": {"num_inference_steps": 4, "answer_length": 8},
    }
    (own / "generation_config.json").write_text(json.dumps(presets))
    return own


def mmdlm(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


def refused(*arguments: object) -> str:
    done = mmdlm(*arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_every_setting_of_a_model_directory(quick: Path, tmp_path: Path):
    out = tmp_path / "bench.json"
    done = mmdlm("bench", "--model", quick, "--pairs", 1, "--rows", "1,2", "--no-memory", "--json", out, "--quiet")
    assert done.exit_code == 0, (done.output, done.exception)
    tables = re.findall(r"^\| (t2i|describe): (\d) rows? of", done.stdout, flags=re.MULTILINE)
    assert tables == [("t2i", "1"), ("t2i", "2"), ("describe", "1"), ("describe", "2")]
    found = json.loads(out.read_text())
    assert found["command"].startswith("mmdlm bench --model")
    assert found["versions"].keys() == {"mmdlm", "torch", "python"}
    rows = [row for result in found["results"] for row in result["rows"]]
    assert all(row["equal"] for row in rows if row["exact"]) and len(rows) > 30
    assert rows[0]["name"] == "plain published loop" and rows[0]["ratios"] == [1.0, *rows[0]["ratios"][1:]]


def test_memory_is_measured_in_a_process_of_its_own(quick: Path):
    asked = {"model": quick, "tasks": "t2i", "rows": 1, "seed": 3}
    own = _peak(asked, "image_cache")
    assert own is None or 0 <= own < 2000  # None where the system does not tell
    done = mmdlm("bench", "--model", quick, "--tasks", "describe", "--alone", "", "--quiet")  # what that process runs
    assert done.exit_code == 0 and (done.stdout == "\n" or float(done.stdout) >= 0)


def test_a_predictor_alone(tmp_path: Path):
    assert mmdlm("convert", LLADA, tmp_path / "llada").exit_code == 0
    done = mmdlm("bench", "--model", tmp_path / "llada", "--pairs", 1, "--no-memory", "--quiet")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "| text: 1 row" in done.stdout and "SHOULD BE" not in done.stdout
    assert "alone and can text" in refused("bench", "--model", tmp_path / "llada", "--tasks", "t2i")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "9b"], "expected small"),
        (["--shape", "8b", "--device", "cpu"], "is for a GPU"),
        (["--shape", "small", "--model", "x"], "either --model"),
        (["--tasks", "sing"], "expected some of t2i,text,describe"),
        (["--shape", "small", "--answer", "33"], "expected a multiple of 32"),
        (["--rows", "0"], "expected a number from 1 on"),
        (["--dtype", "int4"], "expected float32 or bfloat16"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--json", "/nowhere/a.json"], "there is no directory"),
        (["--prompts", "/nowhere.txt", "--pairs", "1"], "cannot be read as text"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: list[str], sentence: str):
    assert sentence in refused("bench", *arguments)


# ---------------------------------------------------------------- tune


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red apple\n\ntwo yellow stars\n")
    return path


def test_the_only_good_candidate_becomes_the_preset(tiny_model: Path, prompts: Path, tmp_path: Path):
    own = Path(shutil.copytree(tiny_model, tmp_path / "own"))
    candidates = tmp_path / "candidates.yaml"
    # one that gives the same pictures and one that gives others; what is faster cannot be known, so it is made sure of
    preset = json.loads((own / "generation_config.json").read_text())["draw"]
    preset["num_inference_steps"] = 48
    slow = json.dumps({"draw": preset, "ask": {"answer_length": 5}})
    (own / "generation_config.json").write_text(slow)
    candidates.write_text("others: {num_inference_steps: 2}\n")
    asked = ["tune", "--model", own, "--prompts", prompts, "--candidates", candidates, "--pairs", 1, "--quiet"]
    done = mmdlm(*asked, "--measure", "codes", "--keep", 1, "--save", "--json", tmp_path / "tune.json")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "fastest that keeps 1: the preset as it is\n" in done.stdout
    assert json.loads((own / "generation_config.json").read_text())["draw"] == preset
    done = mmdlm(*asked, "--measure", "codes", "--keep", 0.001, "--out", tmp_path / "copy")
    assert "fastest that keeps 0.001: others (mmdlm generate --steps 2)\n" in done.stdout
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written == {"draw": preset | {"num_inference_steps": 2}, "ask": {"answer_length": 5}}
    assert TextToImage.from_pretrained(tmp_path / "copy").presets["draw"]["num_inference_steps"] == 2
    told = json.loads((tmp_path / "tune.json").read_text())
    assert told["chosen"] == "the preset as it is" and len(told["tried"]) == 2
    assert "exists already" in refused(*asked, "--out", tmp_path / "copy")


def test_the_shipped_model_is_never_changed(prompts: Path):
    before = (shipped_model() / "generation_config.json").read_bytes()
    assert "write a copy with --out" in refused("tune", "--prompts", prompts, "--save")
    assert "write a copy with --out" in refused("tune", "--prompts", prompts, "--save", "--model", shipped_model())
    assert (shipped_model() / "generation_config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either --prompts"),
        (["--prompts", "a", "--pictures", "b"], "either --prompts"),
        (["--prompts", "/nowhere.txt"], "cannot be read as text"),
        (["--pictures", "/nowhere"], "There is no folder"),
        (["--prompts", "a", "--question", "what?"], "--question needs --pictures"),
        (["--prompts", "a", "--keep", "0"], "expected a share in (0, 1]"),
    ],
)
def test_what_cannot_be_tuned_is_one_sentence(arguments: list[str], sentence: str):
    assert sentence in refused("tune", *arguments)


def test_candidates_that_are_none(prompts: Path, tmp_path: Path, tiny_model: Path):
    bad = tmp_path / "bad.yaml"
    for text in ("- 1", "fast: 3", "", "{"):
        bad.write_text(text)
        asked = ("tune", "--model", tiny_model, "--prompts", prompts, "--candidates", bad)
        assert "candidates" in refused(*asked) or "YAML" in refused(*asked)
    bad.write_text("fast: {num_inference_steps: 0}\n")
    assert "num_inference_steps is 0" in refused(*asked, "--quiet", "--pairs", 1)

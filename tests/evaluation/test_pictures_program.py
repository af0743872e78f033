"""eval/pictures.py from end to end: a model of random weights, a world of six shapes, everything it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.evaluation.geneval import CLASSES
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.processing import MMDLMProcessor
from mmdlm.programs import program_path
from mmdlm.text_tokenizer import train_text_tokenizer
from mmdlm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 x 64 pictures as 8 x 8 codes, saved as a training run leaves it: run/config.yaml, run/pipeline."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("concepts: 6\nstyles: [noto]\nkind_weights: null\nscenes: 40\n")
    text = train_text_tokenizer(["a red apple on a blue background", "what is this?"], 300)
    special = ["pad", "mask", "bos", "eos", "boi", "eoi", "draw", "describe", "ask"]
    vocabulary = Vocabulary(
        text_size=len(text), image_start=len(text), image_size=64,
        **{f"{name}_id": number for number, name in enumerate(special)},
    )  # fmt: skip
    visual = LFQTokenizer(
        sample_size=64, codebook_bits=6, encoder_widths=(8, 16), decoder_widths=(8, 16), encoder_blocks=1,
        decoder_blocks=1, stem_patch=4,
    )  # fmt: skip
    trunk = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    config = MaskPredictorConfig(
        trunk=trunk, vocabulary=vocabulary.to_dict(), code_bits=6, image_side=8, image_fold=1, max_positions=256
    )
    TextToImage(MaskPredictor(config), visual, MMDLMProcessor(text, vocabulary, 64)).save_pretrained(run / "pipeline")
    return run / "pipeline"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program_path("eval/pictures")), "--config", "pictures", *arguments]
    # one thread, so that several processes compute to the last bit what one does
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def two_processes_give_the_same(out: Path) -> None:
    """Two processes, started by the command in run.json, give the files of one, to the byte."""
    content = json.loads((out / "run.json").read_text())
    command = [*content["command"][3:], f"out={out.parent / 'two'}"]
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launched, str(program_path("eval/pictures")), *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    two = out.parent / "two"
    assert (two / "parts" / "answers.1.jsonl").is_file()  # the second process had its share
    assert (two / "rows.jsonl").read_bytes() == (out / "rows.jsonl").read_bytes()
    assert json.loads((two / "run.json").read_text())["results"] == content["results"]
    for picture in sorted((out / "pictures").iterdir()):
        assert (two / "pictures" / picture.name).read_bytes() == picture.read_bytes()


def test_everything_is_measured_and_written(model: Path, shapes: Path, tmp_path: Path):
    judge = ["judge.least_steps=3", "judge.scenes_per_drawing=1", "judge.widths=[4,8,8]", f"judge_cache={tmp_path}"]
    out = tmp_path / "judged"
    done = run(
        f"model={model}", f"data={shapes}", f"out={out}", "scenes=5", "questions=9", "judged_renders=8", "batch_size=4",
        "prompts=2", "steps=2", "guidance=1.5", *judge,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    trained = {"concepts": 6, "styles": ["noto"], "kind_weights": None, "said_by": "config.yaml"}
    assert results["run"]["trained_on"] == trained
    assert len(results["run"]["model"]["hash"]) == 16 and "scenes=5" in results["run"]["command"]
    assert set(results["draw"]) == {"training captions", "held-out compositions"}
    assert set(results["describe"]) == {"held-out compositions", "unseen style openmoji"}
    assert results["judge"]["renders of held-out compositions"]["all kinds"]["object"]["total"] == 8
    assert results["ask"]["held-out compositions"]["all kinds"]["answer"]["total"] == 9
    assert results["draw"]["training captions"]["all kinds"]["all"] == {
        "right": 0, "total": 5, "share": 0.0, "low": 0.0, "high": 0.4345,
    }  # fmt: skip
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 5 + 9 + 2 * 6 * 2 and len({row["id"] for row in rows}) == len(rows)
    assert set(results["geneval"]) == {"training captions", "held-out compositions"}
    for classes in results["geneval"].values():
        assert list(classes) == [*CLASSES, "mean of classes"]
        assert all(classes[name]["drawn"]["total"] == 2 for name in CLASSES)
        assert all(classes[name]["the judge on renders"]["total"] == 2 for name in CLASSES)
        assert classes["mean of classes"]["drawn"]["share"] == 0.0
    two_processes_give_the_same(out)
    assert (out / "results.md").read_text() in done.stdout
    for name in ("drawn-training-captions", "drawn-held-out-compositions", "captions-held-out-compositions"):
        with Image.open(out / f"{name}.png") as sheet:
            assert sheet.width == 5 * 140 + 6


def test_one_part_alone_and_settings_that_are_missing(model: Path, shapes: Path, tmp_path: Path):
    done = run(f"model={model}", f"data={shapes}", f"out={tmp_path / 'a'}", "parts=[ask]", "scenes=2", "questions=2")
    assert done.returncode == 0, done.stderr
    assert "without looking" in done.stdout and not list((tmp_path / "a").glob("*.png"))
    again = ["eval", "reproduce", str(tmp_path / "a" / "run.json"), "-o", str(tmp_path / "again")]
    reproduced = CliRunner().invoke(app, again)
    assert reproduced.exit_code == 0 and "reproduced" in reproduced.output, reproduced.output
    compared = CliRunner().invoke(app, ["eval", "compare", str(tmp_path / "a"), str(tmp_path / "again")])
    assert compared.exit_code == 0 and "difference" in compared.output, compared.output
    done = run(f"model={model}", f"data={shapes}", f"out={tmp_path / 'b'}", "parts=[sing]")
    assert done.returncode == 2 and "expected some of draw, geneval, describe, ask" in done.stderr
    done = run(f"model={model}", f"data={tmp_path / 'nowhere'}", f"out={tmp_path / 'b'}")
    assert done.returncode == 2 and "mmdlm data build pictures" in done.stderr and not (tmp_path / "b").exists()

"""What a person got wrong ends a program with one sentence and exit code 2, before anything slow."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.training.arguments import run_program
from mmdlm.training.checkpoints import list_checkpoints

TINY_LFQ = [
    "concepts=16", "train_batch_size=2", "validation_pictures=2", "logging_steps=1", "validation_steps=100",
    "model={sample_size: 32, codebook_bits: 6, encoder_widths: [8, 16], decoder_widths: [8, 16], "
    "encoder_blocks: 1, decoder_blocks: 1}", "max_train_steps=1",
]  # fmt: skip


@pytest.mark.parametrize("program", ["train/supervised", "train/grow", "train/ship"])
@pytest.mark.parametrize(("name", "words"), [("nobody/nothing", "holds no visual tokenizer"), ("cut", "is broken (")])
def test_a_tokenizer_that_is_none(
    program: str, name: str, words: str, load, world: Path, pipeline: Path, visual_tokenizer: Path,
    tiny_supervised: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    if name == "cut":
        name = str(shutil.copytree(visual_tokenizer, tmp_path / "cut"))
        weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    settings = [f"tokenizer={name}", f"out={tmp_path / 'out'}"]
    settings += [f"data={world}"] if program != "train/ship" else []
    settings += tiny_supervised if program == "train/supervised" else [f"model={pipeline}"]
    monkeypatch.setattr(sys, "argv", ["program", *settings])
    with pytest.raises(SystemExit) as stopped:
        run_program(load(program).main)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("error: ") and name in said and words in said
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_none(run, world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path):
    settings = [f"data={world}", f"out={tmp_path / 'out'}"]
    for more in ([], [f"tokenizer={visual_tokenizer}"]):
        with pytest.raises(InputError, match="There is no model directory at nobody/nothing"):
            run("train/supervised", *tiny_supervised, *settings, "init_from=nobody/nothing", *more)
    for program in ("train/grow", "train/ship"):
        with pytest.raises(InputError, match="There is no model directory at nobody/nothing"):
            run(program, *settings[program == "train/ship" :], "model=nobody/nothing")


def test_a_tokenizers_run_goes_on_with_its_own_settings_only(run, world: Path, tmp_path: Path):
    settings = [*TINY_LFQ, f"data={world}", f"out={tmp_path / 'run'}"]
    run("tokenizers/train_lfq", *settings)
    (before,) = list_checkpoints(tmp_path / "run")
    for other, part in (
        ("model.codebook_bits=8", "model"),
        ("model.decoder_blocks=2", "model"),
        ("train_encoder=false", "average"),
        ("adversarial_weight=0.1", "discriminator"),
    ):
        with pytest.raises(InputError, match=rf"has other weights \({part}\) than these settings train"):
            run("tokenizers/train_lfq", *settings, other, "max_train_steps=2")
    assert list_checkpoints(tmp_path / "run") == [before]


def test_a_predictors_run_goes_on_with_its_own_settings_only(
    run, world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path
):
    settings = [*tiny_supervised, f"data={world}", f"out={tmp_path / 'run'}", f"tokenizer={visual_tokenizer}"]
    settings += ["validation_steps=100", "validation_prompts=[]"]
    run("train/supervised", *settings, "max_train_steps=1")
    (trunk,) = (item for item in tiny_supervised if item.startswith("trunk="))
    with pytest.raises(InputError, match=r"has other weights \(model\) than these settings train: give another out"):
        run("train/supervised", *settings, trunk.replace("hidden_size: 32", "hidden_size: 64"), "max_train_steps=2")


def test_a_frozen_encoder_goes_on(run, world: Path, tmp_path: Path):
    settings = [*TINY_LFQ, f"data={world}", f"out={tmp_path / 'run'}", "train_encoder=false"]
    for steps in (1, 2):
        run("tokenizers/train_lfq", *settings, f"max_train_steps={steps}")
    assert LFQTokenizer.from_pretrained(tmp_path / "run" / "visual_tokenizer").codebook_size == 64

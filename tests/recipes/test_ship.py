"""train/ship packs a model: half precision, presets, its words, and a decoder that was trained on meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.training.known_words import read_words


def test_a_model_is_packed_with_its_words_presets_and_card(run, pipeline: Path, tmp_path: Path):
    out, card = tmp_path / "packed", tmp_path / "card.md"
    card.write_text("# a card\n")
    run("train/ship", f"model={pipeline}", f"out={out}", f"card={card}", "draw_steps=5", "caption_length=9")
    weights = load_file(out / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    pipe = TextToImage.from_pretrained(out)
    assert pipe.presets["draw"]["num_inference_steps"] == 5 and pipe.presets["describe"]["answer_length"] == 9
    assert read_words(out) == read_words(pipeline) != []
    assert (out / "README.md").read_text() == "# a card\n"


def test_a_better_decoder_is_packed_and_another_encoder_refused(run, world: Path, pipeline: Path, tmp_path: Path):
    steps = ["max_train_steps=2", "checkpointing_steps=2", "validation_steps=2", "concepts=16", f"data={world}"]
    steps += ["train_batch_size=2", "validation_pictures=2", f"init_from={pipeline / 'visual_tokenizer'}"]
    steps += ["learning_rate=0.01", "lr_warmup_steps=0", "ema_decay=0.0"]
    run("tokenizers/train_lfq", *steps, "train_encoder=false", "grow={decoder_blocks: 3}", f"out={tmp_path / 'better'}")
    run("tokenizers/train_lfq", *steps, f"out={tmp_path / 'other'}")
    better, other, out = (tmp_path / name for name in ("better", "other", "packed"))

    run("train/ship", f"model={pipeline}", f"out={out}", f"tokenizer={better / 'visual_tokenizer'}")
    packed, before = TextToImage.from_pretrained(out), TextToImage.from_pretrained(pipeline)
    assert packed.visual_tokenizer.config["decoder_blocks"] == 3
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    trained = LFQTokenizer.from_pretrained(better / "visual_tokenizer")
    assert torch.equal(trained.encode(pixels), before.visual_tokenizer.encode(pixels))
    codes = trained.encode(pixels)
    rebuilt, expected = packed.visual_tokenizer.float().decode(codes), trained.decode(codes)
    torch.testing.assert_close(rebuilt, expected, rtol=0, atol=0.02)  # half precision
    assert not torch.allclose(expected, before.visual_tokenizer.decode(codes), rtol=0, atol=0.02)

    with pytest.raises(InputError, match="is not the model's, expected one with the same codes"):
        run("train/ship", f"model={pipeline}", f"out={tmp_path / 'no'}", f"tokenizer={other / 'visual_tokenizer'}")
    assert not (tmp_path / "no").exists()


def test_nothing_but_a_model_is_replaced(run, pipeline: Path, tmp_path: Path):
    mine, empty = tmp_path / "mine", tmp_path / "empty"
    mine.mkdir(), empty.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"mine is no model directory, it has no .*: give a new out"):
        run("train/ship", f"model={pipeline}", f"out={mine}")
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    for steps in (3, 4):  # an empty directory, then the model that is in it
        run("train/ship", f"model={pipeline}", f"out={empty}", f"draw_steps={steps}")
        assert TextToImage.from_pretrained(empty).presets["draw"]["num_inference_steps"] == steps
    with pytest.raises(InputError, match=r"card is nowhere\.md, expected a Markdown file"):
        run("train/ship", f"model={pipeline}", f"out={empty}", "card=nowhere.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine"]


def test_a_failure_leaves_the_old_model(load, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ship, out = load("train/ship"), tmp_path / "packed"
    settings = [f"model={pipeline}", f"out={out}"]
    ship.main([*settings, "draw_steps=3"])
    with monkeypatch.context() as patch:
        patch.setattr(ship, "LIMIT", 2**10)
        with pytest.raises(InputError, match=r"the weights take \d\.\d MiB, expected at most 0: train a smaller model"):
            ship.main([*settings, "draw_steps=4"])

    moves = []

    def fails_when_the_old_one_is_away(source: Path, target: Path) -> None:
        moves.append(target)
        if target == out and len(moves) == 2:
            raise OSError(5, "Input/output error")
        os.rename(source, target)

    place = tmp_path / "new"
    place.mkdir()
    monkeypatch.setattr(ship.os, "replace", fails_when_the_old_one_is_away)
    with pytest.raises(OSError, match="Input/output error"):
        ship.replace(out, place)
    monkeypatch.undo()
    assert len(moves) == 3 and TextToImage.from_pretrained(out).presets["draw"]["num_inference_steps"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "packed"]

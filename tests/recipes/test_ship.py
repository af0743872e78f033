"""train/ship packs a model: half precision, presets, its words, and a decoder that was trained on meanwhile."""

from __future__ import annotations

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

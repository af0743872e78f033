"""A trained model grows: train_lfq gives its codes more bits, train/grow gives it their ids and more words."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.models.growing import first_bits
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.training.run_log import read_metrics


def test_a_model_grows_and_training_goes_on(
    run, world: Path, pipeline: Path, tiny_supervised: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, grown, longer = tmp_path / "tokenizer", tmp_path / "grown", tmp_path / "longer"
    settings = ["max_train_steps=2", "logging_steps=1", "checkpointing_steps=2", "validation_steps=2", "concepts=16"]
    settings += [f"data={world}", f"out={out}", f"init_from={pipeline / 'visual_tokenizer'}", "keep_codes_weight=0.5"]
    few = ["train_batch_size=2", "validation_pictures=2", "learning_rate=1e-5"]
    run("tokenizers/train_lfq", *settings, *few, "grow={codebook_bits: 8, encoder_blocks: 2}")
    assert all(0 <= row["keep_codes"] <= 4 for row in read_metrics(out) if "keep_codes" in row)
    before = TextToImage.from_pretrained(pipeline)
    tokenizer = LFQTokenizer.from_pretrained(out / "visual_tokenizer")
    assert (before.visual_tokenizer.codebook_size, tokenizer.codebook_size) == (64, 256)
    assert (before.visual_tokenizer.config["encoder_blocks"], tokenizer.config["encoder_blocks"]) == (1, 2)
    with pytest.raises(InputError, match="grow has codebook_bits: 5, expected codebook_bits, encoder_blocks"):
        run("tokenizers/train_lfq", *settings, *few, "grow={codebook_bits: 5}")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    same = first_bits(tokenizer.encode(pixels), 6, 8) == before.visual_tokenizer.encode(pixels)
    assert float(same.float().mean()) > 0.95

    words = [f"data={world}", "concepts=16", "scenes=40", "styles=[twemoji]", f"out={grown}"]
    run("train/grow", *words, f"model={pipeline}", f"tokenizer={out / 'visual_tokenizer'}", "text_vocab_size=600")
    said = capsys.readouterr().out
    assert "codes of 8 bits instead of 6" in said and "keep their first bits" in said
    now = TextToImage.from_pretrained(grown)
    vocabulary, old = now.processor.vocabulary, before.processor.vocabulary
    assert (vocabulary.image_size, vocabulary.text_size) == (256, len(now.processor.tokenizer)) != (64, old.text_size)
    assert now.processor.text(now.processor.text_ids("a cat and a tree")) == "a cat and a tree"
    token = now.processor.tokenizer.convert_ids_to_tokens(vocabulary.text_size - 1)
    rows = before.model.get_input_embeddings().weight
    known = before.processor.tokenizer.get_vocab()
    ids = [known[token]] if token in known else before.processor.text_ids(token.replace("Ġ", " "))
    found = now.model.get_input_embeddings().weight[vocabulary.text_size - 1]
    torch.testing.assert_close(found, rows[ids].mean(0), rtol=1e-5, atol=1e-6)

    steps = ["caption_length=40", "answer_length=24", "max_train_steps=1", "checkpointing_steps=1"]
    steps += ["validation_steps=1", f"data={world}", f"out={longer}"]
    run("train/supervised", *tiny_supervised, *steps, f"init_from={grown}")
    assert TextToImage.from_pretrained(longer / "pipeline").processor.vocabulary == vocabulary

    with pytest.raises(InputError, match="is there already"):
        run("train/grow", *words, f"model={pipeline}")
    with pytest.raises(InputError, match="has 6 bits, the model's 8"):
        run("train/grow", *words[:-1], f"out={tmp_path / 'less'}", f"model={grown}",
            f"tokenizer={pipeline / 'visual_tokenizer'}")  # fmt: skip
    with pytest.raises(InputError, match="data is empty"):
        run("train/grow", f"model={pipeline}", f"out={tmp_path / 'none'}")

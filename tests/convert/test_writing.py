"""`convert` writes a model once, whole or not at all; `write_published` writes it back bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmdlm.convert import convert, load_predictor, load_visual_tokenizer, write_published
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.processing import MMDLMProcessor

MMADA = {"model_type": "mmada", "embedding_size": 288, "codebook_size": 16, "num_vq_tokens": 16}


@pytest.fixture
def mmada(make_llada, write, text_tokenizer):
    """A small MMaDA with its tokenizer of 265 entries and 16 image codes in a table of 288 rows."""
    directory = write(*make_llada(**MMADA))
    text_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def eyes(tmp_path):
    tokenizer = LFQTokenizer(
        sample_size=8,
        codebook_bits=4,
        encoder_widths=(8, 16),
        decoder_widths=(8, 16),
        encoder_blocks=1,
        decoder_blocks=1,
        stem_patch=1,
    )
    tokenizer.save_pretrained(tmp_path / "eyes")
    return tmp_path / "eyes"


def test_a_language_model_and_its_tokenizer(mmada, tmp_path):
    published = load_predictor(mmada)
    assert convert(mmada, tmp_path / "ours", dtype=torch.bfloat16) == tmp_path / "ours"
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["model", "processor"]
    ours = load_predictor(tmp_path / "ours")
    assert ours.dtype == torch.bfloat16
    assert all(torch.equal(value, published.state_dict()[name].bfloat16()) for name, value in ours.state_dict().items())
    processor = MMDLMProcessor.from_pretrained(tmp_path / "ours" / "processor")
    assert processor.vocabulary == ours.vocabulary and processor.vocabulary.image_columns == (265, 281)
    assert not list(tmp_path.glob(".*")), "nothing is left beside it"


def test_with_a_visual_tokenizer_the_directory_is_whole(mmada, eyes, tmp_path):
    convert(mmada, tmp_path / "whole", visual_tokenizer=eyes)
    index = json.loads((tmp_path / "whole" / "model_index.json").read_text())
    assert index["visual_tokenizer"] == ["mmdlm.models.visual_tokenizer", "LFQTokenizer"]
    from mmdlm.pipelines import TextToImage

    pipe = TextToImage.from_pretrained(tmp_path / "whole")
    assert pipe.grid == (4, 4)  # num_vq_tokens
    other = tmp_path / "other"
    LFQTokenizer(
        codebook_bits=3, encoder_widths=(8,), decoder_widths=(8,), encoder_blocks=1, decoder_blocks=1
    ).save_pretrained(other)
    with pytest.raises(InputError, match="has 8 codes, the model was made for 16"):
        convert(mmada, tmp_path / "unfit", visual_tokenizer=other)
    (mmada / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        convert(mmada, tmp_path / "unfit", visual_tokenizer=eyes)
    assert not (tmp_path / "unfit").exists() and not list(tmp_path.glob(".*"))


def test_a_visual_tokenizer_alone_becomes_a_component(eyes, tmp_path):
    convert(eyes, tmp_path / "component")
    assert load_visual_tokenizer(tmp_path / "component").codebook_size == 16


def test_nothing_is_written_over_and_nothing_is_left_half_done(mmada, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        convert(mmada, tmp_path / "there")
    (mmada / "model.safetensors").write_bytes((mmada / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(InputError, match="broken or cut short"):
        convert(mmada, tmp_path / "half")
    assert not (tmp_path / "half").exists() and not list(tmp_path.glob(".*"))


def test_our_own_directory_needs_no_conversion(tiny_model, tmp_path):
    with pytest.raises(InputError, match="is an mmdlm model already"):
        convert(tiny_model, tmp_path / "again")
    with pytest.raises(InputError, match="not made from a published one"):
        write_published(load_predictor(tiny_model), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_written_back_it_is_what_was_published(mmada, tmp_path):
    convert(mmada, tmp_path / "ours")
    back = write_published(load_predictor(tmp_path / "ours"), tmp_path / "back")
    first, second = (load_file(directory / "model.safetensors") for directory in (mmada, back))
    assert first.keys() == second.keys()
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    assert json.loads((back / "config.json").read_text()) == json.loads((mmada / "config.json").read_text())


def test_an_unknown_directory_says_what_it_is(tmp_path):
    (tmp_path / "odd").mkdir()
    Path(tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="unknown format, model_type 'bert'"):
        convert(tmp_path / "odd", tmp_path / "out")

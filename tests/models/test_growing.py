"""What grows does what it did: tokenizers with more bits and blocks, predictors with more words and longer codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmdlm.models.growing import first_bits, grow_tokenizer, grown_predictor
from mmdlm.models.lfq import codes_to_bits
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.vocabulary import Vocabulary

SHAPE = {"sample_size": 32, "codebook_bits": 6, "encoder_widths": (8, 16), "decoder_widths": (8, 16)}
OLD = Vocabulary(
    text_size=20, image_start=24, image_size=64, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
TRUNK = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3,
}  # fmt: skip


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Nothing at the zero it began with, so that a weight in the wrong place shows."""
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("cell_encoder", [True, False])
@pytest.mark.parametrize("order", ["big", "little"])
def test_a_larger_tokenizer_rebuilds_as_before(cell_encoder: bool, order: str):
    settings = SHAPE | {"cell_encoder": cell_encoder, "bit_order": order}
    known = stirred(LFQTokenizer(**settings, encoder_blocks=1, decoder_blocks=1))
    larger = stirred(LFQTokenizer(**settings | {"codebook_bits": 9}, encoder_blocks=2, decoder_blocks=3))
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not torch.equal(first_bits(larger.encode(pixels), 6, 9, order), known.encode(pixels))
    grow_tokenizer(known, larger)
    codes = larger.encode(pixels)
    assert torch.equal(first_bits(codes, 6, 9, order), known.encode(pixels))
    assert len(codes.unique()) > len(known.encode(pixels).unique())  # the new bits do say something
    torch.testing.assert_close(larger.decode(codes), known.decode(known.encode(pixels)), rtol=0, atol=1e-4)


def test_a_tokenizer_of_another_shape_is_refused():
    known = LFQTokenizer(**SHAPE, encoder_blocks=1, decoder_blocks=1)
    with pytest.raises(ValueError, match=r"encoder\.stem\.weight is \(12, 12, 1, 1\), expected at least"):
        grow_tokenizer(known, LFQTokenizer(**SHAPE | {"encoder_widths": (12, 16)}, encoder_blocks=1, decoder_blocks=1))
    with pytest.raises(ValueError, match=r"encoder\.out\.weight is \(5, 16, 1, 1\), expected at least \(6,"):
        grow_tokenizer(known, LFQTokenizer(**SHAPE | {"codebook_bits": 5}, encoder_blocks=1, decoder_blocks=1))
    with pytest.raises(ValueError, match="is none, expected"):
        grow_tokenizer(LFQTokenizer(**SHAPE, encoder_blocks=2, decoder_blocks=1),
                       LFQTokenizer(**SHAPE, encoder_blocks=1, decoder_blocks=1))  # fmt: skip


@pytest.mark.parametrize("order", ["big", "little"])
def test_a_larger_predictor_says_what_it_said(order: str):
    settings = {"trunk": TRUNK, "code_bits": 6, "bit_order": order, "image_side": 2, "max_positions": 64}
    known = stirred(MaskPredictor(MaskPredictorConfig(vocabulary=OLD.to_dict(), **settings)))
    wider = replace(OLD, text_size=22, image_start=22, image_size=256)
    # the old ids in another order, then a word that was spelled 10, 11 and one that was spelled 12
    shuffled = [*range(10), *range(19, 9, -1)]
    larger = grown_predictor(known, wider, pieces=[[old] for old in shuffled] + [[10, 11], [12]], code_bits=8).eval()
    assert larger.config.code_bits == 8 and larger.vocabulary == wider

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (2, 4), generator=generator)
    text = torch.randint(9, 20, (2, 5), generator=generator)
    grid = torch.tensor([[[-1, -1]] * 5 + [[0, 0], [0, 1], [1, 0], [1, 1]]] * 2)
    before = torch.cat([text, OLD.image_ids(first_bits(codes, 6, 8, order))], 1)
    now = torch.cat([torch.tensor(shuffled).argsort()[text], wider.image_ids(codes)], 1)
    with torch.no_grad():
        old, new = known(before, grid=grid).logits, larger(now, grid=grid).logits
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(new[..., :20], old[..., shuffled], **close)
    torch.testing.assert_close(new[..., 20], old[..., [10, 11]].mean(-1), **close)
    parents = OLD.image_ids(first_bits(torch.arange(256), 6, 8, order))
    torch.testing.assert_close(new[..., 22:], old[..., parents], **close)
    assert torch.equal(codes_to_bits(torch.arange(256), 8, order)[..., :6], codes_to_bits(parents - 24, 6, order))


def test_a_predictor_that_cannot_grow_is_refused():
    settings = {"trunk": TRUNK, "vocabulary": OLD.to_dict(), "image_side": 2}
    plain, bits = (MaskPredictor(MaskPredictorConfig(code_bits=count, **settings)) for count in (0, 6))
    wider = replace(OLD, image_start=20, image_size=256)
    with pytest.raises(ValueError, match="codes have 0 bits, expected some"):
        grown_predictor(plain, wider, pieces=[[0]] * 20, code_bits=8)
    with pytest.raises(ValueError, match="codes have 6 bits, expected some, and at most the new ones' 5"):
        grown_predictor(bits, wider, pieces=[[0]] * 20, code_bits=5)
    with pytest.raises(ValueError, match="pieces for 19 ids"):
        grown_predictor(bits, wider, pieces=[[0]] * 19, code_bits=8)

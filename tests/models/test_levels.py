"""The published tokenizers' coders: what tells the two layouts apart, each by hand, and the tokenizer around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm.models.convolutional import CodeModulation, GridAttention
from mmdlm.models.levels import LAYOUTS, LevelDecoder, LevelEncoder
from mmdlm.models.visual_tokenizer import LFQTokenizer


def tokenizer(layout: str, **settings) -> LFQTokenizer:
    torch.manual_seed(0)
    given = {
        "codebook_bits": 5,
        "encoder_widths": (64, 32),
        "decoder_widths": (32, 64),
        "encoder_blocks": (1, 2),
        "decoder_blocks": (2, 1),
        "stem_width": 32,
        "stem_patch": 1,
        "code_modulation": LAYOUTS[layout].code_modulation,
        "layout": layout,
    } | settings
    model = LFQTokenizer(**given).eval()
    for parameter in model.parameters():  # out of the zeros that residual blocks start from
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_of_any_shape_and_back(layout: str, tmp_path: Path):
    model = tokenizer(layout)
    assert (model.downsample, model.codebook_size) == (2, 32)
    wide = pixels(2, 3, 8, 20)
    codes = model.encode(wide)
    assert codes.shape == (2, 4, 10) and codes.dtype == torch.int64 and len(codes.unique()) > 1
    assert model.decode(codes).shape == (2, 3, 8, 20)
    raw = model.decode(codes, clamp=False)
    assert torch.equal(raw.clamp(-1, 1), model.decode(codes))
    made = model(wide)  # the training pass is the same picture
    assert torch.equal(made.quantized.codes, codes)
    torch.testing.assert_close(made.pixels, raw, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = LFQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(wide), codes) and torch.equal(again.decode(codes, clamp=False), raw)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_gets_a_gradient(layout: str):
    model = tokenizer(layout).train()
    made = model(pixels(1, 3, 8, 8))
    (made.pixels.pow(2).mean() + made.quantized.commitment).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A softmax does not see what all keys share; what arrives there is rounding, and may be nothing.
    assert [name for name in without if not name.endswith("middle.1.key.bias")] == []


def test_a_row_does_not_depend_on_its_batch():
    model = tokenizer("open_magvit2")
    pictures = pixels(3, 3, 8, 8)
    codes = model.encode(pictures)
    assert torch.equal(model.encode(pictures[1:2]), codes[1:2])
    torch.testing.assert_close(model.decode(codes[1:2]), model.decode(codes)[1:2])


def test_where_halving_looks():
    """A kernel that copies its middle: the padded layout takes odd rows and columns, the other even ones."""
    picture = torch.arange(36.0).view(1, 1, 6, 6).expand(1, 32, 6, 6)
    for layout, first in (("magvitv2", 1), ("open_magvit2", 0)):
        halving = LevelEncoder((32, 32), (1, 1), 32, 5, LAYOUTS[layout]).downs[0]
        with torch.no_grad():
            halving[1].weight.zero_()
            halving[1].bias.zero_()
            halving[1].weight[torch.arange(32), torch.arange(32), 1, 1] = 1.0
        assert torch.equal(halving(picture), picture[:, :, first::2, first::2])


def test_the_decoder_runs_coarsest_first():
    """Widths are given finest first on both sides; every level widens in its first block."""
    decoder = LevelDecoder((32, 64, 96), (1, 2, 3), 5, LAYOUTS["open_magvit2"])
    assert [len(level) for level in decoder.levels] == [3, 2, 1]
    assert [level[0].conv1.weight.shape[:2] for level in decoder.levels] == [(96, 96), (64, 96), (32, 64)]
    assert [up[0].weight.shape[:2] for up in decoder.ups] == [(4 * 96, 96), (4 * 64, 64)]
    assert [modulation.scale.weight.shape for modulation in decoder.modulations] == [(96, 5), (96, 5), (64, 5)]
    assert decoder.stem.out_channels == 96 and len(decoder.middle) == 3 and decoder.out.in_channels == 32


def test_attention_over_the_grid_is_a_softmax_over_cells():
    torch.manual_seed(0)
    attention = GridAttention(32, groups=32)
    x = torch.randn(2, 32, 3, 4)
    h = attention.norm(x)
    query, key, value = (layer(h).flatten(2) for layer in (attention.query, attention.key, attention.value))
    weights = torch.einsum("bci,bcj->bij", query, key).mul(32**-0.5).softmax(-1)
    seen = torch.einsum("bij,bcj->bci", weights, value).view(2, 32, 3, 4)
    torch.testing.assert_close(attention(x), x + attention.out(seen))


def test_an_unbiased_spread_divides_by_one_less():
    vectors = torch.tensor([[[[1.0, -1.0], [-1.0, -1.0]]]])  # mean -1/2, squares sum to 3: variance 3/4 or 1
    x = torch.randn(1, 32, 2, 2, generator=torch.Generator().manual_seed(0))
    for unbiased, spread in ((False, 0.75**0.5), (True, 1.0)):
        modulation = CodeModulation(32, 1, groups=32, unbiased=unbiased)
        with torch.no_grad():
            modulation.scale.weight.fill_(1.0)
            modulation.scale.bias.zero_()
        torch.testing.assert_close(modulation(x, vectors), spread * modulation.norm(x), rtol=1e-5, atol=1e-5)


def test_settings_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="layout is 'taming', expected 'patched', 'magvitv2', 'open_magvit2'"):
        LFQTokenizer(layout="taming")
    with pytest.raises(ValueError, match="stem_patch is 2, cell_encoder False and code_modulation False, expected 1"):
        LFQTokenizer(layout="magvitv2")
    with pytest.raises(ValueError, match="expected 1, False and True for the layout open_magvit2"):
        tokenizer("open_magvit2", code_modulation=False)
    with pytest.raises(ValueError, match="blocks are given for 1 levels, expected 2"):
        tokenizer("magvitv2", encoder_blocks=(1,))
    with pytest.raises(ValueError, match="expected one number of blocks for all levels and no stem_width"):
        LFQTokenizer(encoder_blocks=(1, 2))
    with pytest.raises(ValueError, match=r"code_factors \(2, 2\) have 4 bits, expected 5"):
        tokenizer("open_magvit2", code_factors=(2, 2))
    with pytest.raises(ValueError, match="no code_factors"):
        tokenizer("open_magvit2").factors(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="picture is 7 x 8 pixels, expected multiples of 2"):
        tokenizer("magvitv2").encode(pixels(1, 3, 8, 7))

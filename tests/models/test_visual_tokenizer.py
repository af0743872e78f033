"""The visual tokenizer: shapes at every down-sampling, codes, saving and loading, modulation by the codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm.errors import InputError
from mmdlm.models.lfq import entropies
from mmdlm.models.visual_tokenizer import CodeModulation, LFQTokenizer, busy_cells, saved_tokenizer
from mmdlm.models.vq_tokenizer import VQTokenizer

TINY = {"codebook_bits": 6, "encoder_blocks": 1, "decoder_blocks": 1}


def tiny(**settings) -> LFQTokenizer:
    torch.manual_seed(0)
    widths = {"encoder_widths": (8, 16), "decoder_widths": (8, 16)}
    return LFQTokenizer(**(TINY | widths | settings)).eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("stem_patch", "levels", "factor"), [(2, 2, 4), (1, 3, 4), (4, 2, 8), (2, 3, 8), (4, 3, 16), (1, 5, 16)]
)
def test_every_down_sampling(stem_patch: int, levels: int, factor: int):
    widths = (8, 8, 12, 12, 16)[:levels]
    tokenizer = tiny(stem_patch=stem_patch, encoder_widths=widths, decoder_widths=widths)
    assert tokenizer.downsample == factor and tokenizer.codebook_size == 64
    codes = tokenizer.encode(pixels(2, 3, 32, 64))
    assert codes.shape == (2, 32 // factor, 64 // factor) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < 64
    rebuilt = tokenizer.decode(codes)
    assert rebuilt.shape == (2, 3, 32, 64) and float(rebuilt.abs().max()) <= 1


def test_a_training_pass_sees_the_same_codes_and_is_not_clamped():
    tokenizer = tiny().train()
    picture = pixels(2, 3, 16, 16)
    made = tokenizer(picture)
    tokenizer.eval()
    assert torch.equal(made.quantized.codes, tokenizer.encode(picture))
    torch.testing.assert_close(made.pixels.clamp(-1, 1), tokenizer.decode(made.quantized.codes))
    assert made.quantized.entropies is not None
    with torch.no_grad():
        tokenizer.decoder.out.bias.fill_(9.0)
    assert float(tokenizer(picture).pixels.max()) > 1 and float(tokenizer.decode(made.quantized.codes).max()) == 1


def test_every_weight_gets_a_gradient():
    tokenizer = tiny(code_modulation=True).train()
    for parameter in tokenizer.parameters():  # out of the zeros some start from, which hold back what lies before
        torch.nn.init.normal_(parameter, std=0.3)
    made = tokenizer(pixels(2, 3, 16, 16))
    (made.pixels.pow(2).mean() + made.quantized.commitment).backward()
    without = [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_saving_and_loading_changes_nothing(tmp_path: Path):
    tokenizer = tiny(code_modulation=True, bit_order="little", sample_size=16)
    tokenizer.save_pretrained(tmp_path)
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".json", ".safetensors"]
    again = LFQTokenizer.from_pretrained(tmp_path)
    assert again.config["sample_size"] == 16 and again.quantize.order == "little"
    picture = pixels(2, 3, 16, 16)
    codes = tokenizer.encode(picture)
    assert torch.equal(again.encode(picture), codes)
    assert torch.equal(again.decode(codes), tokenizer.decode(codes))


def test_the_bit_order_only_renames_codes():
    big, little = tiny(bit_order="big"), tiny(bit_order="little")
    picture = pixels(1, 3, 16, 16)
    reversed_bits = torch.tensor([int(f"{code:06b}"[::-1], 2) for code in range(64)])
    assert torch.equal(reversed_bits[big.encode(picture)], little.encode(picture))
    assert torch.equal(big.decode(big.encode(picture)), little.decode(little.encode(picture)))


@pytest.mark.parametrize(
    ("settings", "codes"), [({"fsq_levels": (5, 4, 3)}, 60), ({"codebook_bits": 10}, 1000), ({"codebook_bits": 8}, 240)]
)
def test_finite_scalar_quantisation_by_one_word(settings: dict[str, Any], codes: int, tmp_path: Path):
    tokenizer = tiny(quantizer="fsq", **settings)
    assert tokenizer.codebook_size == codes
    picture = pixels(1, 3, 16, 16)
    codes = tokenizer.encode(picture)
    tokenizer.save_pretrained(tmp_path)
    again = LFQTokenizer.from_pretrained(tmp_path)
    assert torch.equal(again.encode(picture), codes) and torch.equal(again.decode(codes), tokenizer.decode(codes))


@pytest.mark.parametrize("bits", range(6, 19))
def test_finite_scalar_quantisation_has_about_the_codes_asked_for(bits: int):
    tokenizer = tiny(quantizer="fsq", codebook_bits=bits, code_factors=(6, 12))
    assert 0.9 < tokenizer.codebook_size / 2**bits < 1.1
    assert int(tokenizer.encode(pixels(1, 3, 16, 16)).max()) < tokenizer.codebook_size
    with pytest.raises(ValueError, match="has no code_factors"):
        tokenizer.factors(torch.zeros(1, dtype=torch.long))


def test_half_precision_decodes():
    tokenizer = tiny()
    codes = tokenizer.encode(pixels(1, 3, 16, 16))
    exact = tokenizer.decode(codes)
    assert float((tokenizer.to(torch.bfloat16).decode(codes).float() - exact).abs().max()) < 0.1


@pytest.mark.parametrize(("height", "width"), [(18, 16), (16, 7)])
def test_a_size_that_does_not_fit_is_an_error(height: int, width: int):
    with pytest.raises(ValueError, match=f"picture is {width} x {height} pixels, expected multiples of 4"):
        tiny().encode(pixels(1, 3, height, width))


def test_settings_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="encoder_widths has 2 levels and decoder_widths 1"):
        tiny(decoder_widths=(8,))
    for wrong in ({"quantizer": "vq"}, {"quantizer": "fsq", "codebook_bits": 5}):
        with pytest.raises(ValueError, match="expected 'lfq', or 'fsq' with levels or 6 to 18 bits"):
            tiny(**wrong)
    with pytest.raises(ValueError, match=r"expected \[0, 63\]"):
        tiny().decode(torch.full((1, 4, 4), 64))


def test_modulation_by_the_codes():
    modulation = CodeModulation(8, 3)
    x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0)) * 5 + 2
    alike = torch.ones(2, 3, 2, 2)
    # Untrained it is a plain GroupNorm: whatever the codes say.
    mixed = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).expand(2, 3, 2, 2)
    torch.testing.assert_close(modulation(x, alike), modulation.norm(x))
    torch.testing.assert_close(modulation(x, mixed), modulation.norm(x))
    with torch.no_grad():
        modulation.scale.weight.fill_(1.0)
        modulation.shift.weight.fill_(2.0)
    # All codes alike: mean 1 and spread 0, in each of 3 bits. Mixed: mean 0 and spread 1.
    torch.testing.assert_close(modulation(x, alike), 1.003 * modulation.norm(x) + 6, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(modulation(x, mixed), 4 * modulation.norm(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("stem_patch", "levels"), [(4, 1), (2, 2), (1, 3)])
def test_a_cell_encoder_sees_one_cell_at_a_time(stem_patch: int, levels: int):
    widths = (8, 8, 12)[:levels]
    settings = {"stem_patch": stem_patch, "encoder_widths": widths, "decoder_widths": widths}
    picture = pixels(1, 3, 16, 16)
    changed = picture.clone()
    changed[:, :, 4:8, 8:12] = -picture[:, :, 4:8, 8:12]
    for by_cell in (True, False):
        tokenizer = tiny(cell_encoder=by_cell, **settings)
        for parameter in tokenizer.encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        assert tokenizer.downsample == 4
        difference = (tokenizer.encoder(changed) - tokenizer.encoder(picture)).abs().amax((0, 1)) > 1e-6
        places = difference.nonzero().tolist()
        assert places == [[1, 2]] if by_cell else len(places) > 1


def test_busy_cells_on_a_hand_case():
    picture = torch.full((1, 3, 8, 12), 0.25)
    picture[0, 1, 0, 3] = 0.5  # in the cell at row 0, column 0
    picture[0, :, 7, 8:] = -1.0  # row 1, column 2
    picture[0, :, 4:, 4:8] = 0.26  # one colour, though another than its neighbours'
    assert busy_cells(picture, 4).tolist() == [[[True, False, False], [False, False, True]]]
    assert busy_cells(torch.zeros(1, 3, 8, 8), 4).all()  # nothing is busy: all count


def test_busy_entropy_counts_busy_cells_only():
    tokenizer = tiny(busy_entropy=True, entropy_temperature=0.5).train()
    picture = pixels(2, 3, 16, 16)
    picture[:, :, :, 4:] = 0.5
    found = tokenizer(picture).quantized.entropies
    z = tokenizer.encoder(picture)[:, :, :, 0].movedim(1, -1).flatten(0, 1)
    torch.testing.assert_close(found, entropies(z, 0.5))


def test_a_directory_without_a_whole_tokenizer_is_one_sentence(tmp_path: Path):
    tokenizer = tiny()
    tokenizer.save_pretrained(tmp_path / "own")
    assert torch.equal(saved_tokenizer(tmp_path / "own").decoder.out.weight, tokenizer.decoder.out.weight)
    VQTokenizer().save_pretrained(tmp_path / "vq")
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(InputError, match=f"{name} holds no visual tokenizer, expected a directory with"):
            saved_tokenizer(tmp_path / name)
    with pytest.raises(InputError, match="google/magvit holds no visual tokenizer"):  # a name on the Hub, perhaps
        saved_tokenizer("google/magvit")
    with pytest.raises(InputError, match="vq holds a VQTokenizer, expected an LFQTokenizer"):
        saved_tokenizer(tmp_path / "vq")
    file = tmp_path / "own" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("decoder.out.weight")
    save_file(weights, file)
    with pytest.raises(InputError, match=r"is broken \(1 weights are missing, decoder.out.weight for one\): copy"):
        saved_tokenizer(tmp_path / "own")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"own is broken \(.*\): copy or train it again"):
        saved_tokenizer(tmp_path / "own")
    file.unlink()
    with pytest.raises(InputError, match=r"own is broken \(.*\): copy or train it again"):
        saved_tokenizer(tmp_path / "own")

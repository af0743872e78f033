"""Half a published tokenizer each, to keep the recordings small: MAGVITv2's decoder and losses, Lumina's encoder.

Open-MAGVIT2's, whole and with averaged weights, is replayed in test_recorded.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmdlm.convert import lumina_vq, magvitv2
from mmdlm.convert.visual import load_visual_tokenizer, shapes_of
from mmdlm.evaluation.parity import Case, verify
from mmdlm.evaluation.parity.visual import tolerance
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.models.vq_tokenizer import VQTokenizer

RECORDED = Path(__file__).parent / "recorded"
HALVES = Path(__file__).parent / "halves"  # one half of a tokenizer each, no whole cases


def half(family: ModuleType, name: str, part: str) -> tuple[LFQTokenizer | VQTokenizer, dict[str, Tensor]]:
    """A tokenizer with the recorded weights of one half (the other's are zeros), and what was recorded."""
    directory = HALVES / name
    tokenizer = family.build(json.loads((directory / "config.json").read_text())).eval()
    weights = load_file(directory / "weights.safetensors")
    missing = {
        piece.source: torch.zeros(piece.source_shape)
        for piece in family.pieces(shapes_of(tokenizer))
        if piece.source not in weights
    }
    assert all(not source.startswith(part) for source in missing)
    tokenizer.load_state_dict(family.to_mmdlm(weights | missing, shapes_of(tokenizer)))
    return tokenizer, load_file(directory / "recorded.safetensors")


def test_magvitv2_decodes_as_recorded():
    tokenizer, recorded = half(magvitv2, "magvitv2-decoder", "decoder")
    assert isinstance(tokenizer, LFQTokenizer)
    for prefix, grid in (("", (8, 8)), ("random_", (8, 8)), ("rect_", (4, 12))):
        codes = recorded[f"{prefix}codes"].view(-1, *grid)
        pixels = tokenizer.decode(codes, clamp=False)
        torch.testing.assert_close(pixels, recorded[f"{prefix}decoded"], atol=2e-4, rtol=0)
    for prefix in ("", "rect_"):
        codes = tokenizer.quantize(recorded[f"{prefix}encoder_out"]).codes
        assert torch.equal(codes.flatten(1), recorded[f"{prefix}codes"])
    assert torch.equal(tokenizer.quantize.vectors(recorded["codes"].view(-1, 8, 8)), recorded["quantized"])


def test_magvitv2_loses_as_recorded():
    tokenizer, recorded = half(magvitv2, "magvitv2-decoder", "decoder")
    found = tokenizer.quantize.train()(recorded["encoder_out"])
    commitment = magvitv2.COMMITMENT_WEIGHT * found.commitment
    torch.testing.assert_close(commitment, recorded["quantizer_loss"], rtol=1e-4, atol=0)
    entropy = magvitv2.ENTROPY_WEIGHT * (found.entropies.per_sample - found.entropies.codebook) / 6
    torch.testing.assert_close(entropy, recorded["entropy_loss"], rtol=1e-4, atol=0)


def test_lumina_encodes_as_recorded():
    tokenizer, recorded = half(lumina_vq, "lumina-vq-encoder", "encoder")
    for prefix in ("", "rect_"):
        pixels = recorded[f"{prefix}pixels"] * 2 - 1
        torch.testing.assert_close(tokenizer.latents(pixels), recorded[f"{prefix}latents"], atol=2e-4, rtol=0)
        assert torch.equal(tokenizer.encode(pixels), recorded[f"{prefix}codes"])


def test_the_last_weights_instead_of_the_averaged_fail(tmp_path: Path):
    """The averaged weights are what was recorded with: others are told apart."""
    directory = RECORDED / "open-magvit2-ema"
    for name in ("case.json", "case.safetensors", "config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    weights = load_file(directory / "model.safetensors")
    weights["model_ema.encoderconv_inweight"].mul_(1.1)
    save_file(weights, tmp_path / "model.safetensors")
    failed = {check.name for check in verify(tmp_path) if not check.passed}
    assert {"encoder_out", "rect_encoder_out"} <= failed and "decoded" not in failed
    assert load_visual_tokenizer(directory).config["code_factors"] == (2, 4)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("atol 2e-4, rtol 1e-4 in fp32", {"atol": 2e-4, "rtol": 1e-4}),
        ("rtol 0.001", {"rtol": 1e-3}),
        ("exact (min |encoder_out| > 2e-3)", {}),
    ],
)
def test_a_tolerance_in_words(words: str, found: dict[str, float]):
    assert tolerance(Case(RECORDED, {"tolerance": {"pixels": words}}), "pixels") == found

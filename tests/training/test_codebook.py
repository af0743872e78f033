"""The use of a codebook: exact numbers, and advice where it collapses and none where it does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm.training.codebook import advice, bit_shares, draw_dashboard, stuck_bits, use_of_codes


def test_use_of_codes():
    numbers = use_of_codes(torch.tensor([3, 0, 3, 0, 0, 0, 0, 0]))
    assert numbers == {"codes_used": 2, "dead_codes": 6, "used_share": 2 / 6, "perplexity": pytest.approx(2)}
    assert use_of_codes(torch.ones(1024))["perplexity"] == pytest.approx(1024)
    assert use_of_codes(torch.zeros(4)) == {"codes_used": 0, "dead_codes": 4, "used_share": 0, "perplexity": 1}


def test_bits_of_codes():
    counts = torch.tensor([0, 2, 0, 6])  # 01 twice, 11 six times
    assert bit_shares(counts, 2, "big").tolist() == [0.75, 1.0]
    assert bit_shares(counts, 2, "little").tolist() == [1.0, 0.75]
    assert stuck_bits(counts, 2, "big") == [1]


def test_advice_names_the_setting_to_change():
    even = torch.full((1024,), 4)
    assert advice(even, bits=10, sample_entropy=0.3, codebook_entropy=6.8, commitment=0.5) == []
    one = torch.zeros(1024)
    one[5] = 4096
    told = advice(one, bits=10, sample_entropy=6.0, codebook_entropy=0.5, commitment=9.0)
    assert [line.split(":")[0].split(",")[0] for line in told] == [
        "the codebook collapses", "10 of 10 bits never change (0", "single codes are undecided",
        "few codes are shared out", "the encoder drifts away from its codes",
    ]  # fmt: skip
    assert "codebook_entropy_weight" in told[0] and "1 of 1024 codes" in told[0]
    # few cells cannot use many codes: no collapse where nearly each has its own
    few = torch.zeros(2**18)
    few[torch.randperm(2**18, generator=torch.Generator().manual_seed(0))[:512]] = 1
    assert advice(few, bits=18, codebook_entropy=math.log(512)) == []


def test_the_dashboard_is_a_picture(tmp_path: Path):
    for size, bits in ((64, 6), (60, None)):
        draw_dashboard(torch.arange(size), tmp_path / "codes.png", bits=bits)
        with Image.open(tmp_path / "codes.png") as picture:
            assert picture.width > 800 and picture.format == "PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["codes.png"]

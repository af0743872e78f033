"""What is kept of pictures: formulas where they can be solved, slow twins where they cannot."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.evaluation.features import extractor
from mmdlm.evaluation.reconstruction import at_bits, code_use, levels, lpips_network, measure_tokenizer, psnr, ssim


def test_psnr_by_hand():
    x = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    y = x.clone()
    y[1] += 5
    assert psnr(x, y)[0] == math.inf
    assert float(psnr(x, y)[1]) == pytest.approx(20 * math.log10(255 / 5))


def test_ssim_of_flat_pictures_and_of_itself():
    x, y = torch.full((1, 3, 16, 16), 100, dtype=torch.uint8), torch.full((1, 3, 16, 16), 150, dtype=torch.uint8)
    c1 = (0.01 * 255) ** 2
    assert float(ssim(x, y)[0]) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    noise = torch.randint(256, (2, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert ssim(noise, noise).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(InputError, match="at least 11"):
        ssim(noise[..., :8], noise[..., :8])


def test_ssim_equals_its_slow_twin():
    draw = np.random.default_rng(0)
    x, y = (draw.integers(0, 256, (1, 1, 13, 12)).astype(np.uint8) for _ in range(2))
    bell = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    window = np.outer(bell, bell) / bell.sum() ** 2
    values = []
    for row in range(3):
        for column in range(2):
            a, b = (z[0, 0, row : row + 11, column : column + 11].astype(float) for z in (x, y))
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            both = (window * (a - ma) * (b - mb)).sum()
            c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
            values.append((2 * ma * mb + c1) * (2 * both + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert float(ssim(torch.from_numpy(x), torch.from_numpy(y))[0]) == pytest.approx(np.mean(values), rel=1e-9)


def test_code_use_by_hand():
    assert code_use(torch.tensor([2, 2, 0, 0])) == {"used_share": 0.5, "perplexity": 2.0, "entropy_bits": 1.0}


@pytest.mark.parametrize("codec", ["jpeg", "webp"])
def test_codecs_keep_to_their_bits(codec):
    picture = np.asarray(Image.radial_gradient("L").resize((64, 64)).convert("RGB"))
    few, many = at_bits(picture, codec, 4000), at_bits(picture, codec, 12000)
    assert few[1] <= 4000 < many[1] <= 12000
    errors = [np.square(picture.astype(float) - back).mean() for back, _ in (few, many)]
    assert errors[1] < errors[0]
    assert at_bits(picture, codec, 1)[1] > 1  # its lowest quality, and it says so


def grey(bits: int) -> SimpleNamespace:
    """A tokenizer of grey levels: a code for each block of 4 x 4 pixels."""
    steps = 2**bits

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        mean = torch.nn.functional.avg_pool2d(pixels.mean(1), 4)
        return ((mean + 1) / 2 * (steps - 1)).round().long()

    def decode(codes: torch.Tensor) -> torch.Tensor:
        flat = codes.float() / (steps - 1) * 2 - 1
        return flat.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand(-1, 3, -1, -1)

    return SimpleNamespace(encode=encode, decode=decode, codebook_size=steps)


def test_a_tokenizer_measured():
    ramp = torch.linspace(-1, 1, 16).expand(1, 3, 16, 16)
    flat = torch.ones(1, 3, 16, 16)
    batches = [(["ramp.png"], ramp), (["flat.png"], flat)]
    scores = measure_tokenizer(grey(4), batches, by=extractor("random"))
    assert scores.summary["bits_per_pixel"] == 4 / 16
    assert scores.summary["identical"] == 1 and scores.rows[1]["psnr"] is None and scores.rows[1]["ssim"] == 1.0
    assert scores.summary["psnr"] == scores.rows[0]["psnr"]
    assert scores.summary["feature_distance"] > 0 and scores.summary["few"] and "rfid" not in scores.summary
    assert {"jpeg_psnr", "webp_ssim", "jpeg_bits_per_pixel"} <= scores.summary.keys()
    assert scores.summary["used_share"] == 5 / 16 and scores.summary["pictures"] == 2
    finer = measure_tokenizer(grey(8), [(["ramp.png"], ramp)], codecs=False)
    assert finer.summary["psnr"] > scores.summary["psnr"] and "jpeg_psnr" not in finer.summary
    with pytest.raises(InputError, match="no pictures"):
        measure_tokenizer(grey(4), [])
    assert torch.equal(levels(torch.tensor([-1.0, 1.0, 1.5])), torch.tensor([0, 255, 255], dtype=torch.uint8))


def test_lpips_from_given_weights(tmp_path):
    pytest.importorskip("lpips")
    from torchvision.models import alexnet

    torch.manual_seed(0)
    trunk = alexnet(weights=None)
    saved = {name: value for name, value in trunk.state_dict().items() if name.startswith("features.")}
    torch.save(saved, tmp_path / "alexnet.pth")
    network = lpips_network(tmp_path / "alexnet.pth")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    inner = network.net(network.scaling_layer(x))[0]
    assert torch.allclose(inner, trunk.features[:2](network.scaling_layer(x)))
    assert float(network(x, x)) == 0.0 < float(network(x, -x))
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="AlexNet"):
        lpips_network(tmp_path / "other.pth")

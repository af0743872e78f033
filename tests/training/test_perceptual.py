"""The perceptual distance: from a timm network's own file, never from the network that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mmdlm.errors import InputError
from mmdlm.training.perceptual import PerceptualDistance

TINY = "test_resnet"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a timm network of random weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model(TINY, pretrained=False).state_dict(), path)
    return path


def test_it_is_the_distance_of_unit_features_and_has_a_gradient(weights: Path):
    distance = PerceptualDistance(f"{TINY}@{weights}")
    chance = torch.Generator().manual_seed(1)
    made, real = (torch.rand(2, 3, 64, 64, generator=chance) * 2 - 1 for _ in range(2))
    assert float(distance(real, real)) == 0
    found = distance(made.requires_grad_(), real)
    network = timm.create_model(TINY, pretrained=False, features_only=True).eval()
    network.load_state_dict(distance.network.state_dict())
    with torch.no_grad():
        pairs = zip(network(norm(made, distance)), network(norm(real, distance)), strict=True)
        expected = sum((unit(a) - unit(b)).pow(2).sum(1).mean() for a, b in pairs)
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert float(made.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in distance.parameters())


def norm(pixels: torch.Tensor, distance: PerceptualDistance) -> torch.Tensor:
    return ((pixels + 1) / 2 - distance.mean) / distance.std


def unit(features: torch.Tensor) -> torch.Tensor:
    return features / features.pow(2).sum(1, keepdim=True).sqrt().clamp_min(1e-12)


def test_weights_that_are_not_at_hand_are_one_sentence_and_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
):
    def online(*arguments: object, **settings: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr("timm.models._hub.hf_hub_download", online)
    with pytest.raises(InputError, match="perceptual_model is empty"):
        PerceptualDistance(None)
    for name in (f"{TINY}.r160_in1k", "no_such_network"):
        with pytest.raises(InputError, match="has no weights in the Hub's cache: give NAME@PATH"):
            PerceptualDistance(name)
    with pytest.raises(InputError, match="has no weights at hand"):
        PerceptualDistance(f"{TINY}@{tmp_path / 'missing.safetensors'}")

"""Distances of picture sets: Gaussians of known moments, torch-fidelity over the same features, counts by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.evaluation.features import RANDOM_WIDTH, Extractor, extractor, folder_features
from mmdlm.evaluation.generation import (
    Statistics,
    bootstrap_error,
    compare_sets,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
    statistics,
)


def features(seed: int, count: int, width: int = 8) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + seed).astype(np.float32)


def test_two_gaussians_of_known_moments():
    # diagonal covariances: |m1 - m2|^2 + sum of (s1 - s2)^2
    one = Statistics(np.array([0.0, 1.0]), np.diag([4.0, 9.0]))
    other = Statistics(np.array([3.0, 1.0]), np.diag([1.0, 0.0]))
    assert frechet_distance(one, other) == pytest.approx(9 + 1 + 9, abs=1e-12)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one), abs=1e-12)
    with pytest.raises(ValueError, match="expected as many"):
        frechet_distance(one, Statistics(np.zeros(3), np.eye(3)))
    with pytest.raises(InputError, match="1 pictures"):
        statistics(np.zeros((1, 3)))


def test_samples_of_a_gaussian_approach_its_distance():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(20000, 3)), draw.normal(size=(20000, 3)) * 2 + 1
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(3 + 3, rel=0.05)


@pytest.mark.parametrize("counts", [(60, 50), (5, 6)])  # with full rank and without
def test_equal_to_torch_fidelity(counts):
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(1, counts[0]), features(2, counts[1])
    tensors = [torch.from_numpy(z).double() for z in (x, y)]
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(z) for z in tensors), False)
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(
        theirs["frechet_inception_distance"], abs=1e-6, rel=1e-6
    )
    size = min(counts)
    kid = kid_features_to_metric(*tensors, kid_subsets=7, kid_subset_size=size, rng_seed=2020, verbose=False)
    mean, std = kernel_distance(x, y, subsets=7, subset_size=size)
    assert mean == pytest.approx(kid["kernel_inception_distance_mean"], abs=1e-6, rel=1e-9)
    assert std == pytest.approx(kid["kernel_inception_distance_std"], abs=1e-6, rel=1e-6)
    isc = isc_features_to_metric(tensors[0], splits=3)
    assert inception_score(x, splits=3) == pytest.approx(
        (isc["inception_score_mean"], isc["inception_score_std"]), abs=1e-9
    )
    if min(counts) > 5:
        prc = prc_features_to_metric(*tensors, prc_neighborhood=3, prc_batch_size=9, save_cpu_ram=False, verbose=False)
        ours = neighbourhoods(x, y)
        assert (ours["precision"], ours["recall"]) == pytest.approx((prc["precision"], prc["recall"]), abs=1e-6)


def test_density_and_coverage_by_hand():
    # references on a line at 0, 1, 2, 3: the first neighbour is 1 away; generated at 0.5 and far away
    reference, generated = np.arange(4.0)[:, None], np.array([[0.5], [50.0], [51.0]])
    found = neighbourhoods(generated, reference, near=1, wide=1)
    assert found["precision"] == pytest.approx(1 / 3)
    assert found["density"] == pytest.approx(2 / 3)  # 0.5 lies in the balls around 0 and 1
    assert found["coverage"] == pytest.approx(0.5)
    assert found["recall"] == 1.0  # the ball around 0.5 reaches to 50
    with pytest.raises(InputError, match="more than 5"):
        neighbourhoods(generated, reference)


def test_the_bootstrap_error_is_the_spread_of_fresh_samples():
    draw = np.random.default_rng(0)
    reference = draw.normal(size=(4000, 2))
    fresh = [
        frechet_distance(statistics(draw.normal(size=(200, 2)) + 1), statistics(draw.normal(size=(4000, 2))))
        for _ in range(60)
    ]
    found = bootstrap_error(draw.normal(size=(200, 2)) + 1, reference, resamples=60)
    assert found == pytest.approx(np.std(fresh), rel=0.4)


@pytest.fixture
def folders(tmp_path):
    draw = np.random.default_rng(0)
    for name, shift in (("generated", 0), ("reference", 60)):
        (tmp_path / name).mkdir()
        for number in range(8):
            levels = draw.integers(0, 190, size=(16, 16, 3)) + shift
            Image.fromarray(levels.astype(np.uint8)).save(tmp_path / name / f"{number}.png")
    return tmp_path / "generated", tmp_path / "reference"


def test_folders_cached_and_named_for_what_they_are(folders, tmp_path):
    by, cache = extractor("random"), tmp_path / "cache"
    one, other = (folder_features(folder, by, cache=cache, batch_size=3) for folder in folders)
    assert one.features.shape == (8, RANDOM_WIDTH) and one.sizes == [(16, 16)] and len(list(cache.iterdir())) == 2

    def fail(batch):
        raise AssertionError("computed twice")

    again = folder_features(folders[0], by._replace(extract=fail), cache=cache)
    assert np.array_equal(again.features, one.features) and again.files == one.files
    with pytest.raises(InputError, match="128 features"):
        compare_sets(one, other, by)
    found = compare_sets(one, other, by, allow_few=True, resamples=5, kid_subsets=3)
    assert "feature_distance" in found and not {"fid", "kid", "inception_score"} & found.keys()
    assert found["feature_distance_low"] < found["feature_distance"] < found["feature_distance_high"] and found["few"]
    same = compare_sets(one, one, by, allow_few=True, resamples=0)
    assert same["feature_distance"] == pytest.approx(0, abs=1e-6) and found["feature_distance"] > 1e-3
    assert same["precision"] == same["recall"] == same["coverage"] == 1.0


def test_a_changed_picture_is_not_taken_from_the_cache(folders, tmp_path):
    by = extractor("random")
    before = folder_features(folders[0], by, cache=tmp_path / "cache")
    Image.new("RGB", (16, 16), "red").save(folders[0] / "3.png")
    after = folder_features(folders[0], by, cache=tmp_path / "cache")
    assert before.content != after.content and not np.array_equal(before.features[3], after.features[3])


def test_the_extractor_decides_what_is_called_fid(folders):
    def extract(batch):
        flat = batch.float().mean((2, 3))
        return flat, flat

    named = Extractor("tiny", 3, True, extract)
    one, other = (folder_features(folder, named) for folder in folders)
    found = compare_sets(one, other, named, resamples=3, kid_subsets=2)
    assert {"fid", "kid", "inception_score"} <= found.keys() and not found["few"]


def test_warnings_and_folders_that_do_not_do(folders, tmp_path):
    by = extractor("random")
    Image.new("RGB", (16, 16)).save(folders[0] / "8.jpg")
    with pytest.warns(UserWarning, match="1 of 9 pictures"):
        one = folder_features(folders[0], by)
    Image.new("RGB", (20, 16)).save(folders[1] / "9.png")
    with pytest.warns(UserWarning, match="2 sizes"):
        folder_features(folders[1], by)
    with pytest.warns(UserWarning, match="20 x 16"):
        compare_sets(one, one._replace(sizes=[(20, 16)]), by, allow_few=True, resamples=0, kid_subsets=2)
    (folders[1] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(InputError, match="broken"):
        folder_features(folders[1], by)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="0 pictures"):
        folder_features(tmp_path / "empty", by)
    Image.new("RGB", (16, 16)).save(tmp_path / "empty" / "alone.png")
    with pytest.raises(InputError, match="1 pictures"):
        folder_features(tmp_path / "empty", by)
    with pytest.raises(InputError, match="no folder"):
        folder_features(tmp_path / "missing", by)


def test_weights_that_are_missing_or_anothers(tmp_path, monkeypatch):
    pytest.importorskip("torch_fidelity")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # this machine may have the real ones
    with pytest.raises(InputError, match="--weights PATH"):
        extractor("inception")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    for path in (tmp_path / "missing.pth", tmp_path / "other.pth"):
        with pytest.raises(InputError, match="weights-inception"):
            extractor("inception", weights=path)
    with pytest.raises(InputError, match="only inception takes any"):
        extractor("random", weights=tmp_path / "other.pth")
    with pytest.raises(InputError, match="no timm model"):
        extractor(str(tmp_path))


def test_a_timm_model_from_its_directory(folders, tmp_path):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=7)
    directory = tmp_path / "timm"
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors")
    config = {"architecture": "test_efficientnet", "num_classes": 7, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (directory / "config.json").write_text(json.dumps(config))
    by = extractor(str(directory))
    assert by.name.startswith("timm test_efficientnet ") and not by.is_inception
    assert folder_features(folders[0], by).features.shape == (8, by.width)

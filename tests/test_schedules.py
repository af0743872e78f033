"""Schedules: the closed-form weights against the derivative, the ends, the times drawn."""

from __future__ import annotations

import math

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.schedules import (
    by_modality,
    cosine,
    cubic,
    linear,
    maskgit,
    polynomial,
    sample_t,
    schedule_by_name,
    square,
    unweighted,
)

BOUNDS = [linear, cosine, square, cubic, polynomial(1.5)]
by_name = pytest.mark.parametrize("schedule", BOUNDS, ids=lambda schedule: schedule.name)


@by_name
def test_weight_is_the_slope_of_alpha(schedule):
    t = torch.linspace(1e-3, 1 - 1e-3, 999, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.weight(t), -slope / (1 - alpha), rtol=1e-9, atol=1e-9)
    assert (unweighted(schedule).weight(t) == 1).all() and unweighted(schedule).alpha is schedule.alpha


@by_name
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_are_exact(schedule, dtype):
    ends = torch.tensor([1e-7, 1e-6, 1e-4, 1.0], dtype=dtype)
    alpha, weight = schedule.alpha(ends), schedule.weight(ends)
    assert alpha.dtype == weight.dtype == dtype
    assert alpha[-1] == 0 and (alpha[:-1] < 1).logical_or(ends[:-1] < 1e-6).all()
    # Near 0 each masked share is c t, so the weight is 1/t; at 1 it is the slope, finite and not negative.
    torch.testing.assert_close((weight * ends)[:3], torch.ones(3, dtype=dtype), rtol=2e-4, atol=0)
    assert 0 <= weight[-1] < 1.01
    assert (schedule.weight(torch.linspace(1e-6, 1, 10_001, dtype=dtype)) >= 0).all()


def test_alpha_falls_from_one_to_zero():
    t = torch.linspace(1e-6, 1, 1001)
    for schedule in BOUNDS:
        alpha = schedule.alpha(t)
        assert (alpha.diff() <= 0).all() and alpha[0] > 0.999 and alpha[-1] == 0


def test_cosine_is_maskgits():
    """Masked share cos(pi/2 r) after the share r of the steps, r = 1 - t (arXiv:2202.04200)."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    torch.testing.assert_close(1 - cosine.alpha(t), torch.cos(math.pi / 2 * (1 - t)))
    assert torch.equal(maskgit.alpha(t), cosine.alpha(t)) and (maskgit.weight(t) == 1).all()
    torch.testing.assert_close(1 - square.alpha(t), 1 - (1 - t) ** 2)


def test_by_modality_takes_each_places_own():
    modality = torch.tensor([[0, 1], [1, 0]])
    both = by_modality(modality, text=linear, image=cosine)
    t = torch.tensor([[0.2], [0.7]])
    expected = torch.tensor([[0.8, float(cosine.alpha(t)[0])], [float(cosine.alpha(t)[1]), 0.3]])
    torch.testing.assert_close(both.alpha(t), expected)
    torch.testing.assert_close(both.weight(t)[0], torch.stack([linear.weight(t)[0, 0], cosine.weight(t)[0, 0]]))


def test_names():
    for name in ("linear", "cosine", "maskgit", "square", "cubic", "unweighted_linear"):
        assert schedule_by_name(name).name == name
    with pytest.raises(InputError, match=r"no schedule 'cosin'.*did you mean 'cosine'"):
        schedule_by_name("cosin")
    with pytest.raises(ValueError, match="at least 1"):
        polynomial(0.5)


def test_sampled_times_hit_every_stratum_once():
    t = sample_t(64, generator=torch.Generator().manual_seed(0))
    assert t.shape == (64, 1) and t.dtype == torch.float32 and (t > 0).all() and (t <= 1).all()
    assert sorted((t.flatten() * 64).ceil().int().tolist()) == list(range(1, 65))
    assert not torch.equal(t.flatten().sort().values, t.flatten()), "the rows' order must not follow the time"


def test_sampled_times_are_uniform_for_each_row():
    generator = torch.Generator().manual_seed(1)
    for low_discrepancy in (True, False):
        draws = torch.stack([sample_t(4, generator=generator, low_discrepancy=low_discrepancy) for _ in range(4000)])
        # The mean of 4000 uniform numbers has a standard deviation of 0.0046.
        assert ((draws.mean(0) - 0.5).abs() < 0.02).all() and ((draws.var(0) - 1 / 12).abs() < 0.005).all()


def test_sampled_times_are_reproducible_and_keep_off_the_minimum():
    first, second = (sample_t(1000, generator=torch.Generator().manual_seed(3), minimum=0.25) for _ in range(2))
    assert torch.equal(first, second) and first.min() >= 0.25 and first.max() <= 1
    assert sample_t(0).shape == (0, 1)
    # The smallest of a million strata lies below the spacing of float32 near 1, and still is no 0.
    assert sample_t(2**20, generator=torch.Generator().manual_seed(0)).min() > 0
    with pytest.raises(ValueError, match="minimum"):
        sample_t(2, minimum=1.0)

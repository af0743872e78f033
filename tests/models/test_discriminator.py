"""The discriminator's losses, weight and gate on cases that are worked out by hand."""

from __future__ import annotations

import pytest
import torch

from mmdlm.models.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    lecam,
    warm_start,
)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    # real: max(0, 1 - 2), max(0, 1 - 0.5); fake: max(0, 1 - 3), max(0, 1 + 0.25)
    assert float(discriminator_loss(real, fake)) == 0.5 * (0.5 / 2 + 1.25 / 2)
    assert float(discriminator_loss(torch.tensor([1.0]), torch.tensor([-1.0]))) == 0.0
    assert float(generator_loss(fake)) == 2.75 / 2


def test_lecam_pulls_towards_the_other_sides_mean():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 3.0])
    found = lecam(real, fake, torch.tensor(1.0), torch.tensor(-0.5))
    assert float(found) == 2.5**2 / 2 + 1.0**2 / 2  # real above -0.5: 2.5, 0; the real mean 1 above fake: 1, 0


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    reconstruction, adversarial = 0.5 * weight.pow(2).sum(), -(0.6 * weight[0] + 0.8 * weight[1])
    found = adaptive_weight(reconstruction, adversarial, weight)
    assert float(found) == pytest.approx(5.0 / (1.0 + 1e-4)) and not found.requires_grad
    reconstruction.backward()  # both graphs are still there
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 4.0]
    assert float(adaptive_weight(weight.sum(), 0.0 * weight.sum(), weight, ceiling=7.0)) == 7.0


def test_the_warm_start_gate():
    assert [warm_start(step, start=10, ramp=4) for step in (0, 9, 10, 11, 12, 13, 14, 99)] == [
        0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0,
    ]  # fmt: skip
    assert [warm_start(step, start=2, ramp=0) for step in (1, 2, 3)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(("layers", "side"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch_of_the_stated_side(layers: int, side: int):
    judge = PatchDiscriminator(channels=4, layers=layers)
    # GroupNorm sees the whole picture and is not what makes the patch: without it, input gradients show the patch.
    judge.layers = torch.nn.Sequential(*[part for part in judge.layers if not isinstance(part, torch.nn.GroupNorm)])
    picture = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = judge(picture)
    centre = scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2]
    (seen,) = torch.autograd.grad(centre, picture)
    rows = seen.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(rows.max() - rows.min()) + 1 == side


def test_rows_are_judged_alone_and_small_pictures_too():
    torch.manual_seed(0)
    judge = PatchDiscriminator(channels=4)
    pictures = torch.randn(3, 3, 16, 16)
    scores = judge(pictures)
    assert scores.shape == (3, 1, 2, 2)
    torch.testing.assert_close(judge(pictures[1:2]), scores[1:2])

"""The patch discriminator of the tokenizer's adversarial loss (PatchGAN, arXiv 1611.07004; as in VQGAN, 2012.09841).

It judges overlapping patches, not whole pictures, so that it sharpens texture and leaves layout to the reconstruction
loss. Losses are the hinge form; `adaptive_weight` is VQGAN's equation 7, which keeps the adversarial gradient at the
last decoder layer as large as the reconstruction's; `warm_start` is the gate that holds it at zero until
reconstructions are worth judging. LeCAM regularisation (arXiv 2104.03310) steadies it on little data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Pixels [B, 3, H, W] in [-1, 1] -> one score per patch [B, 1, h, w]; positive means real.

    Args:
        channels: width of the first layer; doubled at each further one, at most 8 times.
        layers: strided layers; the patch side grows with them (16 px for 1, 34 px for 2, 70 px for 3).
    """

    def __init__(self, channels: int = 64, layers: int = 2):
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, layers + 1):
            wider = min(channels * 2**layer, channels * 8)
            stride = 2 if layer < layers else 1
            # GroupNorm, not BatchNorm: rows of a batch stay independent, and several processes need no synchronisation.
            parts += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.GroupNorm(1, wider), nn.LeakyReLU(0.2)]
            width = wider
        self.layers = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator on its scores for real and reconstructed pictures; scalar >= 0."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """The decoder's adversarial loss: the negative mean score of its pictures."""
    return -fake.mean()


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """LeCAM regulariser (arXiv 2104.03310, equation 4): pulls scores towards the other side's moving mean (scalars)."""
    return F.relu(real - fake_mean).pow(2).mean() + F.relu(real_mean - fake).pow(2).mean()


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_weight: Tensor, *, ceiling: float = 1e4
) -> Tensor:
    """||grad reconstruction|| / ||grad adversarial|| at the last decoder weight (arXiv 2012.09841, equation 7)."""
    (a,) = torch.autograd.grad(reconstruction, last_weight, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, last_weight, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0.0, ceiling).detach()


def warm_start(step: int, *, start: int, ramp: int) -> float:
    """Share of the adversarial loss at a step: 0 before `start`, then linear to 1 over `ramp` steps."""
    return 0.0 if step < start else min(1.0, (step - start + 1) / max(ramp, 1))

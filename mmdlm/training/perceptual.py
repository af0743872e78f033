"""A perceptual distance from any timm network's features (as LPIPS, arXiv 1801.03924, without its learned weights)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.errors import InputError


class PerceptualDistance(nn.Module):
    """Mean squared distance of unit-length features at every stage of a frozen timm network.

    Args:
        model: a timm name whose weights are in the Hub's cache ("vgg16.tv_in1k"), or "name@/path/to/file.safetensors".

    Raises InputError where no name is given (random features would be a silent substitute for perception), and where
    the weights are not at hand: nothing is downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str | None):
        super().__init__()
        if not model:
            raise InputError(
                "perceptual_weight is above 0 but perceptual_model is empty: name a timm network with weights"
            )
        import timm
        from huggingface_hub import try_to_load_from_cache

        name, _, path = model.partition("@")
        published = None if path else timm.get_pretrained_cfg(name)
        if not path and not any(
            isinstance(try_to_load_from_cache(published.hf_hub_id, file), str)
            for file in ("model.safetensors", "pytorch_model.bin")
            if published and published.hf_hub_id
        ):
            raise InputError(
                f"perceptual_model {model!r} has no weights in the Hub's cache: give NAME@PATH of its safetensors file."
            )
        source = {"pretrained_cfg_overlay": {"file": path}} if path else {}
        try:
            network = timm.create_model(name, pretrained=True, features_only=True, **source)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"perceptual_model {model!r} has no weights at hand ({reason}): give NAME@PATH of its safetensors file."
            ) from error
        self.network = network.eval().requires_grad_(False)
        mean, std = self.network.pretrained_cfg["mean"], self.network.pretrained_cfg["std"]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, made: Tensor, real: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1], twice -> scalar >= 0, with gradient to `made`."""
        both = (torch.cat([made, real]) * 0.5 + 0.5 - self.mean) / self.std
        total = made.new_zeros(())
        for feature in self.network(both):
            a, b = F.normalize(feature, dim=1).chunk(2)
            total = total + (a - b).pow(2).sum(1).mean()
        return total

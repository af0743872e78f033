"""A visual tokenizer with a learned codebook: diffusers' VQModel (VQGAN, arXiv 2012.09841) behind our interface.

Lumina-DiMOO (arXiv 2510.06308) draws with one. A code is the row of the codebook that is nearest to the encoder's
vector. The published model takes pixels in [0, 1]; everything in this library is in [-1, 1], and the step between the
two is taken here, so that this tokenizer stands wherever an LFQTokenizer does.

Shape letters: B pictures, C latent channels, h = H/f, w = W/f with f = 2^(levels - 1).
"""

from __future__ import annotations

import torch
from diffusers import VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from mmdlm.models.visual_tokenizer import check_size


class VQTokenizer(ModelMixin, ConfigMixin):
    """Pictures <-> codes. `save_pretrained` / `from_pretrained` are diffusers', the arguments are VQModel's.

    Args:
        sample_size: side of the pictures it was trained on, in pixels (it takes any multiple of `downsample`).
        block_out_channels, layers_per_block, norm_num_groups, norm_type, act_fn, mid_block_add_attention,
        down_block_types, up_block_types: encoder and decoder, finest level first.
        latent_channels, num_vq_embeddings, vq_embed_dim: C, the number of codes, and channels of a codebook row (None
            for C).
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 3,
        num_vq_embeddings: int = 256,
        vq_embed_dim: int | None = None,
        norm_num_groups: int = 32,
        norm_type: str = "group",
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
    ):
        super().__init__()
        self.vq = VQModel(
            down_block_types=tuple(down_block_types),
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            sample_size=sample_size,
            num_vq_embeddings=num_vq_embeddings,
            norm_num_groups=norm_num_groups,
            vq_embed_dim=vq_embed_dim,
            norm_type=norm_type,
            mid_block_add_attention=mid_block_add_attention,
            lookup_from_codebook=True,
        )

    @property
    def downsample(self) -> int:
        """f: pixels per code along one side."""
        return int(2 ** (len(self.config["block_out_channels"]) - 1))

    @property
    def codebook_size(self) -> int:
        return int(self.config["num_vq_embeddings"])

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> what is looked up in the codebook, [B, C, h, w]; ValueError as `encode`."""
        check_size(pixels, self.downsample)
        found: Tensor = self.vq.encode((pixels + 1) / 2).latents
        return found

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [-1, 1] -> codes int64 [B, h, w]; ValueError where f does not divide H and W."""
        latents = self.latents(pixels).movedim(1, -1)
        # In half precision many rows are equally near, and the CPU cannot measure at all.
        distances = torch.cdist(latents.flatten(0, -2).float(), self.vq.quantize.embedding.weight.float())
        return distances.argmin(-1).view(latents.shape[:-1])

    @torch.no_grad()
    def decode(self, codes: Tensor, *, clamp: bool = True) -> Tensor:
        """codes int64 [B, h, w] -> pixels [B, 3, h*f, w*f] clamped to [-1, 1]; ValueError for a code out of range.

        clamp=False leaves what the last convolution gives, as the published decoder does.
        """
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"image codes span [{int(codes.min())}, {int(codes.max())}], expected [0, {self.codebook_size - 1}]"
            )
        shape = (*codes.shape, self.vq.quantize.vq_embed_dim)
        pixels: Tensor = self.vq.decode(codes, force_not_quantize=True, shape=shape).sample * 2 - 1
        return pixels.clamp(-1, 1) if clamp else pixels

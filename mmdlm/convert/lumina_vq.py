"""The VQ tokenizer that Lumina-DiMOO (arXiv 2510.06308) draws with: diffusers' VQModel, which VQTokenizer holds.

Its sizes are nowhere but in its config.json, which lies beside its weights in the published folder `vqvae`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import VQModel
from torch import Tensor

from mmdlm.convert import key_map
from mmdlm.convert.key_map import Piece, Shapes
from mmdlm.convert.level_names import only, whole_number, whole_numbers
from mmdlm.errors import InputError
from mmdlm.models.vq_tokenizer import VQTokenizer

FAMILY = "VQModel"
_PREFIX = "vq."
_WHERE = "The config.json"
# What VQModel can be told and VQTokenizer is not: three colours, a codebook that is looked up, and numbers that only a
# latent diffusion model reads.
_NOT_OURS = ("in_channels", "out_channels", "lookup_from_codebook", "scaling_factor", "force_upcast")


def build(config: Mapping[str, Any]) -> VQTokenizer:
    """The tokenizer that config.json describes, its weights as they are drawn."""
    return VQTokenizer(**configuration(config))


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """VQModel's config.json -> VQTokenizer's arguments; what it does not say is VQModel's default.

    Raises InputError for other colours than three, a key that VQModel does not know, and sizes that are none.
    """
    defaults = {name: p.default for name, p in inspect.signature(VQModel.__init__).parameters.items() if name != "self"}
    said = {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(said.keys() - defaults.keys()):
        raise InputError(f"{_WHERE} has {unknown[0]!r}, which no VQModel knows: copy or download it again.")
    settings = defaults | said
    only(settings, _WHERE, in_channels=3, out_channels=3)
    whole_numbers(settings, "block_out_channels", _WHERE)
    for key in ("latent_channels", "num_vq_embeddings", "layers_per_block", "norm_num_groups"):
        whole_number(settings, key, _WHERE)
    levels = len(settings["block_out_channels"])
    for key in ("down_block_types", "up_block_types"):
        if len(settings[key]) != levels:
            raise InputError(f"{_WHERE} has {len(settings[key])} {key}, expected {levels} as block_out_channels has.")
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.items()
        if name not in _NOT_OURS
    }


def published_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """VQTokenizer's config -> VQModel's config.json."""
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.items()
        if not name.startswith("_")
    }
    return {"_class_name": FAMILY, "in_channels": 3, "out_channels": 3, "lookup_from_codebook": True} | settings


def pieces(shapes: Shapes) -> list[Piece]:
    """Every published tensor: ours without the name of the part that holds them."""
    return [Piece(name.removeprefix(_PREFIX), shape, name) for name, shape in shapes.items()]


def to_mmdlm(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Published tensors -> ours. InputError for missing, unknown or misshapen ones."""
    return key_map.to_mmdlm(state, pieces(shapes), shapes)


def from_mmdlm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> published tensors."""
    return key_map.from_mmdlm(state, pieces({name: tuple(tensor.shape) for name, tensor in state.items()}))

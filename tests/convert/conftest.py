"""Tiny checkpoints of random weights in published formats, on disk as people have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

Writer = Callable[..., Path]

LLADA: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "block_type": "llama",
    "d_model": 32,
    "embedding_size": 72,
    "eos_token_id": 60,
    "bias_for_layer_norm": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "layer_norm_type": "rms",
    "mask_token_id": 61,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 60,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 10000.0,
    "vocab_size": 70,
    "weight_tying": False,
}


def llada_state(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights under LLaDA's names, written down here and not asked of the code under test."""
    chance = torch.Generator().manual_seed(0)
    width, inner = config["d_model"], config["mlp_hidden_size"]
    keys = width // config["n_heads"] * config["n_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (config["embedding_size"], width), "ln_f.weight": (width,)}
    for layer in range(config["n_layers"]):
        shapes |= {
            f"blocks.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (width,),
                "ff_norm": (width,),
                "q_proj": (width, width),
                "k_proj": (keys, width),
                "v_proj": (keys, width),
                "attn_out": (width, width),
                "ff_proj": (inner, width),
                "up_proj": (inner, width),
                "ff_out": (width, inner),
            }.items()
        }
    if not config["weight_tying"]:
        shapes["ff_out.weight"] = (config["embedding_size"], width)
    return {
        f"model.transformer.{name}": (torch.randn(shape, generator=chance) * 0.2 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture
def make_llada() -> Callable[..., tuple[dict[str, Any], dict[str, Tensor]]]:
    """make_llada(key=value ..., dtype=...) -> a LLaDA whose config.json says so: (config.json, tensors)."""

    def make(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = LLADA | changes
        return config, llada_state(config, dtype)

    return make


@pytest.fixture
def llada() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A LLaDA of two layers: (config.json, tensors)."""
    return dict(LLADA), llada_state(LLADA)


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """write(config, *shards) -> a directory with config.json and one safetensors file, or several with an index."""

    def write(config: dict[str, Any], *shards: dict[str, Tensor], name: str = "published") -> Path:
        directory = tmp_path / name
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        if len(shards) == 1:
            save_file(shards[0], directory / "model.safetensors")
            return directory
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            save_file(shard, directory / file)
            weight_map |= dict.fromkeys(shard, file)
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory

    return write


@pytest.fixture
def text_tokenizer() -> Any:
    """A byte-level tokenizer of 265 entries, its special words first."""
    from mmdlm.text_tokenizer import train_text_tokenizer

    return train_text_tokenizer(["a"], 265)

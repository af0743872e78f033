"""LLaDA (Base, Instruct, 1.5), and the layout that MMaDA and Lumina-DiMOO share with it: a Llama under other names.

    model.transformer.wte, blocks.N.*, ln_f, ff_out  ->  trunk.embed_tokens, layers.N.*, norm, head

LLaDA (arXiv:2502.09992) is built from OLMo's blocks. Its own checkpoints have `block_type` "llama": separate
projections and `ff_out(silu(ff_proj x) * up_proj x)`. OLMo's "sequential" blocks fuse q, k, v into `att_proj`, and the
two halves of SwiGLU into `ff_proj` as [up; gate]. Both are plain Llamas; what no Llama can do is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary, token_id
from mmdlm.convert.key_map import Piece, Shapes, whole
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictorConfig
from mmdlm.vocabulary import Vocabulary

FAMILY = "LLaDA"
PUBLISHED_ROWS = 126464
# generate.py of LLaDA and its tokenizer: none of these but the mask is in every published config.json
PUBLISHED_IDS = {"mask_id": 126336, "bos_id": 126080, "eos_id": 126081, "pad_id": 126081}
PUBLISHED_TEXT_SIZE = 126349
# What decides the shapes of LLaDA-8B, as its config.json has it: for questions about it without its files.
PUBLISHED_CONFIG: dict[str, Any] = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "activation_type": "silu",
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": PUBLISHED_ROWS,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-5,
    "rope": True,
    "rope_theta": 500000.0,
    "vocab_size": PUBLISHED_ROWS,
    "weight_tying": False,
}

_NEEDED = ("d_model", "n_heads", "n_layers", "max_sequence_length", "rms_norm_eps", "rope_theta", "weight_tying")
# What the layout can only be when it is a Llama: key -> values that are fine, absence included.
_ONLY: dict[str, tuple[Any, ...]] = {
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True, None),
    "attention_layer_norm": (False, None),
    "alibi": (False, None),
    "rope": (True,),
    "input_emb_norm": (False, None),
    "scale_logits": (False, None),
    "clip_qkv": (None,),
    "norm_after": (False, None),
}


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """LLaDA's config.json -> ours. `text_length` is the tokenizer's, `vocabulary` overrides single ids.

    Raises InputError for a key that is missing, a block that is no Llama's, and ids that do not fit.
    """
    rows = table_rows(config)
    published = PUBLISHED_IDS if rows == PUBLISHED_ROWS else {}
    known = {
        **published,
        **ids_from_config(config),
        "text_size": text_length or (PUBLISHED_TEXT_SIZE if published else None),
    }
    return predictor_config(config, text_vocabulary(rows, known, vocabulary or {}, FAMILY), "llada")


def ids_from_config(config: Mapping[str, Any]) -> dict[str, int]:
    """The special ids that config.json names."""
    names = {"mask_id": "mask_token_id", "bos_id": "bos_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}
    found = {ours: token_id(config, theirs) for ours, theirs in names.items()}
    return {name: value for name, value in found.items() if value is not None}


def table_rows(config: Mapping[str, Any]) -> int:
    """Rows of the embedding: `embedding_size` where the table is padded, else `vocab_size`."""
    rows = config.get("embedding_size") or config.get("vocab_size")
    if not isinstance(rows, int):
        raise InputError("The config.json has neither embedding_size nor vocab_size: copy or download it again.")
    return rows


def predictor_config(config: Mapping[str, Any], vocabulary: Vocabulary, family: str) -> MaskPredictorConfig:
    """The mask predictor of a config.json in LLaDA's form. Raises InputError for what is no Llama."""
    _check(config)
    heads, width = int(config["n_heads"]), int(config["d_model"])
    one_head = config.get("multi_query_attention")
    key_heads = config.get("n_kv_heads") or (1 if one_head else heads)
    inner = int(config.get("mlp_hidden_size") or config.get("mlp_ratio", 4) * width)
    qkv_only = bool(config.get("include_qkv_bias")) and not config.get("include_bias")
    trunk: dict[str, Any] = {
        # Qwen2 is a Llama whose q, k and v have a bias and whose o has none.
        "model_type": "qwen2" if qkv_only else "llama",
        "hidden_size": width,
        "intermediate_size": inner // 2 if is_fused(config) else inner,
        "num_hidden_layers": int(config["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(key_heads),
        "max_position_embeddings": int(config["max_sequence_length"]),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config["rope_theta"])},
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "initializer_range": float(config.get("init_std") or 0.02),
        "hidden_act": "silu",
    }
    if config.get("include_bias"):
        trunk |= {"attention_bias": True, "mlp_bias": True}
    return MaskPredictorConfig(
        trunk=trunk,
        vocabulary=vocabulary.to_dict(),
        max_positions=int(config["max_sequence_length"]),
        tie_word_embeddings=bool(config["weight_tying"]),
        published={"family": family, "config": dict(config)},
    )


def is_fused(config: Mapping[str, Any]) -> bool:
    """Whether q, k, v and the two halves of the MLP are one matrix each (OLMo's sequential block)."""
    return config.get("block_type") == "sequential"


def _check(config: Mapping[str, Any]) -> None:
    if missing := [key for key in _NEEDED if config.get(key) is None]:
        raise InputError(f"The config.json lacks {', '.join(missing)}: copy or download it again.")
    kind, activation = config.get("block_type"), config.get("activation_type")
    if (kind, activation) not in (("llama", "silu"), ("sequential", "swiglu")):
        raise InputError(
            f"The config.json has block_type {kind!r} with activation_type {activation!r}, expected 'llama' with "
            "'silu' or 'sequential' with 'swiglu': other blocks are no Llama and cannot be run here."
        )
    for key, fine in _ONLY.items():
        if config.get(key) not in fine:
            raise InputError(
                f"The config.json has {key} {config.get(key)!r}, expected {fine[0]!r}: with it the model is no Llama "
                "and cannot be run here."
            )
    norm_bias = config.get("bias_for_layer_norm")
    if norm_bias or (norm_bias is None and config.get("include_bias")):
        raise InputError("The config.json asks for a bias in its norms (bias_for_layer_norm), which no Llama has.")
    if config.get("include_bias") and not config["weight_tying"]:
        raise InputError("The config.json asks for a bias in its output layer (include_bias), which is not supported.")


_WHOLE = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "attn_out": "self_attn.o_proj",
    "ff_out": "mlp.down_proj",
}
_SEPARATE = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
}
_FUSED = {
    "att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ff_proj": ("mlp.up_proj", "mlp.gate_proj"),  # OLMo's SwiGLU: the second half is the gate
}


def pieces(config: MaskPredictorConfig, shapes: Shapes) -> list[Piece]:
    """Every published tensor of the model that `config` describes; `shapes` are those of our tensors."""
    assert config.published is not None
    theirs, top = config.published["config"], "model.transformer."
    group = int(theirs.get("block_group_size") or 1)
    found = [whole(f"{top}wte.weight", "trunk.embed_tokens.weight", shapes)]
    for layer in range(config.trunk["num_hidden_layers"]):
        block = f"blocks.{layer}" if group == 1 else f"block_groups.{layer // group}.{layer % group}"
        found += _block_pieces(f"{top}{block}.", f"trunk.layers.{layer}.", is_fused(theirs), shapes)
    found.append(whole(f"{top}ln_f.weight", "trunk.norm.weight", shapes))
    if not config.tie_word_embeddings:
        found.append(whole(f"{top}ff_out.weight", "head.weight", shapes))
    return found


def _block_pieces(source: str, target: str, fused: bool, shapes: Shapes) -> list[Piece]:
    """The pieces of one block; biases are taken along wherever our layer has them."""
    found = []
    for theirs, ours in (_WHOLE if fused else _WHOLE | _SEPARATE).items():
        for kind in ("weight", "bias"):
            if f"{target}{ours}.{kind}" in shapes:
                found.append(whole(f"{source}{theirs}.{kind}", f"{target}{ours}.{kind}", shapes))
    for theirs, parts in (_FUSED if fused else {}).items():
        for kind in ("weight", "bias"):
            names = [f"{target}{ours}.{kind}" for ours in parts]
            if names[0] not in shapes:
                continue
            total, first = sum(shapes[name][0] for name in names), 0
            for name in names:
                stop = first + shapes[name][0]
                shape = (total, *shapes[name][1:])
                found.append(Piece(f"{source}{theirs}.{kind}", shape, name, (slice(first, stop),)))
                first = stop
    return found

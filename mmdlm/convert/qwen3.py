"""Qwen3 and Qwen3-MoE as starting points: autoregressive weights in transformers' own layout, run bidirectionally.

    model.embed_tokens, model.layers.N.*, model.norm, lm_head  ->  trunk.*, head

What is trained from here keeps the shift it was born with (`prediction_offset` 1, as Dream, arXiv:2508.15487): place p
is predicted from the hidden state at p - 1. There is no mask word: the first unused row of the table becomes it.

A mixture of experts lies in the files as one matrix per expert and projection; transformers 5 computes with stacked
ones, gate and up in one, so each published matrix is a region of ours. SDAR, Dream, Fast-dLLM v2 and LLaDA-V's trunk
share this layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary
from mmdlm.convert.key_map import Piece, Shapes, whole
from mmdlm.convert.llada import ids_from_config
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictorConfig
from mmdlm.vocabulary import Vocabulary

FAMILY = "Qwen3"
_NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_NEEDED_TOO = ("max_position_embeddings", "rms_norm_eps")
_TAKEN = (*_NEEDED[:-1], *_NEEDED_TOO, "hidden_act", "initializer_range", "attention_dropout")
# Only where the family's trunk has them: a Qwen2 has a fixed pattern of biases and no head_dim of its own.
_TAKEN_BY = {
    "qwen2": (),
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "qwen3": ("attention_bias", "head_dim"),
    "qwen3_moe": (
        "attention_bias",
        "head_dim",
        "decoder_sparse_step",
        "mlp_only_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_experts_per_tok",
    ),
}


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """Qwen3's or Qwen3-MoE's config.json -> ours. `text_length` is the tokenizer's, `vocabulary` overrides single ids.

    Raises InputError for a key that is missing or cannot be run here, and where no row is free for the mask.
    """
    rows = decoder_rows(config)
    known = {**ids_from_config(config), "text_size": text_length}
    if "mask_id" not in known and text_length is not None and text_length < rows:
        known["mask_id"] = text_length
    return decoder_config(
        config,
        text_vocabulary(rows, known, vocabulary or {}, FAMILY),
        "qwen3",
        trunk_type=str(config["model_type"]),
        prediction_offset=1,
    )


def decoder_rows(config: Mapping[str, Any]) -> int:
    """Rows of the embedding. Raises InputError for a config.json that lacks what every decoder has."""
    if missing := [key for key in (*_NEEDED, *_NEEDED_TOO) if config.get(key) is None]:
        raise InputError(f"The config.json lacks {', '.join(missing)}: copy or download it again.")
    return int(config["vocab_size"])


def decoder_config(
    config: Mapping[str, Any],
    vocabulary: Vocabulary,
    family: str,
    *,
    trunk_type: str,
    prediction_offset: int = 0,
    block_length: int = 0,
) -> MaskPredictorConfig:
    """The mask predictor of a config.json in transformers' form, for a trunk of `trunk_type`.

    Raises InputError for attention over a sliding window, which no bidirectional model here has.
    """
    if config.get("use_sliding_window"):
        raise InputError(
            "The config.json has use_sliding_window true, expected false: a model that fills in whole rows sees them."
        )
    trunk: dict[str, Any] = {"model_type": trunk_type, "rope_parameters": rope_parameters(config)}
    for key in (*_TAKEN, *_TAKEN_BY[trunk_type]):
        if config.get(key) is not None:
            trunk[key] = config[key]
    if trunk_type == "qwen3_moe":
        trunk["num_experts"] = expert_count(config)
    trunk["num_key_value_heads"] = config.get("num_key_value_heads") or config["num_attention_heads"]
    return MaskPredictorConfig(
        trunk=trunk,
        vocabulary=vocabulary.to_dict(),
        max_positions=int(config["max_position_embeddings"]),
        prediction_offset=prediction_offset,
        block_length=block_length,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        published={"family": family, "config": dict(config)},
    )


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a layer, under Qwen's name or the one transformers 5 saves; 0 where there are none."""
    return int(config.get("num_experts") or config.get("num_local_experts") or 0)


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's parameters, in transformers 5's form, from either form."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    if "rope_theta" not in found:
        if config.get("rope_theta") is None:
            raise InputError("The config.json lacks rope_theta: copy or download it again.")
        found["rope_theta"] = config["rope_theta"]
    return found


def pieces(config: MaskPredictorConfig, shapes: Shapes) -> list[Piece]:
    """Every published tensor of the model that `config` describes; `shapes` are those of our tensors."""
    found: list[Piece] = []
    for target in shapes:
        if target == "head.weight":
            if not config.tie_word_embeddings:
                found.append(whole("lm_head.weight", target, shapes))
            continue
        source = target.replace("trunk.", "model.", 1)
        if ".mlp.experts." in target:
            found += _expert_pieces(source, target, shapes)
        else:
            found.append(whole(source, target, shapes))
    return found


def _expert_pieces(source: str, target: str, shapes: Shapes) -> list[Piece]:
    """experts.gate_up_proj [E, 2 I, D] and experts.down_proj [E, D, I] -> one matrix per expert and projection."""
    experts, rows, columns = shapes[target]
    stem, leaf = source.rsplit(".", 1)
    if leaf == "down_proj":
        return [
            Piece(f"{stem}.{number}.down_proj.weight", (rows, columns), target, (), (number,))
            for number in range(experts)
        ]
    half = rows // 2
    return [
        Piece(f"{stem}.{number}.{name}.weight", (half, columns), target, (), (number, region))
        for number in range(experts)
        for name, region in (("gate_proj", slice(0, half)), ("up_proj", slice(half, rows)))
    ]

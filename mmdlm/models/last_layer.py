"""The last layer only where it is read: every place's keys and values, but queries and MLP of the asked places.

Nothing comes after the last layer, so what it makes of a place that nobody asks about is thrown away. The layers before
it run through transformers' own forward; the last one by the few lines below, for the decoders whose layer is known to
be that (pre-norm, rotary, full attention: `KNOWN_LAYERS`). Any other trunk, a layer with hooks on it (sharded,
offloaded) and any attention but sdpa and eager runs whole, which is the slow twin.

Shape letters: B rows, M places, Q places computed in this pass, W read places, D width, H heads, d their width.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mmdlm.models.attention_masks import mask_of_kind
from mmdlm.models.fused import by_itself
from mmdlm.models.slot_cache import SlotCache

# transformers' decoder layers of this very form: x + attention(norm(x)), then x + mlp(norm(x))
KNOWN_LAYERS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "Qwen3MoeDecoderLayer")


def can_read_some(trunk: Any) -> bool:
    """Whether `read_last_layer` computes what this trunk's own forward does."""
    layers = getattr(trunk, "layers", None)
    if not layers or trunk.training or trunk.config._attn_implementation not in ("sdpa", "eager"):
        return False
    layer, home = layers[-1], type(trunk).__module__
    known = home.startswith("transformers.models.") and type(layer).__module__ == home
    touched = any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in (trunk, layer))
    full = getattr(layer.self_attn, "sliding_window", None) is None
    return known and type(layer).__name__ in KNOWN_LAYERS and not touched and full


def read_last_layer(
    trunk: Any,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: SlotCache | None,
    read: Tensor,
) -> Tensor:
    """The trunk over hidden [B, Q, D], read off at `read` int [B, W] (of the Q, the same one as often as one likes).

    attention_mask: None, or bool or float [B, 1, 1 or Q, M]; position_ids [B, Q]. Returns [B, W, D], after the final
    norm. Without gradients; `can_read_some` has been asked.
    """
    kind = trunk.config._attn_implementation
    # a trunk that has all but its last layer; it shares every module with the real one
    shorter = copy.copy(trunk)
    shorter._modules = {**trunk._modules, "layers": trunk.layers[:-1], "norm": nn.Identity()}
    before = shorter(
        inputs_embeds=hidden,
        attention_mask=None if attention_mask is None else mask_of_kind(attention_mask, kind, hidden),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=False,
    ).last_hidden_state
    if position_ids is None:
        position_ids = torch.arange(hidden.shape[1], device=hidden.device).unsqueeze(0)
    cosine, sine = trunk.rotary_emb(before, position_ids)

    def asked(part: Tensor) -> Tensor:
        return part.expand(len(read), *part.shape[1:]).gather(1, read.unsqueeze(-1).expand(-1, -1, part.shape[-1]))

    layer = trunk.layers[-1]
    attention, here = layer.self_attn, sys.modules[type(layer).__module__]
    normed, residual = layer.input_layernorm(before), asked(before)
    heads = (*before.shape[:2], -1, attention.head_dim)
    queries = by_itself(attention.q_proj, asked(normed)).view(*read.shape, -1, attention.head_dim)
    keys, values = attention.k_proj(normed).view(heads), attention.v_proj(normed).view(heads).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
    queries, _ = here.apply_rotary_pos_emb(queries, queries[:, :0], asked(cosine), asked(sine))
    _, keys = here.apply_rotary_pos_emb(keys[:, :0], keys, cosine, sine)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    if attention_mask is not None:
        if attention_mask.shape[2] > 1:
            rows = read[:, None, :, None].expand(-1, 1, -1, attention_mask.shape[3])
            attention_mask = attention_mask.expand(len(read), -1, -1, -1).gather(2, rows)
        attention_mask = mask_of_kind(attention_mask, kind, residual)
    attend = here.ALL_ATTENTION_FUNCTIONS.get_interface(kind, here.eager_attention_forward)
    mixed, _ = attend(
        attention, queries, keys, values, attention_mask, dropout=0.0, scaling=attention.scaling, is_causal=False
    )
    found = residual + attention.o_proj(mixed.reshape(*read.shape, -1))
    out: Tensor = trunk.norm(found + layer.mlp(layer.post_attention_layernorm(found)))
    return out

"""Every family's names and numbers: round trips, fused layouts, transformers' own logits, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from mmdlm.convert import configuration, from_mmdlm, to_mmdlm
from mmdlm.convert.families import empty_model, family_of
from mmdlm.convert.llada import PUBLISHED_CONFIG as LLADA_8B
from mmdlm.convert.mmada import PUBLISHED_CONFIG as MMADA_8B
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor

TINY = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
# config.json in the form transformers 4 wrote, which is what is published
PUBLISHED = TINY | {"rope_theta": 1e6, "rope_scaling": None, "use_sliding_window": False, "mask_token_id": 61}
OWN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "head_dim": 8,
}
# family -> (model_type, what config.json says beside PUBLISHED, transformers' own model of these weights, the shift)
DECODERS: dict[str, tuple[dict[str, Any], Any, int]] = {
    "dream": ({"model_type": "Dream"}, Qwen2Config(**TINY, **OWN_ROPE), 1),
    "fast_dllm": ({"model_type": "Fast_dLLM_Qwen", "bd_size": 8}, Qwen2Config(**TINY, **OWN_ROPE), 1),
    "tied": (
        {"model_type": "Fast_dLLM_Qwen", "tie_word_embeddings": True},
        Qwen2Config(**TINY, **OWN_ROPE, tie_word_embeddings=True),
        1,
    ),
    "sdar": ({"model_type": "sdar", "block_size": 4, "head_dim": 16}, Qwen3Config(**TINY, **OWN_ROPE, head_dim=16), 0),
    "qwen3": ({"model_type": "qwen3", "head_dim": 8}, Qwen3Config(**TINY, **OWN_ROPE, head_dim=8), 1),
    "qwen3_moe": ({"model_type": "qwen3_moe"} | EXPERTS, Qwen3MoeConfig(**TINY, **OWN_ROPE, **EXPERTS), 1),
}


def reference(config: Any) -> PreTrainedModel:
    """transformers' own autoregressive model, weights well above the usual 0.02 so that a difference is no rounding."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def published_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors as they lie in a published file: experts one by one, a tied head left out."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for number, expert in enumerate(value):
                gate, up = expert.chunk(2)
                found[name.replace("gate_up_proj", f"{number}.gate_proj.weight")] = gate.clone()
                found[name.replace("gate_up_proj", f"{number}.up_proj.weight")] = up.clone()
        elif name.endswith("experts.down_proj"):
            for number, expert in enumerate(value):
                found[name.replace("down_proj", f"{number}.down_proj.weight")] = expert.clone()
        elif not (name == "lm_head.weight" and model.config.tie_word_embeddings):
            found[name] = value
    return found


def filled(state: dict[str, Tensor], config: Any) -> MaskPredictor:
    model = MaskPredictor(config).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"head.weight"}
    model.tie_weights()
    return model


def test_a_llama_block_fused_or_apart_is_the_same_model(llada):
    config, state = llada
    fused: dict[str, Tensor] = {}
    for name, value in state.items():
        stem, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "q_proj":
            parts = [state[f"{stem}.{part}.weight"] for part in ("q_proj", "k_proj", "v_proj")]
            fused[f"{stem}.att_proj.weight"] = torch.cat(parts)
        elif leaf == "up_proj":  # OLMo's SwiGLU multiplies the first half by silu of the second
            fused[f"{stem}.ff_proj.weight"] = torch.cat([value, state[f"{stem}.ff_proj.weight"]])
        elif leaf not in ("k_proj", "v_proj", "ff_proj"):
            fused[name] = value
    sequential = config | {"block_type": "sequential", "activation_type": "swiglu", "mlp_hidden_size": 96}
    apart, _ = to_mmdlm(state, config)
    together, ours = to_mmdlm(fused, sequential)
    assert apart.keys() == together.keys()
    assert all(torch.equal(apart[name], together[name]) for name in apart)
    back, config_back = from_mmdlm(together, ours)
    assert config_back == sequential and back.keys() == fused.keys()
    assert all(torch.equal(back[name], fused[name]) for name in fused)


def test_a_group_of_blocks_is_named_by_group_and_place(llada):
    config, state = llada
    grouped = {name.replace("blocks.", "block_groups.0."): value for name, value in state.items()}
    plain, _ = to_mmdlm(state, config)
    found, ours = to_mmdlm(grouped, config | {"block_group_size": 2})
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert from_mmdlm(found, ours)[0].keys() == grouped.keys()


@pytest.mark.parametrize("change", [{}, {"weight_tying": True}, {"multi_query_attention": True, "n_kv_heads": 1}])
def test_llada_there_and_back_and_there_again(make_llada, change):
    config, state = make_llada(torch.bfloat16, **change)
    ours, our_config = to_mmdlm(state, config)
    back, config_back = from_mmdlm(ours, our_config)
    again, _ = to_mmdlm(back, config_back)
    assert config_back == config and back.keys() == state.keys() and again.keys() == ours.keys()
    assert all(back[name].dtype == torch.bfloat16 and torch.equal(back[name], state[name]) for name in state)
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_a_bias_of_q_k_and_v_alone_is_a_qwen2s(llada):
    config, state = llada
    config["include_qkv_bias"] = True
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
    biases = {
        f"model.transformer.blocks.{layer}.{name}.bias": torch.full((size,), float(layer))
        for layer in range(2)
        for name, size in sizes.items()
    }
    ours, our_config = to_mmdlm(state | biases, config)
    assert our_config.trunk["model_type"] == "qwen2"
    assert torch.equal(ours["trunk.layers.1.self_attn.k_proj.bias"], torch.ones(16))
    filled(ours, our_config)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_a_decoder_gives_transformers_own_logits(family):
    extra, own_config, offset = DECODERS[family]
    model = reference(own_config)
    state, config = published_state(model), PUBLISHED | extra
    ours, our_config = to_mmdlm(state, config)
    assert our_config.prediction_offset == offset
    assert our_config.block_length == {"fast_dllm": 8, "sdar": 4, "tied": 32}.get(family, 0)
    ids = torch.randint(0, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    found = filled(ours, our_config)(ids, attention_mask=causal).logits
    assert torch.equal(found[:, offset:], model(ids).logits[:, : 12 - offset])
    back, config_back = from_mmdlm(ours, our_config)
    assert config_back == config and back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_llada_v_is_the_language_trunk_in_transformers_names():
    names = {"model_type": "llava_llada", "architectures": ["LlavaLLaDAModelLM"]}
    config = configuration(PUBLISHED | {"rope_theta": 5e5, "tie_word_embeddings": False} | names)
    assert config.published is not None and config.published["family"] == "llada_v"
    assert config.trunk["model_type"] == "llama" and config.prediction_offset == 0


def test_image_codes_start_at_the_tokenizers_length_and_not_at_the_padded_table():
    vocabulary = configuration(MMADA_8B).shared_vocabulary
    assert vocabulary.image_columns == (126349, 126349 + 8192)
    assert vocabulary.table_rows == 134656 and (vocabulary.mask_id, vocabulary.boi_id) == (126336, 126084)
    with pytest.raises(InputError, match="has 126350 entries, MMaDA's has 126349"):
        configuration(MMADA_8B, text_length=126350)
    lumina = MMADA_8B | {"model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"]}
    assert configuration(lumina).shared_vocabulary.image_start == 126356
    assert configuration(LLADA_8B).shared_vocabulary.size == 126464


def test_a_small_mmada_without_a_tokenizer_is_asked_where_its_codes_start(llada):
    config = llada[0] | {"model_type": "mmada", "codebook_size": 8}
    with pytest.raises(InputError, match="image_start is unknown"):
        configuration(config)
    assert configuration(config, text_length=63).shared_vocabulary.image_columns == (63, 71)
    assert configuration(config, vocabulary={"text_size": 62}).shared_vocabulary.image_columns == (62, 70)
    with pytest.raises(InputError, match="has the wrong length"):
        configuration(config, text_length=65)  # 65 + 8 codes do not go into 72 rows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_type": "llama", "activation_type": "swiglu"}, "block_type 'llama' with activation_type 'swiglu'"),
        ({"layer_norm_type": "default"}, "layer_norm_type 'default', expected 'rms'"),
        ({"attention_layer_norm": True}, "attention_layer_norm True"),
        ({"rope": False}, "rope False"),
        ({"alibi": True}, "alibi True"),
        ({"scale_logits": True}, "scale_logits True"),
        ({"input_emb_norm": True}, "input_emb_norm True"),
        ({"bias_for_layer_norm": True}, "bias in its norms"),
        ({"include_bias": True}, "bias in its output layer"),
        ({"d_model": None}, "lacks d_model"),
        ({"mask_token_id": None}, "no mask_token_id"),
        ({"mask_token_id": 90}, "do not fit together"),
    ],
)
def test_what_no_llama_can_do_is_refused_by_name(llada, change, says):
    with pytest.raises(InputError, match=says):
        configuration(llada[0] | change)


def test_sliding_windows_and_unknown_formats_are_refused():
    with pytest.raises(InputError, match="use_sliding_window true"):
        configuration(PUBLISHED | {"model_type": "Dream", "use_sliding_window": True})
    with pytest.raises(InputError, match="lacks rms_norm_eps"):
        configuration({**PUBLISHED, "model_type": "Dream", "rms_norm_eps": None})
    with pytest.raises(InputError, match="unknown format, model_type 'gpt2'"):
        family_of({"model_type": "gpt2"})


def test_a_qwen3_gets_the_first_unused_row_as_its_mask():
    config = {**PUBLISHED, "model_type": "qwen3", "mask_token_id": None}
    assert configuration(config, text_length=70).shared_vocabulary.mask_id == 70
    with pytest.raises(InputError, match="no mask_token_id"):
        configuration(config)


def test_a_model_of_our_own_has_no_published_format(llada):
    config = configuration(llada[0])
    config.published = None
    with pytest.raises(InputError, match="not made from a published one"):
        from_mmdlm(empty_model(config).state_dict(), config)

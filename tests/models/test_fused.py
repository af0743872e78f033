"""Fused products equal separate ones, act only where they may, and leave the saved model as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmdlm.models.adapters import add_lora
from mmdlm.models.fused import fuse_projections, unfuse_projections
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=20, image_start=24, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
IDS = torch.tensor([[2, 9, 1, 1, 25, 31], [2, 17, 1, 1, 38, 24]])
WHERE = torch.tensor([[2, 3], [3, 2]])


def tiny(family: str = "llama") -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": family, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
    model = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=VOCABULARY.to_dict(), max_positions=32))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@torch.no_grad()
def logits(model: MaskPredictor, **settings: bool) -> Tensor:
    found = model(IDS, where=WHERE, **settings).logits
    assert found is not None
    return found


def products(model: MaskPredictor) -> int:
    """Matrix products of one whole pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        logits(model, narrow=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])  # qwen2 has biases
def test_fused_equals_separate_and_nothing_is_computed_twice(family: str):
    model = tiny(family)
    whole, narrow, work = logits(model, narrow=False), logits(model), products(model)
    assert fuse_projections(model) == 4
    torch.testing.assert_close(logits(model, narrow=False), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(model), narrow, rtol=1e-9, atol=1e-9)
    assert products(model) == work
    assert fuse_projections(model) == 4  # again
    unfuse_projections(model)
    assert torch.equal(logits(model, narrow=False), whole)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_saved_model_and_what_is_loaded_into_it_are_the_same(tmp_path: Path):
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "separate")
    fuse_projections(model)
    model.save_pretrained(tmp_path / "fused")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("separate", "fused")]
    assert files[0] == files[1]
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    other = tiny("llama")
    nn.init.normal_(other.trunk.layers[0].self_attn.q_proj.weight)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-9, atol=1e-9)
    copied = copy.deepcopy(model)
    nn.init.zeros_(copied.trunk.layers[0].self_attn.v_proj.weight)
    torch.testing.assert_close(logits(model), logits(other), rtol=1e-9, atol=1e-9)  # the copy is no part of it


def test_a_model_that_was_cast_or_written_to_since_is_right():
    model = tiny()
    fuse_projections(model)
    with torch.no_grad():
        model.trunk.layers[1].mlp.up_proj.weight.mul_(2)  # writes into the whole
    model.trunk.layers[1].self_attn.k_proj.weight = nn.Parameter(torch.ones(16, 32).double())  # does not
    plain = tiny()
    with torch.no_grad():
        plain.trunk.layers[1].mlp.up_proj.weight.mul_(2)
        plain.trunk.layers[1].self_attn.k_proj.weight.fill_(1)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits(model.float()), logits(plain.float()), rtol=1e-4, atol=1e-4)


def test_gradients_go_to_the_separate_weights():
    found = []
    for model in (tiny(), tiny()):
        if found:
            assert fuse_projections(model) == 4
        model(IDS, where=WHERE).logits.logsumexp(-1).sum().backward()
        found.append([parameter.grad for parameter in model.trunk.layers[0].parameters()])
    for separate, fused in zip(*found, strict=True):
        assert torch.equal(separate, fused)


def test_groups_with_an_adapter_or_another_kind_of_layer_are_left_alone():
    model = tiny()
    add_lora(model, rank=2, targets=["q_proj"])
    assert fuse_projections(model) == 2  # gate and up
    model = tiny()
    model.trunk.layers[0].mlp.gate_proj = type("Quantised", (nn.Linear,), {})(32, 48, bias=False).double()
    assert fuse_projections(model) == 3
    model = tiny()
    model.trunk.layers[0].mlp.gate_proj.weight = model.trunk.layers[0].mlp.up_proj.weight
    assert fuse_projections(model) == 3
    plain, later = tiny(), tiny()
    fuse_projections(later)
    for one in (plain, later):  # an adapter that comes after
        torch.manual_seed(1)
        add_lora(one, rank=2, targets=["q_proj", "up_proj"])
        for name, parameter in one.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        one.eval()
    torch.testing.assert_close(logits(later), logits(plain), rtol=1e-9, atol=1e-9)

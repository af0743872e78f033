"""The last layer where it is read equals the whole one: every trunk it knows, every mask, folded, offset and cached. It
stays whole where it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.models.last_layer import can_read_some
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.slot_cache import SlotCache
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=20, image_start=24, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
TRUNK = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
# text, a 4 x 2 picture, text: 14 places, 8 folded ones
GRID = torch.tensor([[-1, -1]] * 3 + [[row, column] for row in range(4) for column in range(2)] + [[-1, -1]] * 3)
IDS = torch.tensor([[2, 9, 4, 25, 39, 1, 1, 30, 31, 1, 26, 5, 1, 12], [2, 17, 4, 38, 1, 1, 1, 30, 24, 1, 27, 5, 1, 1]])
WHERE = torch.tensor([[12, 3, 3, 9], [6, 13, 4, 5]])  # in any order, and twice the same


def tiny(family: str = "llama", **settings: Any) -> MaskPredictor:
    torch.manual_seed(0)
    trunk = TRUNK | {"model_type": family} | (EXPERTS if family == "qwen3_moe" else {})
    config = {"trunk": trunk, "vocabulary": VOCABULARY.to_dict(), "max_positions": 32} | settings
    model = MaskPredictor(MaskPredictorConfig(**config)).double().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


def both(model: MaskPredictor, ids: Tensor = IDS, **settings: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Logits narrow and whole, and how many places the last layer's MLP saw in each."""
    seen: list[int] = []
    hook = model.trunk.layers[-1].mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    with torch.no_grad():
        found = [model(ids, narrow=narrow, **settings).logits for narrow in (True, False)]
    hook.remove()
    return found[0], found[1], seen


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_it_equals_the_whole_layer_whatever_the_trunk_and_the_mask(family: str, attention: str):
    model = tiny(family)
    close = {"rtol": 1e-9, "atol": 1e-9}
    if family == "qwen3_moe":  # its grouped products know no float64
        model, close = model.float(), {"rtol": 1e-4, "atol": 1e-4}
    model.set_attn_implementation(attention)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[0, 13] = False
    each = torch.ones(14, 14, dtype=torch.bool).tril(9).expand(2, 1, 14, 14)
    added = torch.where(each, 0.0, -3.0).double()
    positions = torch.arange(14).expand(2, 14) * 2
    for mask in (None, valid[:, None, None], each, added):
        for places in (None, positions):
            narrow, whole, seen = both(model, where=WHERE, attention_mask=mask, position_ids=places)
            torch.testing.assert_close(narrow, whole, **close)
            assert seen == [4, 14]


@pytest.mark.parametrize("settings", [
    {"prediction_offset": 1}, {"image_side": 4, "code_bits": 4}, {"image_side": 4, "code_bits": 4, "image_fold": 2},
], ids=["offset", "placed", "folded"])  # fmt: skip
def test_it_equals_the_whole_layer_folded_and_with_an_offset(settings: dict[str, int]):
    model = tiny(**settings)
    grid = GRID.expand(2, 14, 2)
    valid = torch.ones(2, 14, dtype=torch.bool)
    valid[1, 12:] = False
    for mask in (None, valid[:, None, None]):
        where = torch.cat([WHERE, torch.zeros_like(WHERE[:, :1])], 1)  # the first place has none before it
        narrow, whole, seen = both(model, grid=grid, where=where, attention_mask=mask, columns=(10, 40))
        torch.testing.assert_close(narrow, whole, rtol=1e-9, atol=1e-9)
        assert seen == [5, 8 if "image_fold" in settings else 14]
        with torch.no_grad():
            kept = model(IDS, grid=grid, where=where, attention_mask=mask, columns=(10, 40),
                         folding=model.fold_once(grid)).logits
        assert torch.equal(kept, narrow)


def test_it_stays_whole_where_that_is_no_more_or_it_cannot_know():
    model = tiny()
    everywhere = torch.arange(14).expand(2, 14)
    assert both(model, where=everywhere)[2] == [14, 14] and both(model)[2] == [14, 14]
    layer = model.trunk.layers[-1]
    hook = layer.register_forward_pre_hook(lambda *_: None)  # as sharding and offloading do
    assert not can_read_some(model.trunk) and both(model, where=WHERE)[2] == [14, 14]
    hook.remove()
    assert can_read_some(model.trunk)
    assert not can_read_some(tiny("olmo2").trunk)  # its norms stand elsewhere
    narrow, whole, seen = both(tiny("olmo2"), where=WHERE)
    assert torch.equal(narrow, whole) and seen == [14, 14]


def test_with_gradients_the_whole_layer_runs_and_has_them():
    model = tiny()
    gradients = []
    for narrow in (True, False):
        model.zero_grad()
        model(IDS, where=WHERE, narrow=narrow).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.trunk.layers[-1].parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b) and bool(a.any())


def test_in_a_pass_over_a_cache_the_computed_places_may_be_read():
    for settings in ({}, {"image_side": 4, "image_fold": 2}):
        model, grid = tiny(**settings), GRID.expand(2, 14, 2)
        whole, narrow = SlotCache(2), SlotCache(2, keep_hidden=False)
        changed = torch.where(torch.rand(2, 14, generator=torch.Generator().manual_seed(0)) < 0.3, 11, IDS)
        computed = torch.zeros(2, 14, dtype=torch.bool).scatter(1, WHERE, True)
        computed[0, 0] = True  # what is computed need not be read; rows compute different numbers of places
        for ids, which in ((IDS, None), (changed, computed)):
            seen: list[int] = []
            hook = model.trunk.layers[-1].mlp.register_forward_hook(lambda _, a, __, s=seen: s.append(a[0].shape[1]))
            with torch.no_grad():
                found = [model(ids, grid=grid, where=WHERE, cache=cache, computed=which).logits
                         for cache in (whole, narrow)]
            hook.remove()
            torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
            assert seen[1] == 4
        assert narrow.hidden is None and whole.hidden is not None

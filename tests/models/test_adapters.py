"""Adapters of the mask predictor: exact beside the base, saved, merged, mixed in one batch, refused elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.models import adapters, new_words
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sequence import Canvas, batch, describe_canvas, draw_canvas
from mmdlm.vocabulary import Vocabulary

WORDS = Vocabulary(
    text_size=16, image_start=16, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
GRID = (4, 4)


def tiny(fold: int = 2, bits: int = 4, seed: int = 0) -> MaskPredictor:
    torch.manual_seed(seed)
    trunk = {"model_type": "llama", "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MaskPredictorConfig(trunk, WORDS.to_dict(), code_bits=bits, image_side=4, image_fold=fold)
    return MaskPredictor(config).eval()


def rows() -> tuple[Canvas, Tensor]:
    """Four rows of two lengths, of both tasks."""
    codes = torch.arange(16).view(4, 4)
    drawn = [draw_canvas(prompt, codes, GRID, WORDS) for prompt in ([9], [9, 10, 11], [12])]
    return batch([*drawn, describe_canvas(codes, GRID, [13, 14], 5, WORDS)], pad_id=WORDS.pad_id)


def logits(model: MaskPredictor, chosen: slice = slice(None)) -> Tensor:
    canvas, valid = rows()
    canvas, valid = Canvas(*(part[chosen] for part in canvas)), valid[chosen]
    with torch.no_grad():
        return model(
            canvas.ids, attention_mask=valid[:, None, None], position_ids=canvas.positions, grid=canvas.grid
        ).logits


def trained(model: MaskPredictor, name: str = "default", **settings) -> MaskPredictor:
    """An adapter that does something: B is no longer zero."""
    adapters.add_lora(model, rank=3, name=name, **settings)
    generator = torch.Generator().manual_seed(len(name))
    for value in adapters.adapter_parameters(model, name).values():
        value.data.normal_(std=0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize(("fold", "bits"), [(1, 0), (2, 4)])
def test_a_fresh_adapter_changes_nothing_and_is_all_that_is_trained(fold, bits):
    model = tiny(fold, bits)
    before = logits(model)
    adapters.add_lora(model, rank=2)
    assert torch.equal(logits(model), before)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trainable == set(adapters.adapter_parameters(model))
    assert len(trainable) == 2 * (7 * 2 + (2 if fold > 1 else 0))  # A and B of seven matrices a layer, and the folding


def test_the_adapted_output_is_the_formula():
    model = tiny()
    adapters.add_lora(model, rank=2, alpha=6.0, targets=["fold"])
    layer = model.fold
    a, b = (torch.randn_like(layer.lora_A.default.weight), torch.randn_like(layer.lora_B.default.weight))
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = a, b
    x = torch.randn(5, layer.in_features)
    expected = x @ layer.base_layer.weight.T + 6.0 / 2 * x @ a.T @ b.T
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_merged_model_is_a_plain_one_and_says_the_same():
    model = trained(tiny())
    adapted, plain = logits(model), set(tiny().state_dict())
    adapters.merge_adapter(model)
    assert (logits(model) - adapted).abs().max() < 1e-5 * adapted.abs().max()
    assert set(model.state_dict()) == plain and adapters.adapter_names(model) == []
    assert all(value.requires_grad for value in model.parameters())
    adapters.add_lora(model, rank=2)  # and may be adapted again


def test_saved_and_loaded_it_is_the_same_to_the_bit_and_knows_its_base(tmp_path: Path):
    model = trained(tiny())
    base = adapters.base_hash(model)
    assert base == adapters.base_hash(tiny())  # the adapter is not part of it
    adapters.save_adapter(model, tmp_path / "run" / "adapter", base=base)
    adapters.save_adapter(model, tmp_path / "run" / "adapter", base=base)  # replaces the first
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["adapter"]
    other = tiny()
    adapters.load_adapter(other, tmp_path / "run")
    assert torch.equal(logits(other), logits(model))
    assert not any(value.requires_grad for value in adapters.adapter_parameters(other).values())
    assert adapters.adapter_facts(other) == adapters.adapter_facts(model) != {}
    assert adapters.adapter_facts(tiny()) == {}


def test_rows_of_a_mixed_batch_are_what_they_are_alone():
    model = trained(trained(tiny()), "two", targets=["q_proj", "fold"])
    alone = {}
    for name in ("default", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.disable_adapters()
    alone[None] = logits(model)
    model.enable_adapters()
    names = ["default", None, "two", "default"]
    with adapters.use_adapters(model, names):
        mixed = logits(model)
    for row, name in enumerate(names):
        assert torch.allclose(mixed[row], alone[name][row], atol=1e-5), (row, name)
    assert (alone["two"] - alone["default"]).abs().max() > 0.01
    with adapters.use_adapters(model, ["two", None]):  # twice as many rows: guidance in one forward
        assert torch.allclose(logits(model)[2], alone["two"][2], atol=1e-5)
        with pytest.raises(ValueError, match="3 rows for 2 adapter names"):
            logits(model, slice(3))
    assert torch.equal(logits(model), alone["two"])  # outside, the adapter chosen last


def test_gradients_reach_the_adapter_only():
    model = tiny()
    adapters.add_lora(model, rank=2)
    canvas, valid = rows()
    out = model(canvas.ids, attention_mask=valid[:, None, None], position_ids=canvas.positions, grid=canvas.grid)
    out.logits.square().mean().backward()
    assert all(value.grad is not None for value in adapters.adapter_parameters(model).values())
    assert all(value.grad is None for name, value in model.named_parameters() if ".lora_" not in name)


def test_new_words_get_rows_of_their_own_and_the_others_stay(tmp_path: Path):
    model = tiny()
    before, tables = logits(model), (model.trunk.embed_tokens.weight.clone(), model.head.weight.clone())
    new_words.add_new_words(model, ["zorble", "quax"])
    assert (model.vocabulary.text_size, model.vocabulary.image_start, model.vocabulary.size) == (18, 18, 34)
    adapters.add_lora(model, rank=2)
    assert {name for name, value in model.named_parameters() if value.requires_grad} == {
        *adapters.adapter_parameters(model), "trunk.embed_tokens.parametrizations.weight.0.rows",
        "head.parametrizations.weight.0.rows",
    }  # fmt: skip
    for value in new_words.new_rows(model).values():
        value.data.normal_(generator=torch.Generator().manual_seed(3))
    for table, old in zip((model.trunk.embed_tokens.weight, model.head.weight), tables, strict=True):
        assert torch.equal(torch.cat([table[:16], table[18:]]), old)
    # The same rows as before, their image codes at the ids that they have now.
    canvas, valid = rows()
    ids = torch.where(canvas.ids >= 16, canvas.ids + 2, canvas.ids)
    with torch.no_grad():
        now = model.eval()(
            ids, attention_mask=valid[:, None, None], position_ids=canvas.positions, grid=canvas.grid
        ).logits
    assert torch.allclose(torch.cat([now[..., :16], now[..., 18:]], -1), before, atol=1e-6)

    base = adapters.base_hash(model)
    assert base == adapters.base_hash(tiny())
    adapters.save_adapter(model, tmp_path / "adapter", base=base)
    other = tiny()
    adapters.load_adapter(other, tmp_path)
    assert new_words.new_words(other) == ["zorble", "quax"] and other.vocabulary == model.vocabulary
    assert torch.equal(other.head.weight, model.head.weight)
    adapters.merge_adapter(other)
    assert set(other.state_dict()) == set(tiny().state_dict()) and other.head.weight.shape[0] == 34
    assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(InputError, match="without other adapters"):
        adapters.load_adapter(trained(tiny()), tmp_path, name="two")
    with pytest.raises(InputError, match="grown already"):
        new_words.add_new_words(model, ["third"])
    with pytest.raises(InputError, match="expected different ones"):
        new_words.add_new_words(tiny(), ["same", "same"])


def test_mistakes_are_one_sentence_each(tmp_path: Path):
    model = trained(tiny())
    adapters.save_adapter(model, tmp_path / "adapter", base=adapters.base_hash(model))
    with pytest.raises(InputError, match=r"belongs to the model .*, this one is"):
        adapters.load_adapter(tiny(seed=1), tmp_path)
    with pytest.raises(InputError, match="no adapter at"):
        adapters.load_adapter(tiny(), tmp_path / "nowhere")
    with pytest.raises(InputError, match="targets are \\['attention'\\], expected some of"):
        adapters.add_lora(tiny(), rank=2, targets=["attention"])
    with pytest.raises(InputError, match="rank 0"):
        adapters.add_lora(tiny(), rank=0)
    with pytest.raises(InputError, match="cannot be called 'default'"):
        adapters.add_lora(model, rank=2)
    with pytest.raises(InputError, match=r"cannot be called 'a\.b'"):
        adapters.add_lora(model, rank=2, name="a.b")
    with pytest.raises(InputError, match="no adapter 'three' in this model, it has: default"), adapters.use_adapters(
        model, ["three"]
    ):
        pass
    with pytest.raises(ValueError, match="inference"), adapters.use_adapters(model.train(), ["default"]):
        pass
    settings = json.loads((tmp_path / "adapter" / adapters.CONFIG).read_text())
    (tmp_path / "adapter" / adapters.CONFIG).write_text(json.dumps(settings | {"r": 2}))
    fresh = tiny()
    before = logits(fresh)
    with pytest.raises(InputError, match="does not fit this model"):
        adapters.load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), before)
    (tmp_path / "adapter" / adapters.CONFIG).write_text(json.dumps(settings))
    weights = (tmp_path / "adapter" / adapters.WEIGHTS).read_bytes()
    (tmp_path / "adapter" / adapters.WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="is broken"):
        adapters.load_adapter(fresh, tmp_path)

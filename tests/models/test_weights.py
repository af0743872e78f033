"""What is kept of weights lasts exactly as long as they do: the head's rows of bit-structured codes."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor, nn

from mmdlm.models.lfq import codes_to_bits
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.weights import WeightsState, weights_that_decide
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=20, image_start=24, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip


@pytest.fixture
def model() -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=VOCABULARY.to_dict(), max_positions=8, code_bits=4)
    return MaskPredictor(config).eval()


def by_hand(model: MaskPredictor) -> Tensor:
    rows = model.head.weight[24:].detach().clone()
    return rows + codes_to_bits(torch.arange(16), 4) @ model.bits_out.detach()


@torch.no_grad()
def test_the_heads_rows_are_made_once_and_anew_when_a_weight_changes(model: MaskPredictor):
    first = model.head_rows((24, 40))
    assert model.head_rows((24, 40)) is first and torch.equal(first, by_hand(model))
    assert torch.equal(model.head_rows((30, 34)), first[6:10])  # other columns
    assert model.head_rows((0, 20)).data_ptr() == model.head.weight.data_ptr()  # no codes, nothing to make
    model.bits_out.add_(1)
    assert torch.equal(model.head_rows((24, 40)), by_hand(model))
    model.head.weight = nn.Parameter(torch.ones_like(model.head.weight))
    assert torch.equal(model.head_rows((24, 40)), by_hand(model))
    model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()})
    assert not bool(model.head_rows((24, 40)).any())
    model.double()
    assert model.head_rows((24, 40)).dtype == torch.float64


def test_with_gradients_and_in_training_nothing_is_kept(model: MaskPredictor):
    with torch.no_grad():
        model.head_rows((24, 40))
    rows = model.head_rows((24, 40))
    assert rows.requires_grad and model._kept_rows is None
    rows.sum().backward()
    assert model.bits_out.grad is not None
    model.train()
    with torch.no_grad():
        assert model.head_rows((24, 40)) is not model.head_rows((24, 40))


def test_a_state_holds_for_the_same_unwritten_tensors_only():
    weights = [torch.zeros(3), torch.ones(2)]
    state = WeightsState(weights)
    assert state.holds(weights) and not state.holds(weights[:1])
    assert not state.holds([torch.zeros(3), weights[1]])  # equal is not the same
    assert not pickle.loads(pickle.dumps(state)).holds(weights)
    weights[1].add_(0)
    assert not state.holds(weights)


def test_weights_decide_only_out_of_training_and_without_adapters(model: MaskPredictor):
    from mmdlm.models.adapters import add_lora

    assert len(weights_that_decide(model) or []) >= len(list(model.parameters()))
    assert weights_that_decide(model.train()) is None
    model.eval()
    add_lora(model, rank=1)
    assert weights_that_decide(model.eval()) is None


def test_looking_up_a_few_of_many_codes_makes_no_table_of_all(monkeypatch: pytest.MonkeyPatch):
    bits = 18
    vocabulary = Vocabulary(text_size=20, image_start=24, image_size=2**bits, mask_id=1, bos_id=2, eos_id=3, pad_id=0,
                            boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8)  # fmt: skip
    trunk = {"model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1}
    torch.manual_seed(0)
    model = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), code_bits=bits)).eval()
    codes = torch.tensor([[0, 1, 2**bits - 1, 77_777]])
    table = model.get_input_embeddings().weight
    expected = table[24 + codes] + codes_to_bits(codes, bits) @ model.bits_in
    monkeypatch.setattr(model, "_with_bits", None)  # what makes the table
    torch.testing.assert_close(model._embed(24 + codes, None), expected)
    torch.testing.assert_close(model._embed(torch.tensor([[5]]), None), table[5].view(1, 1, -1))

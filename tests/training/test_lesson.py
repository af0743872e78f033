"""Rows that are kept, not learned: their target is what the model said before, and where it still says so they pull
at nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mmdlm.models.adapters import add_lora, without_adapters
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.new_words import add_new_words
from mmdlm.objectives import Taught, linear_cross_entropy_with_nats
from mmdlm.sequence import IMAGE, batch, describe_canvas, draw_canvas
from mmdlm.training.masked_loss import Lesson, MaskedLoss, NoisedRows, NoiseSettings, corrupt, pack
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=30, image_start=30, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip


@pytest.fixture
def model() -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    trunk |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    made = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=VOCABULARY.to_dict(), image_side=4)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def noised(vocabulary: Vocabulary = VOCABULARY) -> NoisedRows:
    """Six rows: every second one of source 1."""
    chance = torch.Generator().manual_seed(0)
    canvases = []
    for n in range(6):
        codes, words = torch.randint(16, (4, 4), generator=chance), torch.randint(9, 30, (n,), generator=chance)
        place = ((4, 4), vocabulary)
        canvases.append(
            draw_canvas(words, codes, *place) if n % 3 else describe_canvas(codes, (4, 4), words, 5, vocabulary)
        )
    generator = torch.Generator().manual_seed(3)
    rows = batch(canvases, pad_id=0)
    return corrupt(*rows, [n % 2 for n in range(6)], mask_id=1, settings=NoiseSettings(), generator=generator)


def moved(model: MaskPredictor) -> MaskPredictor:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return other


def gradients(model: MaskPredictor, rows: NoisedRows, lesson: Lesson | None) -> tuple[dict[str, Tensor], Tensor]:
    model.zero_grad()
    found = MaskedLoss(model, lesson)(rows, 2)
    (found["image"] + 0.3 * found["text"]).backward()
    return found, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_model_that_says_what_it_said_has_no_gradient(model):
    found, gradient = gradients(model, noised(), Lesson((0, 1), copy.deepcopy(model), closeness=80.0))
    assert found["image"] > 0 and found["text"] > 0  # the teacher's own entropy
    assert float(gradient.abs().max()) < 1e-12
    _, learned = gradients(model, noised(), None)
    assert float(learned.abs().max()) > 0.1


@pytest.mark.parametrize("closeness", [0.0, 7.0])
def test_the_loss_is_the_cross_entropy_with_the_teachers_odds_and_the_distance_from_its_states(model, closeness: float):
    teacher, rows = moved(model), noised()
    found, gradient = gradients(model, rows, Lesson((1,), teacher, closeness=closeness))
    model.zero_grad()
    expected = []
    for kind, columns in ((0, slice(0, 30)), (1, slice(30, 46))):
        seen = {"attention_mask": (rows.documents >= 0)[:, None, None], "position_ids": rows.positions}
        own, other = (each(rows.ids, grid=rows.grid, **seen) for each in (model, teacher))
        logits, taught, states = own.logits[..., columns], other.logits[..., columns], other.hidden.detach()
        far = (own.hidden - states).pow(2).sum(-1) / states.pow(2).sum(-1)
        log_p, odds = logits.log_softmax(-1), taught.detach().softmax(-1)
        targets = (rows.targets - columns.start).clamp(0, log_p.shape[-1] - 1)
        hard, soft = -log_p.gather(-1, targets[..., None])[..., 0], -(odds * log_p).sum(-1)
        each = torch.where(rows.source == 1, soft + closeness * far, hard) * rows.weight
        expected.append(each[rows.supervised & (rows.modality == kind)].sum())
    assert rows.modality.max() == IMAGE == 1
    torch.testing.assert_close(torch.stack([found["text"], found["image"]]), torch.stack(expected))
    (expected[1] + 0.3 * expected[0]).backward()
    slow = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, slow)
    # The nats that are told are those of the data's own targets, with a teacher or without.
    torch.testing.assert_close(found["table"], MaskedLoss(model)(rows, 2)["table"])


def test_an_adapter_is_taught_by_the_model_without_it(model):
    base = copy.deepcopy(model)
    torch.manual_seed(1)
    add_lora(model, rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    own, gradient = gradients(model, noised(), Lesson((1,), closeness=5.0))
    copied, same = gradients(model, noised(), Lesson((1,), base, closeness=5.0))
    torch.testing.assert_close(own["image"], copied["image"])
    torch.testing.assert_close(gradient, same)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained != []
    with torch.no_grad(), without_adapters(model):
        plain = model(noised().ids, grid=noised().grid).logits
    torch.testing.assert_close(plain, base(noised().ids, grid=noised().grid).logits.detach())


def test_a_teacher_says_no_word_that_is_new(model):
    add_new_words(model, ["fox", "panda"])
    rows = noised(model.vocabulary)
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(2)).double()
    loss = MaskedLoss(model, Lesson((0, 1), copy.deepcopy(model), new_words=2))
    odds = loss._taught(hidden, model.vocabulary.text_columns).odds(slice(0, 5))
    assert odds.shape == (5, 32) and float(odds[:, 30:].max()) == 0
    torch.testing.assert_close(odds.sum(1), torch.ones(5).double())
    image = loss._taught(hidden, model.vocabulary.image_columns).odds(slice(0, 5))
    assert image.shape == (5, 16) and float(image.min()) > 0
    assert torch.isfinite(loss(rows, 2)["text"])


def test_packed_rows_are_taught_as_they_are_apart(model):
    teacher, rows = moved(model), noised()
    apart, gradient = gradients(model, rows, Lesson((1,), teacher, closeness=5.0))
    together, same = gradients(model, pack(rows, 64), Lesson((1,), teacher, closeness=5.0))
    torch.testing.assert_close(apart["image"], together["image"])
    torch.testing.assert_close(apart["text"], together["text"])
    torch.testing.assert_close(gradient, same)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_chunks_change_no_taught_loss(chunk: int | None):
    chance = torch.Generator().manual_seed(0)
    hidden, weight, said, other = (torch.randn(n, 4, generator=chance).double() for n in (7, 9, 7, 9))
    weights, targets = torch.rand(7, generator=chance).double(), torch.randint(9, (7,), generator=chance)
    hidden.requires_grad_(True)
    taught = Taught(said, other, absent=(6, 9))
    loss, nats = linear_cross_entropy_with_nats(hidden, weight, targets, weights, taught=taught, chunk=chunk)
    logits = said @ other.T
    odds = torch.cat([logits[:, :6].softmax(1), torch.zeros(7, 3).double()], dim=1)
    log_p = (hidden @ weight.T).log_softmax(1)
    expected = -(weights[:, None] * odds * log_p).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(nats, -log_p.gather(1, targets[:, None])[:, 0].detach())
    torch.testing.assert_close(*(torch.autograd.grad(each, hidden)[0] for each in (loss, expected)))

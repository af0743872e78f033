"""One training step: against the plain loss, in parts, packed, and its parts by share masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.models.packed_attention import attend_by_document
from mmdlm.objectives import linear_cross_entropy
from mmdlm.sequence import IMAGE, batch, describe_canvas, draw_canvas
from mmdlm.training.masked_loss import (
    MaskedLoss,
    NoisedRows,
    NoiseSettings,
    corrupt,
    measured,
    normalisers,
    pack,
    per_written_token,
)
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=30, image_start=30, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip


def model(fold: int = 1) -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    trunk |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {"trunk": trunk, "vocabulary": VOCABULARY.to_dict(), "image_side": 4, "image_fold": fold}
    made = MaskPredictor(MaskPredictorConfig(**settings)).double()
    for parameter in made.parameters():  # large enough for what a place sees to matter
        torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture
def rows() -> Callable[..., NoisedRows]:
    """Six rows of two tasks and several lengths; share as `corrupt` takes it."""

    def make(first: int = 0, count: int = 6, share: tuple[int, int] = (0, 1), seed: int = 3) -> NoisedRows:
        chance = torch.Generator().manual_seed(0)
        canvases = []
        for n in range(6):
            codes = torch.randint(16, (4, 4), generator=chance)
            words = torch.randint(9, 30, (n,), generator=chance)
            if n % 3:
                canvases.append(draw_canvas(words, codes, (4, 4), VOCABULARY))
            else:
                canvases.append(describe_canvas(codes, (4, 4), words, 5, VOCABULARY))
        canvas, valid = batch(canvases, pad_id=0)
        part = slice(first, first + count)
        canvas = type(canvas)(*(field[part] for field in canvas))
        generator = torch.Generator().manual_seed(seed)
        return corrupt(
            canvas, valid[part], [n % 2 for n in range(6)][part], mask_id=1, settings=NoiseSettings(),
            generator=generator, share=share,
        )  # fmt: skip

    return make


def sums_and_gradient(made: MaskPredictor, noised: NoisedRows) -> tuple[Tensor, Tensor, Tensor]:
    made.zero_grad()
    found = MaskedLoss(made)(noised, 2)
    (found["image"] + 0.3 * found["text"]).backward()
    gradient = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
    return torch.stack([found["text"], found["image"]]).detach(), gradient, found["table"]


@pytest.mark.parametrize("fold", [1, 2])
def test_the_sums_are_those_of_full_logits(rows, fold: int):
    made, noised = model(fold), rows()
    sums, _, table = sums_and_gradient(made, noised)
    seen = (noised.documents >= 0)[:, None, None]
    logits = made(noised.ids, attention_mask=seen, position_ids=noised.positions, grid=noised.grid).logits
    expected = []
    for kind, (first, end) in ((0, VOCABULARY.text_columns), (1, VOCABULARY.image_columns)):
        asked = noised.supervised & (noised.modality == kind)
        losses = F.cross_entropy(logits[asked][:, first:end], noised.targets[asked] - first, reduction="none")
        expected.append((losses * noised.weight[asked]).sum())
        assert float(table[0, :, kind].sum()) == pytest.approx(float(losses.detach().sum()), rel=1e-9)
        assert int(table[2, :, kind].sum()) == int(asked.sum())
    torch.testing.assert_close(sums, torch.stack(expected).detach(), rtol=1e-9, atol=0)
    assert normalisers(noised).tolist() == [
        int((noised.corruptible & (noised.modality != IMAGE)).sum()),
        int((noised.supervised & (noised.modality == IMAGE)).sum()),
    ]


def test_texts_count_by_their_words(rows):
    noised = rows()
    weighed = per_written_token(noised, VOCABULARY.eos_id)
    for row, words in ((0, 0), (3, 3)):  # five places each
        expected = noised.weight[row] * 5 / (words + 1)
        torch.testing.assert_close(weighed.weight[row], expected, rtol=1e-6, atol=0)
        assert float(expected.sum()) > 0
    drawn = [1, 2, 4, 5]
    assert torch.equal(weighed.weight[drawn], noised.weight[drawn])
    assert torch.equal(weighed.bound_weight, noised.bound_weight)
    assert torch.equal(normalisers(weighed), normalisers(noised))


def test_the_parts_of_a_batch_have_its_noise(rows):
    whole = rows()
    halves = [rows(first, 3, (n, 2)) for n, first in enumerate((0, 3))]
    for name in ("ids", "supervised", "weight", "bound_weight", "share"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name


def test_accumulated_parts_sum_to_the_batch(rows):
    made, noised = model(), rows()
    sums, gradient, table = sums_and_gradient(made, noised)
    parts = list(noised.parts(3))
    assert [len(part.ids) for part in parts] == [2, 2, 2]
    assert parts[0].ids.shape[1] < noised.ids.shape[1]  # without columns that are padding only
    made.zero_grad()
    found = [MaskedLoss(made)(part, 2) for part in parts]
    sum(part["image"] + 0.3 * part["text"] for part in found).backward()
    torch.testing.assert_close(sum(part["image"] for part in found).detach(), sums[1])
    torch.testing.assert_close(sum(part["table"] for part in found), table)
    again = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
    torch.testing.assert_close(again, gradient)


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("length", [64, 52])
def test_packing_changes_no_loss_and_no_gradient(rows, fold: int, length: int):
    made, noised = model(fold), rows()
    packed = pack(noised, length, image_fold=fold)
    assert len(packed.ids) < len(noised.ids) and packed.ids.shape[1] <= length
    assert sorted(packed.documents[packed.documents >= 0].unique().tolist()) == list(range(6))
    for found, expected in zip(sums_and_gradient(made, packed), sums_and_gradient(made, noised), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_attention_by_document_is_that_of_the_dense_mask(rows):
    made, noised = model(), rows()
    packed = pack(noised, 64)
    expected = sums_and_gradient(made, packed)
    attend_by_document(made)
    for found, other in zip(sums_and_gradient(made, packed), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)
    in_one = sums_and_gradient(made, pack(noised, 10_000))
    plain = sums_and_gradient(made, noised)  # padding, as before
    for found, again, other in zip(in_one, plain, expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again, other, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="knows no folded places"):
        attend_by_document(model(2))


def test_a_row_longer_than_the_pack_stays_alone(rows):
    packed = pack(rows(), 10)
    assert len(packed.ids) == 6 and int((packed.documents >= 0).sum()) == int((rows().documents >= 0).sum())


def test_what_is_measured_on_a_hand_case():
    table = torch.zeros(4, 2, 2, 5, dtype=torch.float64)
    table[:, 0, 1, 4] = torch.tensor([6.0, 12.0, 3.0, 4.0])  # source 0, image, 80 to 100 percent masked
    table[:, 1, 1, 0] = torch.tensor([1.0, 20.0, 2.0, 16.0])
    assert measured(table, ["world", "mine"]) == {
        "image/nats": 7 / 5, "image/bound": 32 / 20, "image/nats/0-20": 0.5, "image/bound/0-20": 20 / 16,
        "image/nats/80-100": 2.0, "image/bound/80-100": 3.0, "image/nats/world": 2.0, "image/bound/world": 3.0,
        "image/nats/mine": 0.5, "image/bound/mine": 20 / 16,
    }  # fmt: skip


def test_a_uniform_model_measures_the_logarithm_of_its_columns(rows):
    made = model()
    torch.nn.init.zeros_(made.head.weight)
    table = sum(MaskedLoss(made)(rows(seed=seed), 2)["table"] for seed in range(200)).detach()
    found = measured(table)
    assert found["image/nats"] == pytest.approx(torch.tensor(16.0).log().item())
    assert found["text/nats/20-40"] == pytest.approx(torch.tensor(30.0).log().item())
    # The bound's weights make a masked place's mean weight 1 per corruptible place, so the bound is the same number;
    # that every row has at least one masked place, and that t starts at 0.02, moves it a little.
    assert found["image/bound"] == pytest.approx(found["image/nats"], rel=0.1)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for part in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(part, Tensor):
                self.size = max(self.size, part.numel())
        return made


def test_no_more_logits_than_a_chunk_at_a_time_forward_or_backward():
    hidden, weight = torch.randn(64, 4).requires_grad_(), torch.randn(1000, 4).requires_grad_()
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, torch.arange(64), torch.ones(64), chunk=16).backward()
    assert largest.size == 16 * 1000

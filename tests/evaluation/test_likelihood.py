"""The bound where the likelihood is known, matching and choosing where the answer is."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import bounds, choose, masks, match, per_token, retrieval, text_canvas
from mmdlm.objectives import likelihood_bound
from mmdlm.sampling.predictors import full
from mmdlm.vocabulary import Vocabulary

# Two tokens, 0 and 1, in two places, both orders of p(first) p(second | first) the same: a joint distribution.
JOINT = torch.tensor([[0.4, 0.1], [0.2, 0.3]])
MASK, PAD = 2, 3
NONE = dict.fromkeys(("bos_id", "boi_id", "eoi_id", "draw_id", "describe_id", "ask_id"), -1)
WORLD = Vocabulary(text_size=4, image_start=4, image_size=0, mask_id=MASK, eos_id=PAD, pad_id=PAD, **NONE)


class Exact(nn.Module):
    """The true conditionals of JOINT over the last two places of any row; counts what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))
        self.rows = 0

    def forward(self, ids: Tensor, *, where: Tensor, columns: tuple[int, int] | None, **_: object) -> SimpleNamespace:
        self.rows += len(ids)
        first, second = ids[:, -2], ids[:, -1]
        p = torch.zeros(*ids.shape, 4)
        p[:, -2, :2] = torch.where((second == MASK)[:, None], JOINT.sum(1), JOINT.T[second.clamp(max=1)])
        p[:, -1, :2] = torch.where((first == MASK)[:, None], JOINT.sum(0), JOINT[first.clamp(max=1)])
        logits = (p / p.sum(-1, keepdim=True).clamp(min=1e-30)).log()
        return SimpleNamespace(logits=logits.gather(1, where[..., None].expand(*where.shape, 4))[..., slice(*columns)])


@pytest.mark.parametrize("row", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_bound_of_known_conditionals_is_the_likelihood(row):
    # In expectation: l = 1 asks one of the two places, l = 2 both at once from their marginals.
    first, second = row
    joint = -JOINT.log()[first, second]
    marginals = -(JOINT.sum(1).log()[first] + JOINT.sum(0).log()[second])
    conditionals = 2 * joint - marginals  # -log p(a|b) - log p(b|a)
    expected = 0.5 * (2 / 1) * 0.5 * conditionals + 0.5 * marginals
    assert float(expected) == pytest.approx(float(joint), rel=1e-6)
    found = bounds(Exact(), [text_canvas(row, WORLD)], vocabulary=WORLD, samples=4000, batch_size=1000)
    assert abs(float(found.nats[0]) - float(joint)) < 4 * float(found.standard_error[0])
    assert 0 < float(found.standard_error[0]) < 0.02
    assert float(found.text_nats[0]) == float(found.nats[0]) and float(found.image_nats[0]) == 0


def test_one_place_has_no_monte_carlo_error():
    canvas = text_canvas([1], WORLD, prompt=[0])
    found = bounds(Exact(), [canvas], vocabulary=WORLD, samples=2)
    assert float(found.nats[0]) == pytest.approx(-math.log(0.1 / 0.5), rel=1e-6)
    assert float(found.standard_error[0]) == pytest.approx(0, abs=1e-9)
    report = per_token(found)
    assert report["perplexity"] == pytest.approx(5.0, rel=1e-5)
    assert report["bits_per_token"] == pytest.approx(math.log2(5), rel=1e-5)
    assert report["tokens"] == report["rows"] == 1 and report["sampling_error"] is None


def test_masks_are_stratified_and_hide_something():
    hidden = masks(8, 64, torch.Generator().manual_seed(0))
    counts = hidden.sum(1)
    assert torch.equal(counts.bincount(minlength=9), torch.tensor([0] + [8] * 8))
    assert torch.equal(hidden, masks(8, 64, torch.Generator().manual_seed(0)))


def test_a_row_does_not_depend_on_its_batch():
    rows = [text_canvas(row, WORLD) for row in ((0, 1), (1, 1), (0, 0))]
    rows.append(text_canvas((0, 1), WORLD, prompt=[0, 1, 1]))  # longer: the others are padded
    together = bounds(Exact(), rows, vocabulary=WORLD, samples=8, seeds=[5, 6, 7, 5], batch_size=5)
    for row, seed in zip(range(4), (5, 6, 7, 5), strict=True):
        alone = bounds(Exact(), rows[row : row + 1], vocabulary=WORLD, samples=8, seeds=[seed])
        assert float(together.nats[row]) == pytest.approx(float(alone.nats[0]), abs=1e-12)
    assert float(together.nats[0]) == float(together.nats[3])  # one seed, the same masks


def test_bad_calls():
    canvas = text_canvas([0, 1], WORLD)
    with pytest.raises(InputError, match="at least 2"):
        bounds(Exact(), [canvas], vocabulary=WORLD, samples=1)
    with pytest.raises(ValueError, match="one for each"):
        bounds(Exact(), [canvas], vocabulary=WORLD, seeds=[1, 2])
    with pytest.raises(ValueError, match="editable"):
        bounds(Exact(), [canvas._replace(editable=torch.zeros(2, dtype=torch.bool))], vocabulary=WORLD)


def test_retrieval_by_hand():
    # text 2 is the likeliest whatever the picture; the information it carries is least
    nats = torch.tensor([[5.0, 9.0, 4.0], [9.0, 6.0, 4.0], [9.0, 9.0, 3.0]])
    found = retrieval(nats)
    assert found == {
        "text_to_picture": 1.0,
        "picture_to_text": pytest.approx(1 / 3),
        "picture_to_text_by_information": 1.0,
        "chance": pytest.approx(1 / 3),
    }
    assert retrieval(torch.zeros(4, 4))["picture_to_text"] == 0.25  # a tie is a guess
    with pytest.raises(ValueError, match="as many texts"):
        retrieval(torch.zeros(2, 3))


def test_a_real_model_pictures_texts_and_choices(tiny_model):
    from mmdlm.pipelines import ImageToText

    pipe = ImageToText.from_pretrained(tiny_model)
    vocabulary, ids = pipe.processor.vocabulary, pipe.processor.text_ids
    codes = torch.randint(vocabulary.image_size, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    canvas = sequence.describe_canvas(codes[0], (4, 4), ids("a red apple"), 16, vocabulary)
    ours = bounds(pipe.model, [canvas], vocabulary=vocabulary, samples=256)
    first, stop = vocabulary.text_columns
    twin = likelihood_bound(
        full(pipe.model, position_ids=canvas.positions[None], grid=canvas.grid[None], columns=(first, stop)),
        canvas.ids[None],
        corruptible=canvas.editable[None],
        mask_id=vocabulary.mask_id,
        samples=256,
        generator=torch.Generator().manual_seed(1),
    )
    error = math.hypot(float(ours.standard_error[0]), float(twin.standard_error[0]))
    assert abs(float(ours.nats[0] - twin.nats[0])) < 4 * error
    # both modalities at once: the parts add up
    joint = canvas._replace(editable=canvas.editable | (canvas.modality == sequence.IMAGE))
    mixed = bounds(pipe.model, [joint], vocabulary=vocabulary, samples=4)
    assert float(mixed.text_nats[0]) > 0 and float(mixed.image_nats[0]) > 0
    assert float(mixed.text_nats[0] + mixed.image_nats[0]) == pytest.approx(float(mixed.nats[0]))
    assert int(mixed.tokens[0]) == 32
    texts = [ids("a red apple"), ids("two yellow stars")]
    settings = {"vocabulary": vocabulary, "answer_length": 16, "samples": 4}
    matrix = match(pipe.model, list(codes), texts, **settings)
    assert matrix.shape == (2, 2) and 0 <= retrieval(matrix)["picture_to_text"] <= 1
    chosen = choose(pipe.model, codes[0], ids("what colour is it?"), [ids("red"), ids("blue")], **settings)
    assert chosen.nats.shape == (2,)
    with pytest.raises(InputError, match="1 choices"):
        choose(pipe.model, codes[0], ids("what colour is it?"), [ids("red")], **settings)

"""The released samplers' own ways: their random numbers in their order, their counts, their end-of-text options."""

from __future__ import annotations

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import View, denoise
from mmdlm.sampling.draws import greedy
from mmdlm.sampling.policies import maskgit, top_k
from mmdlm.sampling.published import (
    forbidden,
    gumbel_of_places,
    gumbel_together,
    multinomial_together,
    random_together,
    rounded_counts,
    unsure,
)

ROWS, PLACES, COLUMNS = 2, 5, 7


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(ROWS, PLACES, COLUMNS, generator=seeded(1))


def view_of(masked: int, step: int, steps: int, where: torch.Tensor | None = None) -> View:
    """One row of 16 places, the first `masked` of them masked, before pass `step` of `steps`."""
    ids = torch.zeros(1, 16, dtype=torch.long)
    is_masked = (torch.arange(16) < masked).unsqueeze(0)
    where = torch.arange(16).unsqueeze(0) if where is None else where
    numbers = [torch.tensor([value]) for value in (16, step, steps)]
    return View(ids, ids, ids.float(), ids.float()[..., None], is_masked, is_masked, where, *numbers, [seeded()])


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [1, 4]])
def test_gumbel_together_takes_one_number_for_every_place_and_column(logits, places):
    where = torch.tensor([places] * ROWS)
    asked = torch.ones_like(where, dtype=torch.bool)
    asked[1, -1] = False
    draw = gumbel_together(temperature=0.7, length=PLACES, generator=seeded())
    columns, sure = draw(logits[:, places], where, asked, [])
    noise = torch.rand(ROWS, PLACES, COLUMNS, dtype=torch.float64, generator=seeded())
    expected = (logits.double().exp() / (-noise.log()) ** 0.7).argmax(-1)[:, places]
    assert torch.equal(columns, expected)
    odds = logits.softmax(-1)[:, places].gather(-1, expected[..., None])[..., 0]
    assert torch.equal(sure, odds.masked_fill(~asked, 0))
    assert gumbel_together(temperature=0, length=PLACES) is greedy
    with pytest.raises(InputError, match="temperature is -1"):
        gumbel_together(temperature=-1, length=PLACES)


@pytest.mark.parametrize("places", [[0, 1, 2, 3, 4], [1, 4]])
def test_multinomial_together_is_one_call_of_multinomial(logits, places):
    picture = torch.tensor([2, 3, 5, 6, 9])  # where the picture lies in the canvas
    where = picture[places].expand(ROWS, -1)
    asked = torch.ones_like(where, dtype=torch.bool)
    draw = multinomial_together(picture, generator=seeded())
    columns, sure = draw(logits[:, places], where, asked, [])
    expected = torch.multinomial(logits.softmax(-1).view(-1, COLUMNS), 1, generator=seeded()).view(ROWS, PLACES)
    assert torch.equal(columns, expected[:, places])
    assert torch.allclose(sure, logits.softmax(-1).gather(-1, expected[..., None])[:, places, 0])


def test_multinomial_together_follows_the_odds():
    likely = torch.tensor([0.2, 0.8]).log().expand(1, 4000, 2)
    where = torch.arange(4000).unsqueeze(0)
    columns, _ = multinomial_together(where[0], generator=seeded())(likely, where, where >= 0, [])
    assert abs(float(columns.float().mean()) - 0.8) < 0.02


def test_noise_of_places_is_one_call_for_the_whole_picture():
    picture = torch.arange(3, 19)
    uniform = torch.zeros(1, 16).uniform_(0, 1, generator=seeded())
    expected = -(-uniform.log()).log()
    got = gumbel_of_places(picture, generator=seeded())(view_of(16, 0, 4, picture.unsqueeze(0)))
    assert torch.allclose(got, expected)
    some = gumbel_of_places(picture, generator=seeded())(view_of(2, 0, 4, picture[[1, 7]].unsqueeze(0)))
    assert torch.equal(some, got[:, [1, 7]])


@pytest.mark.parametrize(
    ("schedule", "counts"),
    [
        ("cosine", [15, 13, 11, 7, 4, 1]),  # 16 cos(pi / 3) is 8, and 7.9999995 in float32
        ("linear", [13, 10, 8, 5, 2, 1]),
        ("pow2", [15, 14, 12, 8, 4, 1]),
        ("sigmoid", [14, 12, 8, 3, 1, 1]),
    ],
)
def test_counts_are_rounded_as_released(schedule, counts):
    keep = rounded_counts(schedule, 16)
    assert [int(keep(view_of(16, step, 6))) for step in range(6)] == counts


def test_counts_leave_one_place_and_take_one():
    keep = rounded_counts("cosine", 16)
    assert int(keep(view_of(5, 0, 6))) == 4  # a place less than now, where many were given
    assert int(keep(view_of(1, 4, 6))) == 1
    for wrong in ("pow", "powx", "pow-1", "powinf_", "nonsense", ""):
        with pytest.raises(InputError, match="expected cosine, linear, sigmoid or pow"):
            rounded_counts(wrong, 16)


def test_random_together_ranks_by_one_number_per_place():
    x = torch.full((ROWS, PLACES), 0)
    states = denoise(
        lambda ids, where: torch.zeros(*where.shape, 3).index_fill(-1, torch.tensor(2), 1.0),
        x,
        random_together(top_k(), length=PLACES, generator=seeded()),
        editable=torch.ones_like(x, dtype=torch.bool),
        mask_id=0,
        steps=PLACES,
        generator=seeded(9),
    )
    luck = torch.rand(ROWS, PLACES, generator=seeded())
    first = next(iter(states))
    assert torch.equal(first.written.long().argmax(1), luck.argmax(1)) and int(first.written.sum()) == ROWS


def test_end_of_text_options(logits):
    where = torch.arange(PLACES).expand(ROWS, -1)
    top = logits.argmax(-1)
    shut = int(top[0, 0])
    assert not bool((forbidden(lambda ids, where: logits, [shut])(where, where).argmax(-1) == shut).any())
    columns, sure = unsure(greedy, [shut])(logits, where, where >= 0, [])
    assert torch.equal(columns, top)
    assert torch.equal(sure == 0, top == shut) and not bool(sure.isnan().any())
    without = logits.index_fill(-1, torch.tensor(shut), -torch.inf).softmax(-1)
    assert torch.equal(sure, without.gather(-1, top[..., None])[..., 0])


def test_maskgit_with_its_own_counts_and_noise_is_maskgit_with_them_given():
    """The default count, handed in, changes nothing; and noise of zero is no noise."""

    def predict(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.randn(len(ids), 16, COLUMNS, generator=seeded(4)).gather(
            1, where[..., None].expand(-1, -1, COLUMNS)
        )

    x = torch.full((ROWS, 16), COLUMNS - 1)

    def run(policy) -> list[list[list[int]]]:
        states = denoise(predict, x, policy, editable=x > 0, mask_id=COLUMNS - 1, steps=5)
        return [state.x.tolist() for state in states]

    def planned(view: View) -> torch.Tensor:
        share = torch.cos((view.step + 1).double() / view.steps * torch.pi / 2)
        left = view.masked.sum(1) - 1
        return torch.floor(view.n_start * share + 1e-9).long().clamp(min=1).minimum(left)

    plain = run(maskgit())
    assert run(maskgit(keep=planned)) == plain
    assert run(maskgit(noise=lambda view: torch.zeros_like(view.confidence))) == plain
    assert run(maskgit(choice_temperature=9.0, noise=lambda view: torch.zeros_like(view.confidence))) == plain
    assert run(maskgit(choice_temperature=9.0)) != plain

"""Draws: exact probabilities, exact frequencies, and randomness that belongs to rows."""

import pytest
import torch

from mmdlm.sampling.draws import categorical, greedy, gumbel, gumbel_argmax, row_generators, uniform


def frequencies(draw, logits, n=20000):
    """How often each column is drawn, at n places of one row."""
    asked = torch.ones(1, n, dtype=torch.bool)
    columns, confidence = draw(logits.expand(1, n, -1), asked.long(), asked, [torch.Generator().manual_seed(0)])
    torch.testing.assert_close(confidence, logits.softmax(-1)[columns])  # the model's own probability
    return torch.bincount(columns[0], minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("settings", "keep"),
    [({}, 5), ({"temperature": 0.5}, 5), ({"top_k": 3}, 3), ({"top_p": 0.6}, 2), ({"top_p": 0.4}, 1),
     ({"top_k": 4, "top_p": 0.99}, 4)],
)
def test_categorical_frequencies(settings, keep):
    shares = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    exact = shares ** (1 / settings.get("temperature", 1.0))
    exact[keep:] = 0
    exact /= exact.sum()
    drawn = frequencies(categorical(**settings), shares.log())
    assert (drawn[keep:] == 0).all()
    kept = exact[:keep]
    chi = ((drawn[:keep] - kept) ** 2 / kept).sum() * 20000
    assert chi < 18.5  # four degrees of freedom, once in 1000


def test_top_k_keeps_ties():
    drawn = frequencies(categorical(top_k=2), torch.tensor([1.0, 0.0, 0.0, -1.0]))
    assert (drawn > 0).tolist() == [True, True, True, False]


def test_greedy_confidence_is_stable_for_large_logits_and_shut_columns():
    logits = torch.tensor([[[1e4, 1e4 - 1, -torch.inf], [-1e4, -torch.inf, -torch.inf], [0, 0, 0]]])
    asked = torch.tensor([[True, True, False]])
    columns, confidence = greedy(logits, asked.long(), asked, [])
    assert columns[0, :2].tolist() == [0, 0]
    torch.testing.assert_close(confidence[0], torch.tensor([1 / (1 + torch.e**-1), 1.0, 0.0]))


def test_noise_belongs_to_rows():
    asked = torch.tensor([[True, True, False], [True, True, True]])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = gumbel(generators, asked, 7)
    alone = gumbel([torch.Generator().manual_seed(3)], asked[:1, :2], 7)
    assert torch.equal(both[0, :2], alone[0]) and (both[0, 2] == 0).all()
    # the first row used two places' numbers: it goes on where a row of two places would
    assert torch.equal(uniform(generators[:1], asked[:1, :1]), uniform([after(3, 2 * 7)], asked[:1, :1]))


def test_noise_of_many_columns_is_drawn_in_pieces_and_the_same(monkeypatch):
    asked = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    whole = gumbel([torch.Generator().manual_seed(seed) for seed in (3, 4)], asked, 7)
    for most in (1, 14, 20):
        monkeypatch.setattr("mmdlm.sampling.draws.NUMBERS_AT_ONCE", most)
        assert torch.equal(gumbel([torch.Generator().manual_seed(seed) for seed in (3, 4)], asked, 7), whole)


def after(seed, count):
    generator = torch.Generator().manual_seed(seed)
    torch.rand(count, generator=generator, dtype=torch.float64)
    return generator


def test_row_generators():
    device = torch.device("cpu")
    given = [torch.Generator(), torch.Generator()]
    assert row_generators(given, 2, device) == given
    one = row_generators(torch.Generator().manual_seed(1), 3, device)
    again = row_generators(torch.Generator().manual_seed(1), 2, device)
    assert [g.initial_seed() for g in one[:2]] == [g.initial_seed() for g in again]
    assert len({g.initial_seed() for g in one}) == 3
    torch.manual_seed(0)
    first = row_generators(None, 1, device)[0].initial_seed()
    torch.manual_seed(0)
    assert first == row_generators(None, 1, device)[0].initial_seed()
    with pytest.raises(ValueError, match="2 generators for 3 rows"):
        row_generators(given, 3, device)


@pytest.mark.parametrize("columns", [1, 2, 17, 300])
@pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 5.0, 30.0, 1e4])
def test_noise_where_it_can_decide_chooses_what_all_noise_chooses(columns, spread):
    """Scores of any spread; equal ones, shut columns, places with nothing open, an infinite one and no numbers."""
    torch.manual_seed(0)
    asked = torch.ones(2, 40, dtype=torch.bool)
    asked[1, 30:] = False
    for kind in range(6):
        scores = torch.randn(2, 40, columns) * spread
        if kind == 1:
            scores = scores.round()
        elif kind == 2:
            scores = scores.masked_fill(torch.rand(scores.shape) < 0.4, -torch.inf)
        elif kind == 3:
            scores[0, 3], scores[1, 2] = torch.nan, -torch.inf
        elif kind == 4:
            scores[0, 5, 0] = torch.inf
        made = [[torch.Generator().manual_seed(seed) for seed in (kind, 9)] for _ in range(2)]
        some, every = (gumbel_argmax(scores, made[i], asked, narrow=i == 0) for i in range(2))
        assert torch.equal(some, every), kind
        # and as many numbers were taken
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(*made, strict=True))

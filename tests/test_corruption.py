"""Corruption: only corruptible places change, and as many as the schedule says."""

from __future__ import annotations

import pytest
import torch

from mmdlm.corruption import complement, mask
from mmdlm.schedules import by_modality, cosine, linear, maskgit

MASK = 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(rows: int = 200, length: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = seeded(7)
    x0 = torch.randint(2, 30, (rows, length), generator=generator)
    return x0, torch.rand(rows, length, generator=generator) < 0.6


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("at_least_one", [False, True])
def test_only_corruptible_places_change(exact, at_least_one):
    x0, corruptible = example()
    t = torch.rand(200, 1, generator=seeded()) * 0.999 + 0.001
    corrupted = mask(
        x0, t, corruptible=corruptible, mask_id=MASK, schedule=cosine, generator=seeded(), exact=exact,
        at_least_one=at_least_one,
    )  # fmt: skip
    assert torch.equal(corrupted.x_t[~corruptible], x0[~corruptible])
    assert torch.equal(corrupted.supervised, corrupted.x_t == MASK)
    assert torch.equal(corrupted.x_t[~corrupted.supervised], x0[~corrupted.supervised])
    assert not (corrupted.supervised & ~corruptible).any()
    expected = cosine.weight(t).expand_as(corrupted.weight)
    assert torch.equal(corrupted.weight, expected * corrupted.supervised)
    if at_least_one:
        assert corrupted.supervised.any(1).all()


def test_the_masked_share_is_the_schedules():
    x0 = torch.full((2, 40_000), 5)
    t = torch.tensor([[0.3], [0.8]])
    corruptible = torch.ones_like(x0, dtype=torch.bool)
    for schedule in (linear, cosine):
        masked = mask(x0, t, corruptible=corruptible, mask_id=MASK, schedule=schedule, generator=seeded()).supervised
        assert ((masked.float().mean(1) - (1 - schedule.alpha(t)).flatten()).abs() < 0.01).all()


def test_all_is_masked_at_time_one():
    x0, corruptible = example()
    for schedule in (linear, cosine, maskgit):
        masked = mask(x0, torch.ones(200, 1), corruptible=corruptible, mask_id=MASK, schedule=schedule).supervised
        assert torch.equal(masked, corruptible)


def test_exact_counts_and_uniform_places():
    x0 = torch.full((6000, 6), 5)
    corruptible = torch.tensor([True, False, True, True, True, False]).expand(6000, 6)
    t = torch.full((6000, 1), 0.5)
    masked = mask(
        x0, t, corruptible=corruptible, mask_id=MASK, schedule=linear, generator=seeded(), exact=True
    ).supervised
    assert (masked.sum(1) == 2).all()
    assert (masked.float().mean(0) - torch.tensor([0.5, 0, 0.5, 0.5, 0.5, 0])).abs().max() < 0.03
    with pytest.raises(ValueError, match="one per row"):
        mask(x0, t.expand(6000, 6), corruptible=corruptible, mask_id=MASK, schedule=linear, exact=True)


def test_the_released_choice_of_exact_places_takes_an_argsort_for_a_rank():
    x0 = torch.full((4000, 5), 7)
    settings = {"corruptible": x0 == 7, "mask_id": MASK, "schedule": linear}
    t = torch.full((4000, 1), 0.4)
    released = mask(x0, t, generator=seeded(), exact="released", **settings).supervised
    assert torch.equal(released, torch.rand(4000, 5, generator=seeded()).argsort(dim=1) < 2)
    assert ((released.float().mean(0) - 0.4).abs() < 0.03).all(), "as uniform as the other"
    few = mask(x0, t / 8, generator=seeded(), exact="released", at_least_one=True, **settings).supervised
    assert (few.sum(1) == 1).all()
    settings["corruptible"] = torch.arange(5).expand_as(x0) < 4
    with pytest.raises(ValueError, match="not corruptible"):
        mask(x0, t, generator=seeded(), exact="released", **settings)


def test_at_least_one_is_uniform_and_leaves_rows_without_places_alone():
    x0 = torch.full((6000, 4), 5)
    corruptible = torch.tensor([True, True, False, True]).repeat(6000, 1)
    corruptible[0] = False
    t = torch.full((6000, 1), 1e-4)
    corrupted = mask(
        x0, t, corruptible=corruptible, mask_id=MASK, schedule=linear, generator=seeded(), at_least_one=True
    )
    assert not corrupted.supervised[0].any() and (corrupted.supervised[1:].sum(1) == 1).all()
    assert (corrupted.supervised.float().mean(0) - torch.tensor([1, 1, 0, 1]) / 3).abs().max() < 0.03


def test_one_time_per_place_and_per_modality():
    x0 = torch.full((1, 4), 5)
    every = torch.ones_like(x0, dtype=torch.bool)
    t = torch.tensor([[1e-7, 1e-7, 1.0, 1.0]])  # two blocks
    corrupted = mask(x0, t, corruptible=every, mask_id=MASK, schedule=linear, generator=seeded())
    assert corrupted.supervised.tolist() == [[False, False, True, True]]
    modality = torch.tensor([[0, 1, 0, 1]])
    schedule = by_modality(modality, text=linear, image=maskgit)
    weight = mask(x0, torch.ones(1, 1), corruptible=every, mask_id=MASK, schedule=schedule).weight
    assert weight.tolist() == [[1, 1, 1, 1]]
    t = torch.full((1, 4), 0.5)
    corrupted = mask(x0, t, corruptible=every, mask_id=MASK, schedule=schedule, generator=seeded(4))
    expected = torch.tensor([[2.0, 1.0, 2.0, 1.0]]) * corrupted.supervised
    assert corrupted.supervised.any() and torch.equal(corrupted.weight, expected)


def test_complement_masks_what_was_left():
    x0, corruptible = example()
    t = torch.full((200, 1), 0.4)
    first = mask(x0, t, corruptible=corruptible, mask_id=MASK, schedule=linear, generator=seeded())
    second = complement(x0, first, corruptible=corruptible, mask_id=MASK)
    assert not (first.supervised & second.supervised).any()
    assert torch.equal(first.supervised | second.supervised, corruptible)
    assert torch.equal(second.x_t == MASK, second.supervised) and torch.equal(second.weight, second.supervised.float())
    weighted = complement(x0, first, corruptible=corruptible, mask_id=MASK, weight=1 / (1 - t))
    torch.testing.assert_close(weighted.weight, second.supervised / 0.6)


def test_same_seed_same_masks():
    x0, corruptible = example()
    t = torch.full((200, 1), 0.5)
    draws = [
        mask(x0, t, corruptible=corruptible, mask_id=MASK, schedule=linear, generator=seeded(seed)).x_t
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.zeros(2, 1)}, r"\(0, 1\]"),
        ({"t": torch.full((2, 1), 1.1)}, r"\(0, 1\]"),
        ({"t": torch.full((2, 1), float("nan"))}, r"\(0, 1\]"),
        ({"t": torch.ones(2)}, r"\[B, 1\] or \[B, L\]"),
        ({"t": torch.ones(2, 2)}, r"\[B, 1\] or \[B, L\]"),
        ({"corruptible": torch.ones(2, 3)}, "corruptible bool"),
        ({"x0": torch.tensor([[2, 3, 1], [2, 3, 4]])}, "holds the mask 1"),
    ],
)
def test_bad_input(change, message):
    good = {
        "x0": torch.tensor([[2, 3, 4], [2, 3, 4]]),
        "t": torch.ones(2, 1),
        "corruptible": torch.ones(2, 3, dtype=torch.bool),
    }
    given = good | change
    with pytest.raises(ValueError, match=message):
        mask(given["x0"], given["t"], corruptible=given["corruptible"], mask_id=MASK, schedule=linear)

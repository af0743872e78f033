"""Losses: exact answers on a small world whose true conditionals are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmdlm.corruption import Corrupted, mask
from mmdlm.errors import InputError
from mmdlm.objectives import denoising_loss, likelihood_bound, linear_cross_entropy, supervised_places
from mmdlm.schedules import by_modality, cosine, cubic, linear, maskgit, square
from mmdlm.sequence import IMAGE, TEXT, ask_canvas, batch, describe_canvas, draw_canvas, image, interleave, text
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=30, image_start=30, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
SYMBOLS, LENGTH, MASK = 4, 3, 4


def joint() -> torch.Tensor:
    """A joint table [4, 4, 4] of three dependent tokens, with some impossible rows."""
    table = torch.rand(SYMBOLS, SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    table[0, :, 2] = 0
    return table / table.sum()


JOINT = joint()
ROWS = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))  # [64, 3]
P = JOINT[tuple(ROWS.T)]  # [64]


def oracle(x_t: torch.Tensor) -> torch.Tensor:
    """x_t [B, 3] -> log p(token | what is not masked) [B, 3, 4]: sums over the joint table."""
    agrees = ((x_t[:, None] == ROWS) | (x_t[:, None] == MASK)).all(-1)  # [B, 64]
    weight = agrees * P
    one_hot = F.one_hot(ROWS, SYMBOLS).double()  # [64, 3, 4]
    return (torch.einsum("bn,nlv->blv", weight, one_hot) / weight.sum(1)[:, None, None]).log()


def predict(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    logits = oracle(ids)
    return logits.gather(1, where[..., None].expand(-1, -1, SYMBOLS))


def possible() -> tuple[torch.Tensor, torch.Tensor]:
    return ROWS[P > 0], P[P > 0]


@pytest.mark.parametrize("schedule", [linear, cosine, square, cubic], ids=lambda schedule: schedule.name)
def test_the_bounds_mean_over_time_is_the_entropy(schedule):
    """Every x0, every mask, quadrature over t: no random number anywhere. An oracle's bound is tight, row by row."""
    x0, p = possible()
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))  # [8, 3]
    nodes, shares = np.polynomial.legendre.leggauss(24)
    per_row = torch.zeros(len(x0), dtype=torch.float64)
    for t, share in zip(torch.tensor((nodes + 1) / 2), torch.tensor(shares / 2), strict=True):
        keep = schedule.alpha(t)
        for supervised in masks:
            chance = torch.where(supervised, 1 - keep, keep).prod()
            supervised = supervised.expand_as(x0)
            weight = (schedule.weight(t) * chance * share).expand(x0.shape)
            corrupted = Corrupted(x0.masked_fill(supervised, MASK), supervised, weight)
            logits = oracle(corrupted.x_t)
            for i in range(len(x0)):
                row = Corrupted(*(part[i : i + 1] for part in corrupted))
                per_row[i] += denoising_loss(logits[i : i + 1], x0[i : i + 1], row, "rows")
    torch.testing.assert_close(per_row, -p.log(), rtol=0, atol=1e-9)
    entropy = -(p * p.log()).sum()
    assert abs(float((p * per_row).sum() - entropy)) < 1e-6


def test_likelihood_bound_estimates_the_entropy():
    x0, p = possible()
    every = torch.ones_like(x0, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    bound = likelihood_bound(predict, x0, corruptible=every, mask_id=MASK, samples=900, generator=generator)
    assert bound.nats.shape == bound.standard_error.shape == (len(x0),)
    assert ((bound.nats + p.log()).abs() < 5 * bound.standard_error).all()
    assert (bound.standard_error < 0.1 - 0.05 * p.log()).all()
    mean, error = (p * bound.nats).sum(), (p**2 * bound.standard_error**2).sum().sqrt()
    assert abs(mean + (p * p.log()).sum()) < 4 * error < 0.1


def test_likelihood_bound_of_one_place_is_exact_and_conditional():
    """Only the last token is corruptible: -log p(last | first two), without any variance; and nothing is 0 nats."""
    x0, _ = possible()
    corruptible = torch.tensor([False, False, True]).repeat(len(x0), 1)
    corruptible[0] = False
    bound = likelihood_bound(predict, x0, corruptible=corruptible, mask_id=MASK, samples=2)
    expected = -(JOINT / JOINT.sum(-1, keepdim=True))[tuple(x0.T)].log()
    expected[0] = 0
    torch.testing.assert_close(bound.nats, expected, rtol=0, atol=1e-9)
    assert (bound.standard_error < 1e-6).all()


def test_likelihood_bound_of_a_model_that_knows_nothing():
    """A uniform model: n/l * l * log 4, the same for every mask."""
    x0, _ = possible()
    every = torch.ones_like(x0, dtype=torch.bool)

    def uniform(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*where.shape, SYMBOLS)

    bound = likelihood_bound(uniform, x0, corruptible=every, mask_id=MASK, samples=5)
    torch.testing.assert_close(bound.nats, torch.full_like(bound.nats, LENGTH * math.log(SYMBOLS)))


def test_likelihood_bound_with_restricted_columns():
    x0, _ = possible()
    every = torch.ones_like(x0, dtype=torch.bool)
    plain, shifted = (
        likelihood_bound(
            lambda ids, where, first=first: predict(torch.where(ids == 99, MASK, ids - first), where),
            x0 + first, corruptible=every, mask_id=99, first_id=first, samples=8,
            generator=torch.Generator().manual_seed(0),
        )
        for first in (0, 10)
    )  # fmt: skip
    assert torch.equal(plain.nats, shifted.nats)


def test_likelihood_bound_bad_input():
    x0, _ = possible()
    every = torch.ones_like(x0, dtype=torch.bool)
    with pytest.raises(InputError, match="at least 2"):
        likelihood_bound(predict, x0, corruptible=every, mask_id=MASK, samples=1)


def corrupted_example(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, Corrupted]:
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randint(10, (5, 7), generator=generator)
    t = torch.tensor([[0.2], [0.4], [0.6], [0.9], [1.0]], dtype=dtype)
    corruptible = torch.rand(5, 7, generator=generator) < 0.8
    corrupted = mask(x0, t, corruptible=corruptible, mask_id=10, schedule=linear, generator=generator)
    return torch.randn(5, 7, 10, generator=generator, dtype=dtype), x0, corrupted


def test_denoising_loss_is_the_formula():
    logits, x0, corrupted = corrupted_example()
    log_p = logits.log_softmax(-1)
    terms = [[0.0] * 7 for _ in range(5)]
    for b, i in corrupted.supervised.nonzero().tolist():
        terms[b][i] = float(-corrupted.weight[b, i] * log_p[b, i, x0[b, i]])
    total = sum(map(sum, terms))
    count = int(corrupted.supervised.sum())
    lengths = torch.tensor([3, 4, 5, 6, 7])
    expected = {
        "tokens": total / count,
        "rows": total / 5,
        2.5: total / 2.5,
        torch.tensor(2.5): total / 2.5,
        lengths: sum(sum(row) / int(n) for row, n in zip(terms, lengths, strict=True)) / 5,
    }
    for normalizer, value in expected.items():
        assert float(denoising_loss(logits, x0, corrupted, normalizer)) == pytest.approx(value, rel=1e-12)


def test_asked_places_and_flat_rows_give_the_same_loss_and_gradient():
    logits, x0, corrupted = corrupted_example()
    logits.requires_grad_()
    where = supervised_places(corrupted.supervised)
    asked = logits.gather(1, where[..., None].expand(-1, -1, 10))
    flat = logits[corrupted.supervised]
    losses = [
        denoising_loss(logits, x0, corrupted, "rows"),
        denoising_loss(asked, x0, corrupted, "rows", where=where),
        denoising_loss(flat, x0, corrupted, "rows"),
        denoising_loss(logits, x0 + 6, corrupted, "rows", first_id=6),
    ]
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in losses]
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[0])
        torch.testing.assert_close(gradient, gradients[0])
    assert (gradients[0][~corrupted.supervised] == 0).all()


def test_two_heads_add_up():
    """One call per modality, each over its own places: the parts of one loss."""
    logits, x0, corrupted = corrupted_example()
    modality = (torch.arange(7) > 3).long().expand(5, 7)
    parts = []
    for kind in (0, 1):
        some = corrupted._replace(supervised=corrupted.supervised & (modality == kind))
        where = supervised_places(some.supervised)
        asked = logits.gather(1, where[..., None].expand(-1, -1, 10))
        parts.append(denoising_loss(asked, x0, some, "rows", where=where))
    torch.testing.assert_close(parts[0] + parts[1], denoising_loss(logits, x0, corrupted, "rows"))


def test_half_precision_logits_are_summed_in_float32():
    logits, x0, corrupted = corrupted_example(torch.float32)
    loss = denoising_loss(logits.bfloat16(), x0, corrupted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, denoising_loss(logits.bfloat16().float(), x0, corrupted))


def test_nothing_supervised_is_no_loss():
    logits, x0, corrupted = corrupted_example()
    empty = corrupted._replace(supervised=torch.zeros_like(corrupted.supervised))
    logits.requires_grad_()
    loss = denoising_loss(logits, x0, empty)
    loss.backward()
    assert loss == 0 and logits.grad is not None and (logits.grad == 0).all()
    assert supervised_places(empty.supervised).shape == (5, 1)


def test_denoising_loss_bad_input():
    logits, x0, corrupted = corrupted_example()
    with pytest.raises(ValueError, match="expected ids of the logits' columns"):
        denoising_loss(logits, x0, corrupted, first_id=6)
    with pytest.raises(ValueError, match="supervised places"):
        denoising_loss(logits[:, :3], x0, corrupted)
    with pytest.raises(ValueError, match="normalizer is 'mean'"):
        denoising_loss(logits, x0, corrupted, "mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one per row"):
        denoising_loss(logits, x0, corrupted, torch.ones(3))


def test_supervised_places():
    supervised = torch.tensor([[False, True, False, True], [True, False, False, False], [False] * 4])
    where = supervised_places(supervised)
    assert where.tolist() == [[1, 3], [0, 1], [0, 1]]
    _, _, corrupted = corrupted_example()
    where = supervised_places(corrupted.supervised)
    for row, places in zip(corrupted.supervised, where, strict=True):
        assert len(places.unique()) == len(places) and set(row.nonzero().flatten().tolist()) <= set(places.tolist())


def test_per_modality_schedules_weigh_their_own_places():
    x0 = torch.randint(10, (2, 6), generator=torch.Generator().manual_seed(0))
    modality = torch.tensor([0, 0, 0, 1, 1, 1]).expand(2, 6)
    schedule = by_modality(modality, text=linear, image=maskgit)
    every = torch.ones_like(x0, dtype=torch.bool)
    t = torch.full((2, 1), 0.5)
    generator = torch.Generator().manual_seed(0)
    corrupted = mask(x0, t, corruptible=every, mask_id=10, schedule=schedule, generator=generator)
    loss = denoising_loss(torch.zeros(2, 6, 10), x0, corrupted, "rows")
    text, picture = (int((corrupted.supervised & (modality == kind)).sum()) for kind in (0, 1))
    assert float(loss) == pytest.approx((2 * text + picture) * math.log(10) / 2, rel=1e-6)


def test_one_batch_of_every_task_is_each_row_alone():
    """Drawing, describing, answering, plain text, and words and picture together; text and image under their own."""
    words, answer = torch.tensor([20, 21, 22]), torch.tensor([23, 24])
    codes = torch.arange(4).view(2, 2)
    both = [text(words, editable=True), image(codes, 2, 2, VOCABULARY, editable=True)]
    canvases = [
        draw_canvas(words, codes, (2, 2), VOCABULARY),
        describe_canvas(codes, (2, 2), words, 5, VOCABULARY),
        ask_canvas(codes, (2, 2), words, answer, 4, VOCABULARY),
        interleave([text(words, editable=True)]),
        interleave(both),
    ]
    canvas, _ = batch(canvases, pad_id=VOCABULARY.pad_id)
    t = torch.tensor([0.7, 0.4, 0.9, 0.6, 0.8])[:, None]
    schedule = by_modality(canvas.modality, text=linear, image=cosine)
    chance = torch.Generator().manual_seed(3)
    settings = {"mask_id": VOCABULARY.mask_id, "schedule": schedule, "at_least_one": True, "generator": chance}
    corrupted = mask(canvas.ids, t, corruptible=canvas.editable, **settings)
    logits = torch.randn(*canvas.ids.shape, VOCABULARY.size, generator=chance, dtype=torch.float64)
    expected = []
    for row, alone in enumerate(canvases):
        length = len(alone.ids)
        one = Corrupted(*(part[row : row + 1, :length] for part in corrupted))
        assert set(one.x_t[0][one.supervised[0]].tolist()) == {VOCABULARY.mask_id}
        kinds = set(alone.modality[one.supervised[0]].tolist())
        assert kinds == [{IMAGE}, {TEXT}, {TEXT}, {TEXT}, {TEXT, IMAGE}][row]
        for kind, own in ((TEXT, linear), (IMAGE, cosine)):
            here = one.weight[0][one.supervised[0] & (alone.modality == kind)]
            torch.testing.assert_close(here, own.weight(t[row]).expand(len(here)).to(here))
        expected.append(denoising_loss(logits[row : row + 1, :length], alone.ids[None], one, "rows"))
    found = denoising_loss(logits, canvas.ids, corrupted, "rows")
    torch.testing.assert_close(found, torch.stack(expected).mean())


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_linear_cross_entropy_equals_the_plain_one(chunk):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(20, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (20,), generator=generator)
    weights = torch.rand(20, generator=generator, dtype=torch.float64) * 5
    fast = linear_cross_entropy(hidden, weight, targets, weights, chunk=chunk)
    slow = (F.cross_entropy(hidden @ weight.T, targets, reduction="none") * weights).sum()
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(loss / 3, (hidden, weight), retain_graph=True) for loss in (fast, slow))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, weights, chunk=chunk), fast)
    (only_hidden,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets, weights), hidden)
    torch.testing.assert_close(only_hidden, want[0] * 3)


def test_linear_cross_entropy_in_bfloat16_and_autocast():
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(32, 16, generator=generator, requires_grad=True)
    weight = torch.randn(9, 16, generator=generator, requires_grad=True)
    targets, weights = torch.randint(9, (32,), generator=generator), torch.ones(32)
    exact = linear_cross_entropy(hidden, weight, targets, weights)
    want = torch.autograd.grad(exact, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, weights)
    got = torch.autograd.grad(loss, (hidden, weight))
    assert loss.dtype == torch.float32 and got[0].dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    for one, other in zip(got, want, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_linear_cross_entropy_bad_input():
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[N\] and \[N\]"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3, dtype=torch.long), torch.ones(2))
    with pytest.raises(ValueError, match="expected ids"):
        linear_cross_entropy(torch.zeros(1, 3), torch.zeros(4, 3), torch.tensor([4]), torch.ones(1))

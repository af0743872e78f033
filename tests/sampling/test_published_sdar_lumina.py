"""SDAR's and Lumina-DiMOO's own draws and rules, and guidance away from two canvases: exact answers."""

import math

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import View
from mmdlm.sampling.predictors import guided, guided_by_each
from mmdlm.sampling.published_lumina import gumbel_of_masks, maskgit_of_masks
from mmdlm.sampling.published_sdar import dynamic, filtered, sequential, static


def view(confidence, masked=None, step=0, steps=4, n_start=None, where=None):
    confidence = torch.tensor(confidence)
    masked = torch.ones_like(confidence, dtype=torch.bool) if masked is None else torch.tensor(masked)
    rows, width = confidence.shape
    x = torch.zeros(rows, width, dtype=torch.long)
    where = torch.arange(width).expand(rows, width) if where is None else torch.tensor(where)
    count = masked.sum(1) if n_start is None else torch.tensor(n_start)
    return View(x, x, confidence, torch.zeros(rows, width, 2), masked, masked, where, count,
                torch.full((rows,), step), torch.full((rows,), steps), [torch.Generator()] * rows)


def test_filtered_is_sure_after_the_cut():
    logits = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]]).log()
    where = asked = torch.ones(1, 1, dtype=torch.long)

    def found(**settings):
        columns, sure = filtered(**settings)(logits, where, asked.bool(), [])
        return columns.tolist(), pytest.approx(sure.item())

    assert found() == ([[0]], 0.5)
    assert found(temperature=0.5) == ([[0]], 0.25 / (0.25 + 0.09 + 0.0225 + 0.0025))
    assert found(top_k=2) == ([[0]], 0.5 / 0.8)
    assert found(top_k=1) == ([[0]], 1.0)
    assert found(top_p=0.79) == ([[0]], 0.5 / 0.8)  # the column that goes past the share stays
    assert found(top_p=0.81) == ([[0]], 0.5 / 0.95)


def test_filtered_draws_once_for_the_whole_block():
    logits, where = torch.zeros(1, 2, 5), torch.tensor([[5, 7]])
    columns, sure = filtered(block_length=4, generator=torch.Generator().manual_seed(3))(
        logits, where, torch.tensor([[True, True]]), [])
    rows = torch.full((4, 5), 0.2)
    want = torch.multinomial(rows, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    assert columns.tolist() == [[int(want[1]), int(want[3])]] and sure[0].tolist() == pytest.approx([0.2, 0.2])


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_filtered_names_bad_settings(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        filtered(**settings)


def test_sdar_counts_by_the_block_and_not_by_its_masks():
    confidence = [[0.2, 0.9, 0.4, 0.3]]
    # 8 over 3 steps: 3, 3, 2
    assert static(block_length=8)(view(confidence, steps=3)).write.tolist() == [[False, True, True, True]]
    assert static(block_length=8)(view(confidence, steps=3, step=2)).write.tolist() == [[False, True, True, False]]


def test_sdar_dynamic_takes_the_sure_ones_if_they_are_enough():
    confidence = [[0.2, 0.9, 0.5, 0.3]]
    rule = dynamic(0.25, block_length=4)
    assert rule(view(confidence)).write.tolist() == [[False, True, True, True]]
    assert dynamic(0.5, block_length=4)(view(confidence)).write.tolist() == [[False, True, False, False]]  # not >=
    assert dynamic(0.5, block_length=8)(view(confidence)).write.tolist() == [[False, True, True, False]]
    with pytest.raises(InputError, match="tau"):
        dynamic(1.5, block_length=4)


def test_sdar_sequential_goes_from_the_first_mask():
    masked = [[False, True, False, True, True], [True, True, True, True, True]]
    got = sequential(block_length=6)(view([[0.1] * 5] * 2, masked, steps=2)).write
    assert got.tolist() == [[False, True, False, True, False], [True, True, True, False, False]]


def test_lumina_keeps_fewer_than_now_and_none_at_the_end():
    rule = maskgit_of_masks(generator=torch.Generator().manual_seed(0))
    confidence = [[0.1, 0.5, 0.4, 0.3, 0.2]]
    # 16 cos(pi / 20) = 15.8 and there are 5: one is written all the same
    assert rule(view(confidence, steps=10, n_start=[16])).write.tolist() == [[False, True, False, False, False]]
    assert rule(view(confidence, steps=10, n_start=[5], step=8)).write.sum() == 4  # 5 cos(9 pi / 20) = 0.8 -> 1
    assert rule(view(confidence, steps=10, n_start=[5], step=9)).write.all()


def test_lumina_takes_its_numbers_in_order():
    logits = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(1))
    asked = torch.tensor([[True, False, True]])
    random = torch.Generator().manual_seed(5)
    columns, sure = gumbel_of_masks(temperature=0.5, generator=random)(logits, torch.tensor([[0, 1, 2]]), asked, [])
    twin = torch.Generator().manual_seed(5)
    luck = torch.zeros(2, 4).uniform_(0, 1, generator=twin)
    want = (logits[asked] / 0.5 - (-luck.log()).log()).argmax(-1)
    assert columns[asked].tolist() == want.tolist()
    assert sure[asked].tolist() == pytest.approx(logits[asked].softmax(-1)[[0, 1], want].tolist())
    policy = maskgit_of_masks(temperature=0.0, generator=random)
    policy(view([[0.5, 0.4, 0.3]]))
    torch.zeros(3).uniform_(0, 1, generator=twin)
    assert torch.equal(random.get_state(), twin.get_state())  # drawn at temperature 0 too
    with pytest.raises(InputError, match="temperature"):
        gumbel_of_masks(temperature=-1)


def test_guidance_away_from_two_canvases():
    def says(value):
        return lambda ids, where: torch.full((*where.shape, 2), float(value))

    same = lambda ids, where: (ids, where)  # noqa: E731
    ids, where = torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1]])
    both = guided_by_each(says(10), [(says(4), 3.0, same), (says(7), torch.tensor([1.5]), same)])
    assert both(ids, where).tolist() == [[[10 + 2 * 6 + 0.5 * 3] * 2]]
    one = guided_by_each(says(10), [(says(4), 3.0, same)])
    assert torch.equal(one(ids, where), guided(says(10), says(4), 3.0, other=same)(ids, where))
    shut = guided_by_each(says(-math.inf), [(says(-math.inf), 3.0, same)])
    assert shut(ids, where).tolist() == [[[-math.inf] * 2]]

"""Policies that touch written places, and mixtures of policies: exact answers on two places of four symbols."""

import itertools

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sampling import policies
from mmdlm.sampling.denoise import View, denoise
from mmdlm.sampling.draws import categorical, greedy
from mmdlm.sampling.mixtures import by_modality, draw_by_modality, draw_per_row, per_row

SYMBOLS, MASK = 4, 4
JOINT = torch.tensor([[14.0, 1, 1, 3], [1, 6, 1, 2], [1, 0.5, 7, 0.5], [1, 0.5, 3, 9.5]], dtype=torch.float64)
JOINT /= JOINT.sum()
BOUND = 37.7  # chi-square with 15 degrees of freedom exceeds it once in 1000 times


def conditional(given: int, place: int) -> torch.Tensor:
    joint = JOINT if place == 0 else JOINT.T
    row = joint.sum(1) if given == MASK else joint[:, given]
    return row / row.sum()


TABLES = torch.stack([torch.stack([conditional(given, place) for given in range(5)]) for place in (0, 1)])


def oracle(ids, where):
    """p(token | the other place), which never looks at the place itself: what a perfect editor or verifier says."""
    return TABLES[where, ids.gather(1, 1 - where)].log()


def run(policy, x, predict=oracle, steps=None, **kwargs):
    kwargs.setdefault("editable", torch.ones_like(x, dtype=torch.bool))
    return list(denoise(predict, x, policy, mask_id=MASK, steps=steps, revise=True, **kwargs))


def view(x, x0, confidence, logits=None, step=0, steps=4):
    """One row, every place editable."""
    x, x0 = torch.tensor([x]), torch.tensor([x0])
    some = torch.zeros(1, x.shape[1], SYMBOLS, dtype=torch.float64) if logits is None else logits
    everywhere = torch.ones_like(x, dtype=torch.bool)
    where = torch.arange(x.shape[1]).unsqueeze(0)
    return View(x, x0, torch.tensor([confidence]), some, x == MASK, everywhere, where, (x == MASK).sum(1),
                torch.tensor([step]), torch.tensor([steps]), [torch.Generator().manual_seed(0)])


def drawn(states):
    last = states[-1]
    return torch.bincount(last.x[:, 0] * SYMBOLS + last.x[:, 1], minlength=16).view(4, 4)


def chi_square(counts, exact):
    expected = exact * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# ---------------------------------------------------------------- edits


def test_edits_rewrite_where_the_model_is_sure_of_something_else():
    policy = policies.with_edits(policies.threshold(0.9), tau=0.8)
    #                    masked, masked, same,   edited, unsure
    decision = policy(view([MASK, MASK, 1, 1, 1], [0, 0, 1, 2, 2], [0.95, 0.5, 0.99, 0.8, 0.79]))
    assert decision.write.tolist() == [[True, False, False, True, False]]
    assert decision.settled.tolist() == [False] and decision.remask is None
    assert policy(view([1, 1], [1, 2], [0.9, 0.7])).settled.tolist() == [True]


def test_edits_end_where_nothing_changes_any_more():
    # beside a 1 a 1 is likeliest (6 / 8); beside a mask nothing is surer than 17 / 52: one pass, though 8 are allowed
    states = run(policies.with_edits(policies.threshold(0.5), tau=0.5), torch.tensor([[MASK, 1]]), steps=8)
    assert [state.x.tolist() for state in states] == [[[1, 1]]]
    # at 0.3 the second place is rewritten in the first pass, to 0, and the end is another
    states = run(policies.with_edits(policies.threshold(0.5), tau=0.3), torch.tensor([[MASK, 1]]), steps=3)
    assert [state.x.tolist() for state in states] == [[[1, 0]], [[0, 1]], [[1, 0]]]
    # what may not be edited stays, whatever the model thinks of it
    kept = run(policies.with_edits(policies.top_k(), tau=0.5), torch.tensor([[MASK, 1]]),
               editable=torch.tensor([[True, False]]), steps=8)[-1]
    assert kept.x[0, 1] == 1


def test_edits_of_every_draw_are_parallel_gibbs_steps():
    """tau near 0 and a categorical draw: after the fill each pass redraws both places given the other."""
    steps = 3
    # from (mask, 0): the first pass writes place 0 given 0, and rewrites place 1 beside a mask
    exact = start = TABLES[0, 0].unsqueeze(1) * TABLES[1, MASK]
    for _ in range(steps - 1):
        after = torch.zeros(4, 4, dtype=torch.float64)
        for a, b in itertools.product(range(4), range(4)):
            after += exact[a, b] * TABLES[0, b].unsqueeze(1) * TABLES[1, a]
        exact = after
    policy = policies.with_edits(policies.threshold(1e-9), tau=1e-9)
    x = torch.tensor([[MASK, 0]]).repeat(6000, 1)
    counts = drawn(run(never_settled(policy), x, steps=steps, draw=categorical(),
                       generator=torch.Generator().manual_seed(0)))
    assert chi_square(counts, exact) < BOUND
    assert chi_square(counts, start) > BOUND


def never_settled(policy):
    return lambda view: policy(view)._replace(settled=None)


# ---------------------------------------------------------------- draft wide, verify, take back


def test_revoke_by_hand():
    likely = torch.full((1, 5, SYMBOLS), 0.1, dtype=torch.float64)
    likely[0, 2] = torch.tensor([0.02, 0.95, 0.02, 0.01])  # stands: 1, sure
    likely[0, 3] = torch.tensor([0.60, 0.30, 0.05, 0.05])  # stands: 1, doubted
    likely[0, 4] = torch.tensor([0.70, 0.20, 0.05, 0.05])  # stands: 1, doubted most
    seen = view([MASK, MASK, 1, 1, 1], [0, 0, 1, 0, 0], [0.7, 0.8, 0.95, 0.6, 0.7], likely.log())
    decision = policies.revoke(draft=0.6, verify=0.9)(seen)
    assert decision.write.tolist() == [[True, True, False, False, False]]
    assert decision.remask.tolist() == [[False, False, False, False, True]]  # fewer than are written, the worst first
    one = policies.revoke(draft=0.75, verify=0.9)(seen)
    assert one.write.tolist() == [[False, True, False, False, False]] and not one.remask.any()


def test_revoke_reads_the_columns_of_a_restricted_head():
    likely = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]]])
    seen = view([MASK, MASK, 12], [11, 11, 10], [0.9, 0.9, 0.97], likely.double().log())._replace(first_id=10)
    seen = seen._replace(masked=torch.tensor([[True, True, False]]))
    assert policies.revoke(draft=0.6, verify=0.9)(seen).remask.tolist() == [[False, False, True]]


def test_revoke_takes_back_what_the_rest_contradicts():
    """Four places that should be equal; the draft's zeros are doubted once the twos stand beside them."""

    def predict(ids, where):
        others = torch.stack([(ids == symbol).sum(1, keepdim=True) - (ids.gather(1, where) == symbol).long()
                              for symbol in range(SYMBOLS)], -1).double()
        prior = torch.tensor([[0.4, 0.0, 0.0, 0.0], [0.4, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 5.0, 0.0]])
        return prior.double()[where] + 2.0 * others

    x = torch.full((1, 4), MASK)
    plain = list(denoise(predict, x, policies.threshold(0.3), editable=x == MASK, mask_id=MASK, steps=None))[-1]
    assert plain.x.tolist() == [[0, 0, 2, 2]]
    states = run(policies.revoke(draft=0.3, verify=0.9), x, predict, steps=None)
    assert states[-1].x.tolist() == plain.x.tolist()  # all is written in one pass, so there is none left to verify
    held = run(policies.revoke(draft=0.35, verify=0.9), torch.tensor([[0, 0, MASK, MASK]]), predict,
               editable=torch.tensor([[True, True, True, True]]), steps=4)
    assert held[0].x.tolist() == [[MASK, 0, 2, 2]] and held[-1].x.tolist() == [[2, 0, 2, 2]]


def test_revoke_always_ends():
    """A verifier that doubts everything: still a mask fewer after every pass, and none in the end."""

    def predict(ids, where):
        return torch.zeros(*where.shape, SYMBOLS)

    states = run(policies.revoke(draft=0.2, verify=1.0), torch.full((2, 7), MASK), predict, steps=None)
    left = [int((state.x == MASK).sum(1).max()) for state in states]
    assert left[-1] == 0 and all(a > b for a, b in itertools.pairwise(left))


# ---------------------------------------------------------------- kinds of places, and rows, under rules of their own


def places(ids, where):
    """A logit table by position: the further left, the surer of token 0."""
    logits = torch.zeros(*where.shape, SYMBOLS)
    logits[..., 0] = 3 - where / 8
    return logits


def test_each_modality_follows_its_own_counts():
    x = torch.full((1, 12), MASK)
    modality = torch.tensor([[0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1]])
    mixed = by_modality(modality, x == MASK, text=policies.top_k(), image=policies.maskgit())
    states = list(denoise(places, x, mixed, editable=x == MASK, mask_id=MASK, steps=4))
    left = [[int((state.x == MASK)[modality == kind].sum()) for kind in (0, 1)] for state in states]
    assert left == [[3, 7], [2, 5], [1, 3], [0, 0]]  # 4 evenly; 8 by floor(8 cos(pi k / 8)) = 7.39, 5.66, 3.06


@pytest.mark.parametrize("seed", [0, 1])
def test_a_modality_in_a_mixture_is_what_it_is_alone(seed):
    """Where the kinds do not see each other, the text of the mixture is the text by itself, noise included."""
    text, image = policies.top_k(confidence="random"), policies.threshold(0.5)
    modality = torch.tensor([[1, 0, 1, 0, 0, 1, 0, 0]])
    x = torch.full((1, 8), MASK)

    def once(policy, draw, editable):
        *_, last = denoise(places, x, policy, editable=editable, mask_id=MASK, steps=3, draw=draw,
                           generator=[torch.Generator().manual_seed(seed)])
        return last.x

    both = once(by_modality(modality, x == MASK, text=text, image=image),
                draw_by_modality(modality, text=categorical(), image=greedy), torch.ones_like(x, dtype=torch.bool))
    alone = once(text, categorical(), modality == 0)
    assert torch.equal(both[modality == 0], alone[modality == 0])
    assert not bool((both == MASK).any()) and both[modality == 1].eq(0).all()


def test_by_modality_with_blocks_counts_within_the_block():
    x, modality = torch.full((1, 8), MASK), torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1]])
    block_of = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    mixed = by_modality(modality, x == MASK, text=policies.top_k(), image=policies.top_k(), block_of=block_of)
    states = list(denoise(places, x, mixed, editable=x == MASK, mask_id=MASK, steps=4, block=block_of))
    assert [int((state.x == MASK).sum()) for state in states] == [6, 4, 2, 0]


def test_rows_with_settings_of_their_own_are_as_they_are_alone():
    rules = [policies.threshold(0.5), policies.maskgit(choice_temperature=1.0), policies.top_k(confidence="random")]
    rules.append(rules[0])
    draws = [greedy, categorical(), categorical(temperature=0.5), greedy]
    x = torch.full((4, 9), MASK)
    x[1, 4:], x[3, :2] = 2, 1
    steps = torch.tensor([2, 3, 4, 1])
    states = list(denoise(places, x, per_row(rules), editable=x == MASK, mask_id=MASK, steps=steps,
                          draw=draw_per_row(draws), generator=[torch.Generator().manual_seed(i) for i in range(4)]))
    for row in range(4):
        alone = list(denoise(places, x[row : row + 1], rules[row], editable=x[row : row + 1] == MASK, mask_id=MASK,
                             steps=steps[row : row + 1], draw=draws[row],
                             generator=[torch.Generator().manual_seed(row)]))
        assert torch.equal(states[-1].x[row], alone[-1].x[0])
        assert torch.equal(states[len(alone) - 1].x[row], alone[-1].x[0])  # and in as many passes


def test_one_rule_for_each_row():
    x = torch.full((2, 3), MASK)
    for settings in ({"policy": per_row([policies.top_k()])},
                     {"policy": policies.top_k(), "draw": draw_per_row([greedy] * 3)}):
        with pytest.raises(InputError, match="expected one for each row"):
            next(denoise(places, x, editable=x == MASK, mask_id=MASK, steps=2, **settings))
    with pytest.raises(ValueError, match="by_modality got modality"):
        by_modality(torch.zeros(1, 3), x == MASK, text=policies.top_k(), image=policies.top_k())


def test_the_rule_that_edits_go_with_may_be_a_name():
    named, spelled = (policies.policy_from_config({"name": "with_edits", "policy": rule})
                      for rule in ("threshold", {"name": "threshold"}))
    x = torch.full((4, 2), MASK)
    assert torch.equal(run(named, x, steps=3)[-1].x, run(spelled, x, steps=3)[-1].x)
    with pytest.raises(InputError, match="policy is 3, expected a rule"):
        policies.with_edits(3)
    with pytest.raises(InputError, match=r"the policy \{'tau': 0.9\} has no name, expected one of maskgit"):
        policies.policy_from_config({"tau": 0.9})

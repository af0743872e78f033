"""Policies: exact answers on a world of two tokens, and counts by hand."""

import itertools

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.sampling import policies
from mmdlm.sampling.denoise import View, denoise
from mmdlm.sampling.draws import categorical
from mmdlm.schedules import schedule_by_name

# ---------------------------------------------------------------- two places, four symbols, the joint table known

SYMBOLS, MASK = 4, 4
# no two of the eight marginal sums are equal: 19, 10, 9, 14 by row and 17, 8, 12, 15 by column
JOINT = torch.tensor([[14.0, 1, 1, 3], [1, 6, 1, 2], [1, 0.5, 7, 0.5], [1, 0.5, 3, 9.5]], dtype=torch.float64)
JOINT /= JOINT.sum()


def table(given: int, place: int) -> torch.Tensor:
    """p(token at `place` | the other place is `given`), given may be MASK."""
    joint = JOINT if place == 0 else JOINT.T
    row = joint.sum(1) if given == MASK else joint[:, given]
    return row / row.sum()


TABLES = torch.stack([torch.stack([table(given, place) for given in range(5)]) for place in (0, 1)])


def oracle(ids, where):
    """The exact conditional; the mask token's own column carries a large logit that must not matter."""
    logits = TABLES[where, ids.gather(1, 1 - where)].log()
    return torch.cat([logits, torch.full_like(logits[..., :1], 9.0)], -1)


def drawn_counts(policy, steps, rows=6000, seed=0, **kwargs):
    x = torch.full((rows, 2), MASK)
    *_, last = denoise(oracle, x, policy, editable=x == MASK, mask_id=MASK, steps=steps, draw=categorical(),
                       generator=torch.Generator().manual_seed(seed), **kwargs)
    return torch.bincount(last.x[:, 0] * SYMBOLS + last.x[:, 1], minlength=16).view(4, 4)


def exact_chain(steps, alpha, sigma):
    """The distribution after all passes of: masked -> written with the ReMDM odds, written -> masked with sigma(k)."""
    now = {(MASK, MASK): 1.0}
    for k in range(steps):
        t, s = (torch.tensor(1 - i / steps, dtype=torch.float64) for i in (k, k + 1))
        again = sigma(alpha(t), alpha(s)) if k < steps - 1 else 0.0
        odds = float((alpha(s) - (1 - again) * alpha(t)) / (1 - alpha(t))) if k < steps - 1 else 1.0
        after: dict = {}
        for state, p in now.items():
            choices = []
            for place in (0, 1):
                if state[place] == MASK:
                    row = TABLES[place, state[1 - place]].tolist()
                    choices.append([(MASK, 1 - odds)] + [(v, odds * q) for v, q in enumerate(row)])
                else:
                    choices.append([(MASK, again), (state[place], 1 - again)])
            for (a, pa), (b, pb) in itertools.product(*choices):
                after[a, b] = after.get((a, b), 0.0) + p * float(pa) * float(pb)
        now = after
    return torch.tensor([[now.get((a, b), 0.0) for b in range(4)] for a in range(4)], dtype=torch.float64)


def chi_square(counts, exact):
    expected = exact * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


BOUND = 37.7  # chi-square with 15 degrees of freedom exceeds it once in 1000 times


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_ancestral_has_the_exact_distribution(steps):
    # linear: each place is written in any of the passes alike, so both in the same one with probability 1 / steps
    product = JOINT.sum(1, keepdim=True) * JOINT.sum(0)
    exact = product / steps + JOINT * (1 - 1 / steps)
    counts = drawn_counts(policies.ancestral(schedule="linear"), steps)
    assert chi_square(counts, exact) < BOUND
    torch.testing.assert_close(exact, exact_chain(steps, schedule_by_name("linear").alpha, lambda *_: 0.0))


def test_ancestral_follows_its_schedule():
    exact = exact_chain(3, schedule_by_name("cosine").alpha, lambda *_: 0.0)
    assert chi_square(drawn_counts(policies.ancestral(schedule="cosine"), 3), exact) < BOUND


@pytest.mark.parametrize("confidence", ["random", "margin", "entropy"])
def test_one_token_per_pass_is_the_chain_rule(confidence):
    # measures that do not look at the draw: which place goes first cannot favour a token
    assert chi_square(drawn_counts(policies.top_k(confidence=confidence), 2), JOINT) < BOUND


def test_ranking_by_the_drawn_tokens_probability_favours_likely_tokens():
    counts = drawn_counts(policies.top_k(confidence="probability"), 2)
    assert chi_square(counts, JOINT) > BOUND
    # exactly: both are drawn from the marginals and the surer one (the first if equal) is written, then the other anew
    rows, columns = TABLES[0, MASK], TABLES[1, MASK]
    exact = torch.zeros(4, 4, dtype=torch.float64)
    for a, b in itertools.product(range(4), range(4)):
        if rows[a] >= columns[b]:
            exact[a] += rows[a] * columns[b] * TABLES[1, a]
        else:
            exact[:, b] += rows[a] * columns[b] * TABLES[0, b]
    assert chi_square(counts, exact) < BOUND


@pytest.mark.parametrize(("rule", "eta"), [("cap", 0.8), ("rescale", 0.9)])
def test_remdm_has_the_exact_distribution(rule, eta):
    def sigma(alpha_t, alpha_s):
        most = min(1.0, float((1 - alpha_s) / alpha_t)) if alpha_t > 0 else 1.0
        return min(eta, most) if rule == "cap" else eta * most

    exact = exact_chain(4, schedule_by_name("linear").alpha, sigma)
    counts = drawn_counts(policies.remdm(eta=eta, rule=rule), 4, revise=True)
    assert chi_square(counts, exact) < BOUND
    # and the test can tell: without remasking the distribution is another one
    assert chi_square(counts, exact_chain(4, schedule_by_name("linear").alpha, lambda *_: 0.0)) > BOUND


def test_remdms_loop_has_the_exact_distribution():
    """Linear, t_on 0.8, t_off 0.2, alpha_on 0.7, by hand: a line up to 0.7, level with remasking, a line up to 1."""
    steps = 5

    def alpha(t):
        t = float(t)
        up = 0.7 * (1 - t) / 0.2 if t > 0.8 else 0.7 if t > 0.2 else 0.7 + 0.3 * (1 - t / 0.2)
        return torch.tensor(up, dtype=torch.float64)

    sigmas = [0.0, 0.3, 0.3, 0.3]  # at t = 1, 0.8, 0.6, 0.4; at 0.2 all that is masked is written
    exact = exact_chain(steps, alpha, lambda *_: sigmas.pop(0))
    policy = policies.remdm(rule="loop", eta=0.3, t_on=0.8, t_off=0.2, alpha_on=0.7)
    counts = drawn_counts(policy, steps, revise=True)
    assert chi_square(counts, exact) < BOUND
    assert chi_square(counts, exact_chain(steps, alpha, lambda *_: 0.0)) > BOUND


def test_remdm_with_eta_zero_is_ancestral():
    remasked = drawn_counts(policies.remdm(eta=0.0), 4, rows=500)
    assert torch.equal(remasked, drawn_counts(policies.ancestral(), 4, rows=500))


# ---------------------------------------------------------------- counts by hand


def flat(ids, where):
    """The further left, the surer; column 0 always wins."""
    logits = torch.zeros(*where.shape, 6)
    logits[..., 0] = 5 - where / 32
    return logits


def masks_left(policy, masked, steps, predict=flat, **kwargs):
    """Masks after each pass, per row; `masked` masks per row."""
    x = torch.where(torch.arange(max(masked)) < torch.tensor(masked).unsqueeze(1), 5, 0)
    states = denoise(predict, x, policy, editable=x == 5, mask_id=5, steps=steps, **kwargs)
    return torch.stack([(state.x == 5).sum(1) for state in states], 1).tolist()


def test_maskgit_counts():
    # floor(16 cos(pi k / 8)): 14.78, 11.31, 6.12, 0; floor(16 (1 - k / 4))
    assert masks_left(policies.maskgit(), [16], 4) == [[14, 11, 6, 0]]
    assert masks_left(policies.maskgit(schedule="linear"), [16], 4) == [[12, 8, 4, 0]]
    # cos(pi / 3) = 1 / 2 in exact arithmetic: 8 of 16 after the 4th of 6
    assert masks_left(policies.maskgit(), [16], 6) == [[15, 13, 11, 8, 4, 0]]
    # fewer masks than steps: one per pass, and the row is done early; rows side by side as alone
    assert masks_left(policies.maskgit(), [3, 16], torch.tensor([12, 4])) == [[2, 1, 0, 0], [14, 11, 6, 0]]


@pytest.mark.parametrize(
    ("decay", "scales"),
    [("linear", [0.8, 0.6, 0.4, 0.2, 0]), ("product", [0.8, 0.48, 0.192, 0.0384, 0]), ("constant", [1] * 5)],
)
def test_maskgit_temperature_decay(decay, scales):
    """The noise is scale * Gumbel: recovered from which places are written, with the same noise drawn again."""
    places = 40

    def view(step):
        generator = torch.Generator().manual_seed(step)
        asked = torch.ones(1, places, dtype=torch.bool)
        confidence = torch.linspace(0.9, 0.1, places).unsqueeze(0)
        zeros = torch.zeros(1, places, dtype=torch.long)
        return View(zeros, zeros, confidence, torch.zeros(1, places, 2), asked, asked, zeros,
                    torch.tensor([places]), torch.tensor([step]), torch.tensor([5]), [generator])

    for step, scale in enumerate(scales):
        written = policies.maskgit(choice_temperature=2.0, decay=decay)(view(step)).write[0]
        uniform = torch.rand(places, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        score = view(step).confidence[0].log() - 2.0 * scale * (-uniform.log()).log()
        best = score.argsort(descending=True)[: int(written.sum())]
        assert set(written.nonzero().flatten().tolist()) == set(best.tolist())


def test_top_k_splits_evenly_with_the_remainder_first():
    assert masks_left(policies.top_k(), [10, 8, 3], torch.tensor([4, 4, 4])) == [
        [7, 4, 2, 0], [6, 4, 2, 0], [2, 1, 0, 0]]
    # 12 places in blocks of 6 with 4 steps each: 2, 2, 1, 1, twice
    assert masks_left(policies.top_k(), [12], 8, block=6) == [[10, 8, 7, 6, 4, 2, 1, 0]]


def first_written(policy, logits, **kwargs):
    """The places written in the first pass, [W] masked places with logits [W, V]; the mask is outside the columns."""
    x = torch.full((1, len(logits)), 9)
    state = next(denoise(lambda ids, where: logits[where[0]].unsqueeze(0), x, policy, editable=x == 9, mask_id=9,
                         steps=kwargs.pop("steps", None), **kwargs))
    return state.written[0].nonzero().flatten().tolist()


def test_top_k_measures_rank_differently():
    logits = torch.tensor([[0.50, 0.45, 0.05], [0.48, 0.26, 0.26], [0.47, 0.43, 0.10]]).log()
    logits = torch.cat([logits, torch.tensor([[0.45, 0.45, 0.10]]).log()])
    assert first_written(policies.top_k(), logits) == [0]
    assert first_written(policies.top_k(confidence="margin"), logits) == [1]
    assert first_written(policies.top_k(confidence="entropy"), logits) == [0]
    flat_random = {first_written(policies.top_k(confidence="random"), logits,
                                 generator=torch.Generator().manual_seed(seed))[0] for seed in range(30)}
    assert flat_random == {0, 1, 2, 3}


def test_ties_go_to_the_left():
    assert first_written(policies.top_k(), torch.zeros(6, 4), steps=3) == [0, 1]
    assert first_written(policies.threshold(0.9), torch.zeros(6, 4)) == [0]


def with_confidences(*confidences):
    """Two columns: the greater one has the given probability."""
    c = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([c, 1 - c], 1).log()


def test_threshold_writes_the_sure_ones_or_the_best():
    assert first_written(policies.threshold(0.8), with_confidences(0.6, 0.9, 0.8, 0.7)) == [1, 2]
    assert first_written(policies.threshold(0.95), with_confidences(0.6, 0.9, 0.8, 0.7)) == [1]


def test_threshold_counts_forwards():
    # exp(5 - p / 32) / (exp(5 - p / 32) + 4): 0.974 at place 0, falling; all of them above 0.95, none above 0.98
    assert masks_left(policies.threshold(0.95), [8], None) == [[0]]
    assert masks_left(policies.threshold(0.98), [8], None) == [[7, 6, 5, 4, 3, 2, 1, 0]]
    assert masks_left(policies.threshold(0.95), [8], None, block=4) == [[4, 0]]
    # a limit on the passes: the rest is written in the last
    assert masks_left(policies.threshold(0.98), [8], 3) == [[7, 6, 0]]


def test_factor_by_hand():
    # (n + 1)(1 - c_n) <= 1 asks c_2 >= 2/3, c_3 >= 3/4, c_4 >= 4/5
    assert first_written(policies.factor(1.0), with_confidences(0.55, 0.95, 0.7, 0.76, 0.6)) == [1, 3]
    assert first_written(policies.factor(1.0), with_confidences(0.9, 0.8, 0.78, 0.79)) == [0, 1, 3]
    assert first_written(policies.factor(1.0, accept_last=True), with_confidences(0.9, 0.8, 0.76, 0.79)) == [0, 1, 2, 3]
    assert first_written(policies.factor(1.0, accept_last=True), with_confidences(0.9, 0.6, 0.6)) == [0]
    assert first_written(policies.factor(1.0), with_confidences(0.51)) == [0]


def test_entropy_bound_by_hand():
    def entropy(c):
        return float(-(c * torch.tensor(c).log() + (1 - c) * torch.tensor(1 - c).log()))

    logits = with_confidences(0.9, 0.99, 0.6, 0.95)  # in order of entropy: places 1, 3, 0, 2
    two, three = entropy(0.99), entropy(0.99) + entropy(0.95)
    assert first_written(policies.entropy_bound(0.0), logits) == [1]
    assert first_written(policies.entropy_bound(two + 1e-6), logits) == [1, 3]
    assert first_written(policies.entropy_bound(three + 1e-6), logits) == [0, 1, 3]
    assert first_written(policies.entropy_bound(9.0), logits) == [0, 1, 2, 3]
    certain = torch.tensor([[0.0, -torch.inf], [0.0, -torch.inf], [0.0, 0.0]])
    assert first_written(policies.entropy_bound(0.0), certain) == [0, 1, 2]


# ---------------------------------------------------------------- from a preset


def test_policy_and_draw_from_config():
    maskgit = policies.policy_from_config({"name": "maskgit", "schedule": "linear"})
    assert masks_left(maskgit, [16], 4) == [[12, 8, 4, 0]]
    assert masks_left(policies.policy_from_config({"name": "threshold", "tau": 0.95}), [8], None) == [[0]]
    logits = torch.tensor([[[0.0, 1.0, 0.5]]])
    asked, where = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    for config in ({"name": "greedy"}, {"name": "categorical", "temperature": 0}, {"name": "categorical", "top_k": 1}):
        columns, confidence = policies.draw_from_config(config)(logits, where, asked, [torch.Generator()])
        assert columns.item() == 1
        torch.testing.assert_close(confidence[0, 0], logits.softmax(-1)[0, 0, 1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: policies.policy_from_config({"name": "treshold"}), "did you mean threshold"),
        (lambda: policies.policy_from_config({"tau": 0.5}), "has no name, expected one of maskgit"),
        (lambda: policies.policy_from_config({"name": "threshold", "tao": 0.5}), "did you mean tau"),
        (lambda: policies.policy_from_config({"name": "threshold", "tau": 1.5}), "tau is 1.5"),
        (lambda: policies.policy_from_config({"name": "threshold", "tau": "high"}), "cannot be made of"),
        (lambda: policies.policy_from_config({"name": "with_edits"}), "with_edits cannot be made of"),
        (lambda: policies.policy_from_config({"name": "with_edits", "policy": {"name": "top"}}), "did you mean top_k"),
        (lambda: policies.with_edits({"name": "top_k"}, tau=0), "tau is 0"),
        (lambda: policies.policy_from_config({"name": "revoke", "draft": 2.0}), "draft is 2.0"),
        (lambda: policies.policy_from_config({"name": "remdm", "rule": "loop", "t_on": 0.01}), "t_off is 0.05"),
        (lambda: policies.policy_from_config({"name": "remdm", "rule": "loop", "alpha_on": 1.0}), "alpha_on is 1.0"),
        (lambda: policies.policy_from_config({"name": "maskgit", "decay": "fast"}), "decay is 'fast'"),
        (lambda: policies.policy_from_config({"name": "maskgit", "schedule": "cosin"}), "cosine"),
        (lambda: policies.policy_from_config({"name": "top_k", "confidence": "margn"}), "did you mean margin"),
        (lambda: policies.draw_from_config({"name": "categorial"}), "did you mean categorical"),
        (lambda: policies.draw_from_config({"name": "categorical", "temperature": -1}), "temperature is -1"),
        (lambda: policies.draw_from_config({"name": "categorical", "top_p": 0}), "top_p is 0"),
        (lambda: policies.draw_from_config({"name": "categorical", "top_k": 0}), "top_k is 0"),
        (lambda: policies.draw_from_config({"name": "greedy", "temperature": 1}), "no settings"),
    ],
)
def test_bad_settings_are_named(build, message):
    with pytest.raises(InputError, match=message):
        build()

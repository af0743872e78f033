"""The exact odds of candidates on a world that is known, and places that may not become just anything."""

import itertools

import torch

from mmdlm.sampling.choices import chain_log_probability, without

SYMBOLS, MASK = 3, 3
JOINT = torch.tensor([4.0, 1, 2, 3, 5, 1, 2, 2, 6, 1, 3, 2, 4, 1, 5, 2, 3, 1, 2, 6, 1, 4, 2, 2, 3, 5, 1],
                     dtype=torch.float64).view(3, 3, 3)
JOINT /= JOINT.sum()


def oracle(ids, where):
    """The exact conditional of three places; the mask's column carries a large logit that must not matter."""
    answers = []
    for row, place in zip(ids.tolist(), where[:, 0].tolist(), strict=True):
        kept = [slice(None) if at == place or token == MASK else slice(token, token + 1)
                for at, token in enumerate(row)]
        marginal = JOINT[tuple(kept)].sum(dim=[at for at in range(3) if at != place])
        answers.append(torch.cat([(marginal / marginal.sum()).log(), torch.tensor([9.0], dtype=torch.float64)]))
    return torch.stack(answers).unsqueeze(1)


def test_the_chain_of_conditionals_is_the_joint():
    candidates = torch.tensor(list(itertools.product(range(3), repeat=3)))
    found = chain_log_probability(oracle, candidates, torch.ones_like(candidates, dtype=torch.bool), mask_id=MASK)
    torch.testing.assert_close(found, JOINT.flatten().log())
    # given the first place; the last one unknown
    pairs = torch.tensor([[1, b, MASK] for b in range(3)])
    scored = torch.tensor([False, True, False]).expand(3, 3)
    expected = (JOINT[1].sum(1) / JOINT[1].sum()).log()
    torch.testing.assert_close(chain_log_probability(oracle, pairs, scored, mask_id=MASK), expected)


def test_equal_questions_are_asked_once_and_chunks_change_nothing():
    asked = []

    def counting(ids, where):
        asked.append(len(ids))
        return oracle(ids, where)

    candidates = torch.tensor([[a, 2, 1] for a in range(3)])
    scored = torch.tensor([True, False, False]).expand(3, 3)
    found = chain_log_probability(counting, candidates, scored, mask_id=MASK)
    assert asked == [1]
    torch.testing.assert_close(found.exp(), JOINT[:, 2, 1] / JOINT[:, 2, 1].sum())
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    whole = torch.ones_like(every, dtype=torch.bool)
    small = chain_log_probability(oracle, every, whole, mask_id=MASK, rows_at_once=2)
    torch.testing.assert_close(small, chain_log_probability(oracle, every, whole, mask_id=MASK))


def test_columns_that_do_not_begin_at_zero():
    shifted = chain_log_probability(lambda ids, where: oracle(ids - 10, where)[..., :3], torch.tensor([[11, 12, 10]]),
                                    torch.tensor([[True, True, True]]), mask_id=MASK + 10, first_id=10)
    torch.testing.assert_close(shifted.exp()[0], JOINT[1, 2, 0])


def test_shut_ids():
    def predict(ids, where):
        return torch.zeros(*where.shape, 4)

    places = torch.tensor([[False, True, True]])
    logits = without(predict, places, [11, 13, 99], first_id=10)(torch.zeros(1, 3), torch.tensor([[0, 2]]))
    assert logits.tolist() == [[[0, 0, 0, 0], [0, -torch.inf, 0, -torch.inf]]]

"""The loop: its guarantees on rows, blocks, steps and states, with real policies and small exact predictors."""

import pytest
import torch

from mmdlm.attention import full as attention_full
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling import policies, predictors
from mmdlm.sampling.denoise import Decision, State, View, denoise, passes
from mmdlm.sampling.draws import categorical, greedy
from mmdlm.vocabulary import Vocabulary

MASK = 9


def canvas(*rows):
    """Rows written as strings: digits are given, `_` is masked and editable; padded on the right with 8."""
    length = max(map(len, rows))
    ids = [[MASK if c == "_" else int(c) for c in row.ljust(length, "8")] for row in rows]
    x = torch.tensor(ids)
    return x, x == MASK


def count_up(ids, where):
    """Prefers token (position + visible sum) mod 8, the surer the further left; and above all the mask token."""
    token = (where + (ids.masked_fill(ids == MASK, 0)).sum(1, keepdim=True)) % 8
    logits = torch.zeros(*where.shape, 10)
    logits.scatter_(2, token.unsqueeze(-1), 4 - 0.1 * where.unsqueeze(-1).float())
    logits[..., MASK] = 50.0
    return logits


def run(x, policy, editable, **kwargs):
    kwargs = {"mask_id": MASK, "steps": 4, **kwargs}
    return list(denoise(count_up, x, policy, editable=editable, **kwargs))


POLICIES = {
    "maskgit": policies.maskgit(choice_temperature=2.0),
    "top_k": policies.top_k(),
    "top_k random": policies.top_k(confidence="random"),
    "top_k margin": policies.top_k(confidence="margin"),
    "top_k entropy": policies.top_k(confidence="entropy"),
    "threshold": policies.threshold(0.5),
    "factor": policies.factor(1.0),
    "entropy_bound": policies.entropy_bound(0.5),
    "ancestral": policies.ancestral(),
    "remdm": policies.remdm(eta=0.3),
}


@pytest.mark.parametrize("name", POLICIES)
def test_prompt_stays_and_no_mask_remains(name):
    x, editable = canvas("12_____3", "1___", "4______5____6")
    before = x.clone()
    states = run(x, POLICIES[name], editable, draw=categorical(), generator=torch.Generator().manual_seed(0), block=3,
                 revise=name == "remdm")
    last = states[-1]
    assert torch.equal(x, before)
    assert torch.equal(last.x[~editable], x[~editable])
    assert not (last.x == MASK).any()
    assert last.done.all() and torch.equal(last.x0, last.x)
    written = torch.zeros_like(x)
    for state in states:
        written += state.written
    assert (written[editable] >= 1).all() and (written[~editable] == 0).all()
    assert name == "remdm" or (written[editable] == 1).all()


def test_same_seed_same_output_and_another_seed_another():
    x, editable = canvas("1" + "_" * 30)

    def ids(seed):
        generator = torch.Generator().manual_seed(seed)
        draw = categorical(temperature=2.0)
        return run(x, policies.maskgit(choice_temperature=4.0), editable, draw=draw, generator=generator)[-1].x

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


def test_one_generator_moves_on_and_smaller_batches_are_the_head_of_larger_ones():
    x, editable = canvas(*["1" + "_" * 30] * 3)
    generator = torch.Generator().manual_seed(5)
    first = run(x, policies.top_k(), editable, draw=categorical(), generator=generator)[-1].x
    again = run(x, policies.top_k(), editable, draw=categorical(), generator=generator)[-1].x
    two = run(x[:2], policies.top_k(), editable[:2], draw=categorical(), generator=generator.manual_seed(5))[-1].x
    assert not torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[:2], two)


def test_each_row_has_its_own_steps_and_end():
    x, editable = canvas("1________", "1________", "1________")
    states = run(x, policies.top_k(), editable, steps=torch.tensor([8, 2, 4]))
    left = torch.stack([(state.x == MASK).sum(1) for state in states], 1)
    assert left.tolist() == [[7, 6, 5, 4, 3, 2, 1, 0], [4, 0, 0, 0, 0, 0, 0, 0], [6, 4, 2, 0, 0, 0, 0, 0]]
    assert [state.done.tolist() for state in states][1:4] == [[False, True, False]] * 2 + [[False, True, True]]
    assert [state.step for state in states] == list(range(1, 9)) and states[-1].forwards == 8


def test_blocks_are_filled_in_turn_by_rank_with_the_steps_shared_out():
    # 7 editable places around given ones, blocks of 3: sizes 3, 3, 1; 5 steps: 2, 2, 1
    x, editable = canvas("1__2__34_5__")
    states = run(x, policies.top_k(), editable, steps=5, block=3)
    written = [state.written[0].nonzero().flatten().tolist() for state in states]
    assert written == [[1, 2], [4], [5, 8], [10], [11]]


def test_blocks_by_position_start_before_the_prompt_ends():
    # blocks of 4 positions as SDAR counts them: the prompt's open block is decoded with its masks
    x, editable = canvas("11______")
    index = (torch.arange(8) // 4).unsqueeze(0)
    states = run(x, policies.top_k(), editable, steps=None, block=index)
    assert [state.written[0].nonzero().flatten().tolist() for state in states] == [[2], [3], [4], [5], [6], [7]]
    with_first = run(x, policies.threshold(1e-3), editable, steps=None, block=index)
    assert [state.written[0].nonzero().flatten().tolist() for state in with_first] == [[2, 3], [4, 5, 6, 7]]


def test_view_holds_the_asked_places_of_each_row():
    x, editable = canvas("1__2_", "_111111")
    editable[0, 3] = True  # editable but given
    views: list[View] = []

    def policy(view):
        views.append(view)
        return Decision(view.masked & (view.where == view.where[:, :1]))

    list(denoise(count_up, x, policy, editable=editable, mask_id=MASK, steps=torch.tensor([6, 1])))
    first, second = views[:2]
    assert first.where.shape == (2, 3) and first.where[0].tolist() == [1, 2, 4] and first.where[1, 0] == 0
    assert first.masked.tolist() == [[True, True, True], [True, False, False]] == first.editable.tolist()
    assert torch.equal(first.x[first.masked], torch.full((4,), MASK))
    assert (first.logits[..., MASK] == -torch.inf).all()
    # the visible sum is 1 + 2 + 8 + 8 in the first row and 6 in the second: token (position + sum) mod 8
    assert first.x0[first.masked].tolist() == [(19 + 1) % 8, (19 + 2) % 8, (19 + 4) % 8, 6]
    peak = torch.tensor(4 - 0.1).exp()
    torch.testing.assert_close(first.confidence[0, 0], peak / (peak + 8))
    assert first.confidence[1].tolist()[1:] == [0, 0]
    assert (first.n_start.tolist(), first.step.tolist(), first.steps.tolist()) == ([3, 1], [0, 0], [6, 1])
    assert second.where.shape == (2, 2) and second.where[0].tolist() == [2, 4] and not second.masked[1].any()
    assert second.step.tolist()[0] == 1 and second.n_start.tolist()[0] == 3
    assert len(first.generator) == 2


def test_revise_asks_written_places_too_and_uses_all_steps():
    x, editable = canvas("1___")
    sizes = []

    def policy(view):
        sizes.append((int(view.editable.sum()), int(view.masked.sum())))
        # write all, and mask the first place again if it was written
        return Decision(view.masked, view.editable & ~view.masked & (view.where == 1))

    states = run(x, policy, editable, steps=4, revise=True)
    assert sizes == [(3, 3), (3, 0), (3, 1), (3, 0)]
    assert not (states[-1].x == MASK).any()  # the last pass may not mask again
    assert [bool(state.done) for state in states] == [False, False, False, True]


def test_state_keeps_a_guess_and_its_confidence_everywhere():
    x, editable = canvas("1____")
    states = run(x, policies.top_k(), editable, steps=4)
    first = states[0]
    assert not (first.x0 == MASK).any() and (first.confidence > 0).all() and first.confidence[0, 0] == 1
    assert first.written.sum() == 1 and torch.equal(first.x0[first.written], first.x[first.written])
    assert not torch.equal(states[0].x, states[1].x)  # states do not share memory with later ones


def test_nothing_masked_gives_one_state_without_a_forward():
    x, editable = canvas("123", "45")
    (state,) = run(x, policies.top_k(), editable)
    assert torch.equal(state.x, x) and state.forwards == 0 and state.done.all()


def test_a_policy_that_never_writes_still_ends():
    x, editable = canvas("1____")
    states = run(x, lambda view: Decision(torch.zeros_like(view.masked)), editable, steps=3)
    assert [int((state.x == MASK).sum()) for state in states] == [4, 4, 0]


def test_keep_masks_lets_the_mask_token_be_drawn_and_stay():
    x, editable = canvas("1____")
    states = run(x, policies.top_k(), editable, steps=2, keep_masks=True)
    assert len(states) == 2 and (states[-1].x[0, 1:] == MASK).all() and states[-1].done.all()


def test_first_id_shifts_a_restricted_predictor():
    x, editable = canvas("1____")
    states = list(denoise(lambda ids, where: count_up(ids, where)[..., 4:8], x, policies.top_k(), editable=editable,
                          mask_id=MASK, steps=1, first_id=4))
    # position + 1 is wanted: 2, 3, 4, 5; the first two are out of reach, and of equals the left column is taken
    assert states[-1].x[0, 1:].tolist() == [4, 4, 4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2, "block": 1}, "steps is 2 for 3 blocks"),
        ({"block": 0}, "block is 0"),
        ({"block": torch.tensor([[0, 0, -1, 0]])}, "block has the index -1"),
        ({"steps": torch.tensor([3, 3])}, "steps is"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for 1 rows"),
    ],
)
def test_bad_settings_are_named(settings, message):
    x, editable = canvas("1___")
    with pytest.raises(ValueError, match=message):
        run(x, policies.top_k(), editable, **settings)
    if "steps" in settings and isinstance(settings["steps"], int):
        with pytest.raises(InputError):
            run(x, policies.top_k(), editable, **settings)


# ---------------------------------------------------------------- rows in batches, on a real model


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vocabulary = Vocabulary(text_size=24, image_start=24, image_size=8, mask_id=1, bos_id=2, eos_id=3, pad_id=0,
                            boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8)
    trunk = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
             "initializer_range": 0.4}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), max_positions=64)
    model = MaskPredictor(config).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.4)
    return model


def placed(rows, side, length):
    """Rows of (ids, editable) of several lengths, padded on one side: x, editable, seen, positions."""
    x = torch.zeros(len(rows), length, dtype=torch.long)
    editable, seen = torch.zeros_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)
    positions = torch.zeros_like(x)
    for b, (ids, may) in enumerate(rows):
        start = 0 if side == "right" else length - len(ids)
        at = slice(start, start + len(ids))
        x[b, at], editable[b, at], seen[b, at] = ids, may, True
        positions[b, at] = torch.arange(len(ids))
    return x, editable, seen, positions


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("draw", [greedy, categorical(temperature=1.5, top_k=12, top_p=0.9)], ids=["greedy", "drawn"])
def test_a_row_alone_equals_the_row_in_any_batch_and_padding(model, name, draw):
    mask = model.config.shared_vocabulary.mask_id
    rows = []
    for b, (prompt, answer) in enumerate([(3, 9), (7, 14), (1, 4)]):
        ids = torch.cat([torch.arange(prompt) + 9 + b, torch.full((answer,), mask)])
        rows.append((ids, ids == mask))
    steps, blocks = torch.tensor([6, 9, 3]), 5

    def fill(chosen, side, length):
        x, editable, seen, positions = placed([rows[b] for b in chosen], side, length)
        predict = predictors.full(model, attention_mask=attention_full(seen), position_ids=positions)
        generators = [torch.Generator().manual_seed(100 + b) for b in chosen]
        states = list(denoise(predict, x, POLICIES[name], editable=editable, mask_id=mask, steps=steps[chosen],
                              block=blocks, draw=draw, generator=generators, revise=name == "remdm"))
        return [states[-1].x[b][seen[b]].tolist() for b in range(len(chosen))]

    alone = [fill([b], "right", len(ids))[0] for b, (ids, _) in enumerate(rows)]
    assert fill([0, 1, 2], "right", 21) == alone
    assert fill([0, 1, 2], "left", 25) == alone
    assert fill([2, 0], "left", 13) == [alone[2], alone[0]]
    assert len({tuple(ids) for ids in alone}) == 3


def test_loops_turned_inside_out_share_forwards_and_give_what_they_give_alone():
    canvases = [canvas("12_____3"), canvas("1___"), canvas("12345678")]
    alone = [run(x, policies.top_k(), editable)[-1] for x, editable in canvases]
    loops = [passes(x, policies.top_k(), editable=editable, mask_id=MASK, steps=4) for x, editable in canvases]
    ends, asked = {}, {i: next(loop) for i, loop in enumerate(loops)}
    for _ in range(5):
        for i in [i for i, question in asked.items() if isinstance(question, State)]:
            ends[i] = asked.pop(i)  # nothing was masked: its one State comes unasked
        questions = {i: (question.x, question.where) for i, question in asked.items()}
        states = {i: loops[i].send(count_up(*question)) for i, question in questions.items()}
        ends.update({i: state for i, state in states.items() if state.done.all()})
        asked = {i: next(loops[i]) for i, state in states.items() if not state.done.all()}
    for end, state in zip([ends[i] for i in range(3)], alone, strict=True):
        assert torch.equal(end.x, state.x) and end.step == state.step and torch.equal(end.confidence, state.confidence)

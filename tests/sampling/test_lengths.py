"""Rows that grow: insertions in the loop, and DAEDAL's two stages, on models whose every answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling.denoise import ABSENT, Decision, denoise
from mmdlm.sampling.lengths import end_confidence, fit_length, grow, ragged, trim_at_eos
from mmdlm.sampling.policies import maskgit, top_k
from mmdlm.sampling.predictors import guided, masked_prompt
from mmdlm.vocabulary import Vocabulary

EOS, MASK = 7, 9


def rows(*texts: str) -> torch.Tensor:
    """Digits are ids, `_` a mask, `.` no place."""
    return torch.tensor([[MASK if c == "_" else ABSENT if c == "." else int(c) for c in text] for text in texts])


def spelled(x: torch.Tensor) -> list[str]:
    return ["".join("_" if i == MASK else "." if i == ABSENT else str(i) for i in row) for row in x.tolist()]


def logits_of(token: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """`token` [B, W] with the probability `sure` [B, W]; the other nine ids share the rest."""
    logits = ((1 - sure) / 9).log().unsqueeze(-1).repeat(1, 1, 10)
    return logits.scatter(2, token.unsqueeze(-1), sure.log().unsqueeze(-1))


def one_to_the_right(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Each place's own number modulo 7, the surer the further left."""
    return logits_of(where % 7, 0.9 - 0.01 * where)


class InsertOnce:
    """Writes the surest place; in its first pass inserts `counts` masks behind the given places of the rows."""

    def __init__(self, counts: list[dict[int, int]], policy=None):
        self.counts, self.policy = counts, policy or top_k()

    def __call__(self, view):
        insert = torch.zeros_like(view.x)
        for row, wanted in enumerate(self.counts):
            for place, count in wanted.items():
                insert[row][view.where[row] == place] = count
        self.counts = []
        return Decision(self.policy(view).write, insert=insert)


def states(x, policy, **settings):
    settings = {"mask_id": MASK, "steps": None, "longest": 20, "editable": x == MASK, **settings}
    return list(denoise(one_to_the_right, x, policy, **settings))


def test_inserted_masks_stand_right_behind_their_place_and_what_follows_moves_on():
    x = rows("1__8_8", "1__8..")
    first, *_, last = states(x, InsertOnce([{1: 2}, {}]))
    # the surest place, 1, is written in the same pass; row 1 does not grow and ends in absent places
    assert spelled(first.x) == ["11___8_8", "11_8...."]
    assert first.written.tolist()[0] == [False, True, *[False] * 6]
    assert spelled(last.x) == ["11234868", "1128...."]
    assert last.confidence[1, 4:].tolist() == [1] * 4


def test_every_given_place_comes_back_as_it_was():
    x = rows("8__8_8")
    *_, last = states(x, InsertOnce([{1: 1, 2: 1, 4: 3}]))
    assert [i for i in last.x[0].tolist() if i == 8] == [8, 8, 8]
    assert last.x.shape == (1, 11) and MASK not in last.x


def test_a_row_is_cut_at_its_longest_and_a_full_row_takes_no_more():
    x = rows("1__88", "1__88")
    first, *_ = states(x, InsertOnce([{1: 4}, {1: 4}]), longest=torch.tensor([7, 5]))
    assert spelled(first.x) == ["11_____", "11_88.."]


def test_absent_places_before_a_row_do_not_move_and_do_not_count():
    first, *_ = states(rows("..1_8"), InsertOnce([{3: 3}]), longest=6)
    assert spelled(first.x) == ["..13___8"]


def test_blocks_are_counted_anew_and_keep_their_length():
    x = rows("1____")
    every = states(x, InsertOnce([{1: 1}]), block=2)
    # five places in blocks of two: 1 2 | 3 4 | 5
    assert [spelled(state.x)[0] for state in every] == ["11____", "112___", "1123__", "11234_", "112345"]


def test_a_row_does_not_feel_that_its_neighbour_grows():
    """maskgit's counts hang on the passes made: a neighbour's new plan must not begin this row's again."""
    x = rows("1______", "1______")
    both = states(x, InsertOnce([{}, {3: 2}], maskgit()))
    alone = states(x[:1], InsertOnce([{}], maskgit()))
    assert both[-1].x.shape[1] == 9
    for one, other in zip(both, alone, strict=False):
        assert torch.equal(one.x[:1, :7], other.x)


def test_the_blocks_given_by_place_move_with_their_places():
    x = rows("1____")
    every = states(x, InsertOnce([{3: 1}]), block=torch.tensor([[0, 1, 1, 0, 0]]))
    # places 3 and 4 are the first block: the new mask behind 3 belongs to it
    assert [spelled(state.x)[0] for state in every][:3] == ["1__3__", "1__34_", "1__345"]


@pytest.mark.parametrize("settings", [{"steps": 4}, {"longest": None}])
def test_insertions_need_a_limit_and_no_steps(settings):
    with pytest.raises(InputError, match="steps=None and longest"):
        states(rows("1__"), InsertOnce([{1: 1}]), **settings)


# ---------------------------------------------------------------- the two stages


def test_the_end_confidence_is_summed_over_the_last_places_that_end():
    token = torch.tensor([[EOS, 1, EOS, EOS, 2, EOS]]).repeat(2, 1)
    sure = torch.tensor([[0.9, 0.5, 0.8, 0.6, 0.5, 0.4]]).repeat(2, 1)
    answer = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    for window, expected in ((2, [0.5, 0.7]), (3, [0.6, 2.3 / 3]), (8, [2.7 / 8, 2.3 / 8])):
        found = end_confidence(logits_of(token, sure), answer, eos_id=EOS, window=window)
        assert found.tolist() == pytest.approx(expected)


def ends_at(*lengths: int):
    """A model that writes `1` up to its row's length and is sure of the end from there on; rows by their first id."""

    def predict(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        # a row's own number is its first present id, so that it is the same alone and in a batch
        first = (ids != ABSENT).int().argmax(1, keepdim=True)
        place = where - first
        end = torch.tensor(lengths)[ids.gather(1, first)] + 1
        return logits_of(torch.where(place < end, 1, EOS), torch.full(where.shape, 0.8))

    return predict


def test_an_answer_grows_until_the_model_is_sure_that_it_ends():
    settings = {"mask_id": MASK, "eos_id": EOS, "initial_length": 2, "expansion": 3, "window": 2, "eos_threshold": 0.7}
    fitted = fit_length(ends_at(2, 9), torch.tensor([[0], [1]]), longest=20, **settings)
    # row 0 ends after two places, so it needs four for a window of two; row 1 needs eleven: 2 + 3 + 3 + 3
    assert fitted.lengths.tolist() == [5, 11]
    assert spelled(fitted.x) == ["0_____......", "1___________"]
    assert fitted.ends.tolist() == pytest.approx([0.8, 0.8])
    fitted = fit_length(ends_at(2, 9), torch.tensor([[ABSENT, 0], [1, 1]]), longest=7, tail=4, **settings)
    assert spelled(fitted.x) == [".0_____77", "11_______"], "nobody has more than longest, its tail included"


def hesitating(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Writes 1 with certainty, but hesitates at answer place 2 (column 3) until the row has 6 columns."""
    room = (ids != ABSENT).sum(1, keepdim=True)
    sure = torch.where((where == 3) & (room < 6), 0.15, 0.95)
    return logits_of(torch.ones_like(where), sure)


def test_the_least_sure_mask_becomes_several():
    settings = {"prompt_length": 1, "mask_id": MASK, "eos_id": EOS, "low": 0.2, "expansion": 3, "window": 2}
    every = list(grow(hesitating, rows("0____", "0_..."), longest=20, **settings))
    assert [spelled(state.x) for state in every] == [["011___1", "01....."], ["0111111", "01....."]]
    # what there is room for, and no more; as released: all three, and what stood at the end falls out
    (first, *_) = grow(hesitating, rows("0____"), longest=5, **settings)
    assert spelled(first.x) == ["011__1"]
    (first, *_) = grow(hesitating, rows("0____"), longest=5, cut=True, **settings)
    assert spelled(first.x) == ["011___"]
    # a full row, an expansion of one, and an end in sight: nothing grows
    for changed in ({"longest": 4}, {"expansion": 1, "longest": 9}):
        *_, last = grow(hesitating, rows("0____"), **{**settings, **changed})
        assert spelled(last.x) == ["01111"]


def test_an_end_in_sight_stops_the_growth():
    def ending(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return logits_of(torch.where(where >= 4, EOS, 1), torch.where(where == 2, 0.15, 0.95))

    settings = {"prompt_length": 1, "mask_id": MASK, "eos_id": EOS, "low": 0.2, "expansion": 2, "longest": 9}
    *_, last = grow(ending, rows("0_____"), window=2, **settings)
    assert spelled(last.x) == ["011177"]
    first, *_ = grow(ending, rows("0_____"), window=4, **settings)
    assert spelled(first.x) == ["01__177"], "two of a window of four: not sure enough"


def test_a_row_that_predicts_nothing_but_masks_goes_on():
    def masks(ids: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        return logits_of(torch.full_like(where, MASK), torch.full(where.shape, 0.5)) + one_to_the_right(ids, where)

    settings = {"prompt_length": 1, "mask_id": MASK, "eos_id": EOS, "longest": 4}
    for keep_masks in (False, True):
        *_, last = grow(masks, rows("0____"), keep_masks=keep_masks, **settings)
        assert spelled(last.x) == ["01234"]


def test_trimmed_answers_end_before_their_first_eos():
    x = rows("00121.", "001727", "007...")
    trimmed = trim_at_eos(x, prompt_length=2, eos_id=EOS)
    assert [answer.tolist() for answer in trimmed] == [[1, 2, 1], [1], []]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"initial_length": 0}, "initial_length is 0, expected 1 or more"),
        ({"initial_length": 9}, "initial_length is 9, expected at most longest, 8"),
        ({"expansion": 0}, "expansion is 0"),
        ({"window": 0}, "window is 0"),
        ({"tail": -1}, "tail is -1"),
        ({"prompt": rows("01", "2.")}, "at their start"),
    ],
)
def test_bad_settings_of_the_first_stage(settings, words):
    prompt = settings.pop("prompt", rows("01"))
    with pytest.raises(InputError, match=words):
        fit_length(
            one_to_the_right, prompt, **{"mask_id": MASK, "eos_id": EOS, "initial_length": 4, "longest": 8, **settings}
        )


def test_an_answer_above_the_budget_is_refused():
    with pytest.raises(InputError, match="an answer has 4 places, expected at most longest, 3"):
        list(grow(one_to_the_right, rows("0____"), prompt_length=1, mask_id=MASK, eos_id=EOS, longest=3))


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def model() -> MaskPredictor:
    """Random weights, a head loud enough to be sure of something, and pictures of 2 x 2 codes."""
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_id", "eos_id", "pad_id", "boi_id", "eoi_id", "draw_id", "describe_id", "ask_id"), -1)
    vocabulary = Vocabulary(text_size=24, image_start=24, image_size=8, mask_id=MASK, **(special | {"eos_id": EOS}))
    trunk = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}  # fmt: skip
    config = MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), max_positions=128, image_side=2)
    model = MaskPredictor(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(6 if "head" in name else 3)
    return model


@pytest.mark.parametrize("seed", range(2))
def test_rows_do_not_depend_on_their_batch_or_padding(model, seed):
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(10, 24, (length,), generator=generator) for length in (5, 3, 1)]
    codes = torch.randint(24, 32, (3, 4), generator=generator)
    settings = {"mask_id": MASK, "eos_id": EOS, "longest": 12, "window": 3, "expansion": 4}
    corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

    def answers(numbers: list[int], width: int) -> list[list[int]]:
        """The rows' pictures, then their texts, filled up on the left to one width."""
        filling = [width - 4 - len(texts[i]) for i in numbers]
        prompt = torch.stack([F.pad(torch.cat([codes[i], texts[i]]), (n, 0), value=ABSENT)
                              for i, n in zip(numbers, filling, strict=True)])  # fmt: skip
        grid = torch.stack([F.pad(corners, (0, 0, n, width - 4 - n), value=-1) for n in filling])
        predict = ragged(model, grid=grid, stop=24)
        fitted = fit_length(predict, prompt, initial_length=5, eos_threshold=0.2, tail=1, **settings)
        is_prompt = torch.arange(fitted.x.shape[1]) < width
        predict = guided(predict, predict, 1.5, other=masked_prompt(is_prompt & (fitted.x != ABSENT), MASK))
        x = fitted.x
        for state in grow(predict, x, prompt_length=width, block=4, threshold=0.5, low=0.3, **settings):
            x = state.x
            assert torch.equal(x[:, :width], prompt), "the prompt never changes"
            assert int((x[:, width:] != ABSENT).sum(1).max()) <= 12, "the budget is kept"
        assert not bool((x == MASK).any()), "no mask remains"
        assert int(x[:, width:].max()) < 24, "text is answered with text"
        return [row[row != ABSENT].tolist() for row in x[:, width:]]

    together = answers([0, 1, 2], 9)
    assert max(map(len, together)) > 6, "something has grown"
    for row, answer in enumerate(together):
        assert answers([row], 9) == [answer]
        assert answers([row], 4 + len(texts[row])) == [answer]

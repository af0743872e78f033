"""Guidance before the head equals guidance after it; the first row without a prompt is computed once; a pass makes the
host wait once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmdlm.errors import InputError
from mmdlm.models.adapters import add_lora
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling import policies
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.predictors import (
    Headed,
    full,
    guided,
    guided_by_each,
    guided_together,
    masked_prompt,
    other_canvas,
    restricted,
)
from mmdlm.vocabulary import Vocabulary

MASK, COLUMNS = 1, (24, 40)
VOCABULARY = Vocabulary(
    text_size=20, image_start=24, image_size=16, mask_id=MASK, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def tiny(**settings: int) -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.3}
    config = {"image_side": 4, "code_bits": 4, "image_fold": 2} | settings
    model = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=VOCABULARY.to_dict(), max_positions=64, **config))
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model.double().eval()


def canvases(rows: int = 2) -> tuple[Tensor, dict[str, Any], dict[str, Any], Any]:
    """Draw-like rows, all 16 codes masked, behind prompts of 4, 3, ... tokens, padded left; and without prompts."""
    square = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ids, seen = torch.full((rows, 21), 9), torch.ones(rows, 21, dtype=torch.bool)
    for row in range(rows):
        ids[row, :4], seen[row, :row] = torch.tensor([10 + row, 11, 12, 13]), False
    ids[:, 4], ids[:, 5:] = 4, MASK
    grid = torch.full((rows, 21, 2), -1)
    grid[:, 5:] = square
    bare = torch.cat([torch.full((rows, 1), 4), ids[:, 5:]], 1)
    grid_bare = torch.cat([torch.full((rows, 1, 2), -1), grid[:, 5:]], 1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    mask = None if rows == 1 else seen[:, None, None]
    places = torch.arange(16).expand(rows, 16)
    other = other_canvas(bare, places + 5, places + 1)
    return ids, {"attention_mask": mask, "position_ids": positions, "grid": grid}, {"grid": grid_bare}, other


def sample(predict: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"steps": 5, "first_id": COLUMNS[0], "editable": ids == MASK, "mask_id": MASK} | settings
    return list(denoise(predict, ids, policies.maskgit(), **settings))[-1].x


@pytest.mark.parametrize("scale", [3.0, torch.tensor([0.5, 4.0])])
def test_guidance_in_hidden_space_equals_guidance_of_logits(scale: float | Tensor):
    model = tiny()
    ids, conditional, unconditional, other = canvases()
    written = ids.clone()
    written[0, 9], written[1, 12] = 25, 33
    where = torch.tensor([[6, 20, 7], [8, 10, 5]])
    branches = full(model, columns=COLUMNS, **conditional), full(model, columns=COLUMNS, **unconditional)
    after = guided(*branches, scale, other=other, combine="logits")
    assert not isinstance(after, Headed)
    before = guided(*branches, scale, other=other)
    together = [guided_together(model, conditional, unconditional, scale, other=other, columns=COLUMNS, combine=combine)
                for combine in ("hidden", "logits")]
    assert isinstance(before, Headed) and isinstance(together[0], Headed)
    for now in (ids, written):
        expected = after(now, where)
        assert expected.shape == (2, 3, 16)
        for predict in (before, *together):
            torch.testing.assert_close(predict(now, where), expected, **CLOSE)
    tokens = [sample(predict, ids) for predict in (after, guided(*branches, scale, other=other), *together)]
    assert all(torch.equal(row, tokens[0]) for row in tokens[1:])


def test_branches_that_are_no_heads_of_one_model_are_weighed_after_the_head():
    model = tiny(image_side=0, code_bits=0, image_fold=1)
    ids = torch.tensor([[2, 10, MASK, MASK]])
    where, other = torch.tensor([[2, 3]]), masked_prompt(ids != MASK, MASK)
    plain, other_columns = full(model), full(model, columns=(0, 40))
    shut = restricted(plain, torch.zeros_like(ids), [(9, 24)])
    expected = guided(plain, plain, 2.0, other=other, combine="logits")(ids, where)
    for predict in (guided(plain, other_columns, 2.0, other=other), guided(shut, shut, 2.0, other=other)):
        assert not isinstance(predict, Headed)
        torch.testing.assert_close(predict(ids, where)[..., 9:24], expected[..., 9:24], **CLOSE)
    assert (guided(shut, shut, 2.0, other=other)(ids, where)[..., :9] == -torch.inf).all()
    # -inf is put on behind the one head too
    behind = restricted(guided(plain, plain, 2.0, other=other), torch.zeros_like(ids), [(9, 24)])(ids, where)
    torch.testing.assert_close(behind[..., 9:24], expected[..., 9:24], **CLOSE)
    assert (behind[..., 24:] == -torch.inf).all() and not behind.isnan().any()
    # guidance of guidance, and away from several canvases, which is the same with one
    again = guided(guided(plain, plain, 2.0, other=other), plain, 0.5, other=other)
    assert isinstance(again, Headed)
    by_each = guided_by_each(plain, [(plain, 2.0, other)])(ids, where)
    torch.testing.assert_close(by_each, expected, **CLOSE)
    with pytest.raises(InputError, match="combine is 'before'"):
        guided(plain, plain, 2.0, other=other, combine="before")


def rows_of_forwards(model: MaskPredictor, predict: Any, ids: Tensor) -> tuple[Tensor, list[int]]:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    tokens = sample(predict, ids)
    hook.remove()
    return tokens, seen


def test_the_first_pass_without_prompts_is_one_row_and_kept_until_a_weight_changes():
    model, kept = tiny(), {}
    ids, conditional, unconditional, other = canvases(3)

    def again(kept: dict[str, Any] | None, rows: int = 3) -> tuple[Tensor, list[int]]:
        now, one, two, way = canvases(rows)
        branches = full(model, columns=COLUMNS, **one), full(model, columns=COLUMNS, **two)
        return rows_of_forwards(model, guided(*branches, 3.0, other=way, kept=kept), now)

    branches = full(model, columns=COLUMNS, **conditional), full(model, columns=COLUMNS, **unconditional)
    plain, seen = rows_of_forwards(model, guided(*branches, 3.0, other=other, combine="logits"), ids)
    assert seen == [3] * 10
    for which, expected in ((None, [3, 1]), (kept, [3, 1]), (kept, [3])):
        tokens, seen = again(which)
        assert torch.equal(tokens, plain) and seen == expected + [3] * 8
    assert again(kept, rows=2)[1] == [2] * 9  # another run's rows are the same canvas
    with torch.no_grad():
        model.trunk.norm.weight.mul_(1.5)
    tokens, seen = again(kept)
    assert seen == [3, 1] + [3] * 8 and not torch.equal(tokens, plain)
    assert torch.equal(tokens, again(None)[0]) and again(kept)[1] == [3] * 9
    # rows that are not alike are all computed
    branches = full(model, columns=COLUMNS, **conditional), full(model, columns=COLUMNS, **conditional)
    mine = ids.clone()
    mine[1, 7] = 30
    _, seen = rows_of_forwards(model, guided(*branches, 3.0, other=lambda x, w: (x, w), kept=kept), mine)
    assert seen == [3] * 10
    # nor is one kept of a model whose rows may have adapters of their own
    add_lora(model, rank=1, targets=["q_proj"])
    model.eval()
    assert again(kept)[1] == [3] * 10


WAITS = ("item", "__bool__", "__int__", "__index__", "__float__", "tolist", "nonzero", "numpy", "cpu", "equal")


class _Waits(TorchFunctionMode):
    """Counts what makes the host wait for the device."""

    count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(function, "__name__", "") in WAITS
        return function(*args, **(kwargs or {}))


def test_a_compiled_step_is_always_asked_as_many_places():
    model, widths = tiny(), []
    ids, conditional, unconditional, other = canvases()
    expected = sample(full(model, columns=COLUMNS, **conditional), ids)
    model.register_forward_pre_hook(lambda _, __, settings: widths.append(settings["where"].shape[1]), with_kwargs=True)
    with torch.compiler.set_stance("force_eager"):  # all but the compiling, which takes a minute
        branches = [full(model, columns=COLUMNS, compile=True, **inputs) for inputs in (conditional, unconditional)]
        assert torch.equal(sample(branches[0], ids), expected)
        plain = guided(*branches, 3.0, other=other, combine="logits")
        together = guided_together(model, conditional, unconditional, 3.0, other=other, columns=COLUMNS, compile=True)
        assert torch.equal(sample(plain, ids), sample(together, ids))


@pytest.mark.parametrize("policy", [policies.maskgit(), policies.top_k(), policies.threshold(0.9),
                                    policies.entropy_bound(1.0), policies.factor(1.0)])
def test_a_pass_makes_the_host_wait_once(policy: Any):
    model = tiny()
    ids, conditional, unconditional, other = canvases()
    branches = full(model, columns=COLUMNS, **conditional), full(model, columns=COLUMNS, **unconditional)
    loop = denoise(guided(*branches, 3.0, other=other), ids, policy, editable=ids == MASK, mask_id=MASK, steps=6,
                   first_id=COLUMNS[0])
    next(loop), next(loop)  # what is the same in every pass, and all checks, are behind
    with _Waits() as waits:
        next(loop)
    assert waits.count == 1

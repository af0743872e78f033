"""Predictors: guidance in two forms, canvases of two lengths, restriction by modality; on a small real model."""

import pytest
import torch

from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling import policies
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.predictors import full, guided, guided_together, masked_prompt, other_canvas, restricted
from mmdlm.vocabulary import Vocabulary

MASK = 1


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    vocabulary = Vocabulary(text_size=24, image_start=24, image_size=8, mask_id=MASK, bos_id=2, eos_id=3, pad_id=0,
                            boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8)
    trunk = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
             "initializer_range": 0.4}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), image_side=4, max_positions=64)
    model = MaskPredictor(config).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.4)
    return model


def pictures():
    """Two draw-like rows, prompts of 5 and 3 tokens, 6 codes: padded conditional and short unconditional canvases."""
    codes, length, short = 6, 13, 8
    ids, seen = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.bool)
    for b, prompt in enumerate([5, 3]):
        ids[b, : prompt + 1 + codes] = torch.tensor([10 + b + k for k in range(prompt)] + [4] + [MASK] * codes)
        seen[b, : prompt + 1 + codes] = True
    bare = torch.tensor([[2, 4] + [MASK] * codes]).expand(2, short).clone()
    places = torch.stack([torch.arange(codes) + 6, torch.arange(codes) + 4])
    places_bare = (torch.arange(codes) + 2).expand(2, codes)

    def grid(at, width):
        grid = torch.full((2, width, 2), -1)
        for b in range(2):
            grid[b, at[b]] = torch.tensor([[k // 3, k % 3] for k in range(codes)])
        return grid

    conditional = {"attention_mask": seen[:, None, None], "position_ids": torch.arange(length).expand(2, length),
                   "grid": grid(places, length)}
    unconditional = {"grid": grid(places_bare, short)}
    return ids, conditional, unconditional, other_canvas(bare, places, places_bare)


@pytest.mark.parametrize("scale", [3.0, torch.tensor([0.5, 4.0])])
def test_guidance_in_one_forward_equals_two_calls_and_the_definition(model, scale):
    ids, conditional, unconditional, other = pictures()
    ids[0, 7], ids[1, 9] = 25, 30  # some codes are there already
    where = torch.tensor([[6, 8, 11], [4, 5, 8]])
    twice = guided(full(model, columns=(24, 32), **conditional), full(model, columns=(24, 32), **unconditional), scale,
                   other=other)(ids, where)
    once = guided_together(model, conditional, unconditional, scale, other=other, columns=(24, 32))(ids, where)
    torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-9)
    # by hand for the second row: alone, without padding
    with torch.no_grad():
        grids = conditional["grid"][1:, :10], unconditional["grid"][1:]
        con = model(ids[1:, :10], grid=grids[0], where=where[1:], columns=(24, 32)).logits
        bare = torch.cat([torch.tensor([[2, 4]]), ids[1:, 4:10]], 1)
        unc = model(bare, grid=grids[1], where=where[1:] - 2, columns=(24, 32)).logits
    by_hand = unc + (4.0 if isinstance(scale, torch.Tensor) else 3.0) * (con - unc)
    torch.testing.assert_close(twice[1:], by_hand, rtol=1e-9, atol=1e-9)


def test_guided_sampling_writes_the_same_tokens_either_way_and_scale_matters(model):
    ids, conditional, unconditional, other = pictures()
    columns = (24, 32)

    def sample(predict):
        return list(denoise(predict, ids, policies.maskgit(), editable=ids == MASK, mask_id=MASK, steps=4,
                            first_id=24))[-1].x

    plain = full(model, columns=columns, **conditional)
    bare = full(model, columns=columns, **unconditional)
    guided_ids = sample(guided(plain, bare, 6.0, other=other))
    assert torch.equal(guided_ids, sample(guided_together(model, conditional, unconditional, 6.0, other=other,
                                                          columns=columns)))
    assert torch.equal(sample(plain), sample(guided(plain, bare, 1.0, other=other)))
    assert not torch.equal(guided_ids, sample(plain))
    assert ((guided_ids[ids == MASK] >= 24) & (guided_ids[ids == MASK] < 32)).all()


def test_scale_zero_is_the_unconditional_model(model):
    ids, conditional, unconditional, other = pictures()
    where = torch.tensor([[6, 7], [4, 5]])
    logits = guided(full(model, **conditional), full(model, **unconditional), 0.0, other=other)(ids, where)
    torch.testing.assert_close(logits, full(model, **unconditional)(*other(ids, where)))


def test_equal_lengths_need_no_mask_and_a_masked_prompt_no_second_canvas(model):
    ids = torch.tensor([[2, 10, 11, MASK, MASK, MASK], [2, 12, 13, MASK, MASK, MASK]])
    grid = torch.full((2, 6, 2), -1)
    where = torch.tensor([[3, 4, 5]] * 2)
    prompt = ids != MASK
    other = masked_prompt(prompt, MASK)
    predict = full(model, grid=grid)
    twice = guided(predict, predict, 2.0, other=other)(ids, where)
    once = guided_together(model, {"grid": grid}, {"grid": grid}, 2.0, other=other)(ids, where)
    torch.testing.assert_close(once, twice, rtol=1e-9, atol=1e-9)
    assert (other(ids, where)[0] == MASK).all()


def test_columns_are_a_slice_of_the_full_head(model):
    ids, conditional, _, _ = pictures()
    where = torch.tensor([[6, 8], [4, 5]])
    torch.testing.assert_close(full(model, columns=(24, 32), **conditional)(ids, where),
                               full(model, **conditional)(ids, where)[..., 24:32])


def test_restricted_shuts_the_other_modality_per_place(model):
    ids = torch.tensor([[2, MASK, MASK, 4, MASK, MASK, 5]])
    kind = torch.tensor([[0, 0, 0, 0, 1, 1, 0]])
    grid = torch.where(kind.unsqueeze(-1) == 1, torch.tensor([[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 1], [0, 0]]),
                       -1)
    ranges = [(0, 24), (24, 32)]
    where = torch.tensor([[1, 4]])
    plain = full(model, grid=grid)
    logits = restricted(plain, kind, ranges)(ids, where)
    assert (logits[0, 0, 24:] == -torch.inf).all() and (logits[0, 1, :24] == -torch.inf).all()
    torch.testing.assert_close(logits[0, 0, :24], plain(ids, where)[0, 0, :24])
    # a head that runs for each kind's own ids, and its slow twin, which shuts the others behind the whole head
    torch.testing.assert_close(logits, restricted(lambda *asked: plain(*asked), kind, ranges)(ids, where))
    with pytest.raises(ValueError, match="none of a range"):
        restricted(full(model, grid=grid, columns=(24, 32)), kind, ranges)
    shifted = restricted(full(model, grid=grid, columns=(20, 32)), kind, ranges, first_id=20)(ids, where)
    assert torch.isfinite(shifted[0, 0]).sum() == 4 and torch.isfinite(shifted[0, 1]).sum() == 8
    twice = restricted(guided(plain, plain, 2.0, other=masked_prompt(kind < 0, MASK)), kind, ranges)
    last = list(denoise(twice, ids, policies.top_k(), editable=ids == MASK, mask_id=MASK, steps=2))[-1].x
    assert (last[0, 1:3] < 24).all() and (last[0, 4:6] >= 24).all()


def test_a_guided_restricted_pair_keeps_shut_columns_shut(model):
    ids = torch.tensor([[2, 10, MASK, MASK]])
    kind = torch.zeros_like(ids)
    shut = restricted(full(model, grid=torch.full((1, 4, 2), -1)), kind, [(9, 24)])
    logits = guided(shut, shut, 2.0, other=masked_prompt(ids != MASK, MASK))(ids, torch.tensor([[2, 3]]))
    assert (logits[..., :9] == -torch.inf).all() and torch.isfinite(logits[..., 9:24]).all()


def test_misfits_are_named(model):
    ids, _, _, other = pictures()
    where = torch.tensor([[6], [4]])
    with pytest.raises(ValueError, match="take guided"):
        guided_together(model, {"attention_mask": torch.ones(2, 1, 13, 13, dtype=torch.bool)}, {}, 2.0, other=other)(
            ids, where)
    with pytest.raises(ValueError, match="'mask'"):
        guided_together(model, {"mask": ids}, {}, 2.0, other=other)(ids, where)
    with pytest.raises(ValueError, match="in pairs"):
        other_canvas(ids, where, where[:1])

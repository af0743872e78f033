"""Shadows: in a trunk of one layer exactly what the model says of the masked token; nobody else notices them."""

import itertools

import pytest
import torch

from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.policies import revoke
from mmdlm.sampling.predictors import full
from mmdlm.sampling.shadows import shadowed
from mmdlm.vocabulary import Vocabulary

MASK, TEXT, CODES = 1, 20, 16
VOCABULARY = Vocabulary(text_size=TEXT, image_start=TEXT, image_size=CODES, mask_id=MASK, bos_id=2, eos_id=3, pad_id=0,
                        boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8)


def model(layers: int, fold: int = 1) -> MaskPredictor:
    torch.manual_seed(0)
    trunk = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    side = {"image_side": 2, "image_fold": fold} if fold > 1 else {}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=VOCABULARY.to_dict(), max_positions=64, **side)
    made = MaskPredictor(config).eval()
    for parameter in made.parameters():  # far from the near-zero of a fresh model, so that what is seen matters
        parameter.data.mul_(4)
    return made


@torch.no_grad()
def test_in_one_layer_a_shadow_is_the_masked_token_itself():
    one, ids = model(layers=1), torch.randint(9, TEXT, (2, 9))
    ids[0, 2] = ids[1, 5] = MASK
    where = torch.tensor([[1, 2, 7], [3, 5, 8]])
    found = shadowed(one, mask_id=MASK, editable=torch.ones_like(ids, dtype=torch.bool))(ids, where)
    for row in range(2):
        for asked, place in enumerate(where[row].tolist()):
            hidden = ids[row : row + 1].clone()
            hidden[0, place] = MASK
            expected = full(one)(hidden, torch.tensor([[place]]))[0, 0]
            torch.testing.assert_close(found[row, asked], expected, atol=1e-4, rtol=1e-4)
    # and it is not what the model says where it sees the token
    assert not torch.allclose(found[0, 0], full(one)(ids, where)[0, 0], atol=1e-2)


@torch.no_grad()
def test_shadows_change_nothing_at_masked_places_and_padding_is_not_seen():
    deep = model(layers=3)
    ids = torch.randint(9, TEXT, (1, 8))
    ids[0, 3] = ids[0, 6] = MASK
    where = torch.tensor([[2, 3, 6]])
    anywhere = torch.ones(1, 12, dtype=torch.bool)
    plain, found = full(deep)(ids, where), shadowed(deep, mask_id=MASK, editable=anywhere[:, :8])(ids, where)
    torch.testing.assert_close(found[:, 1:], plain[:, 1:], atol=1e-4, rtol=1e-4)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    seen = torch.arange(12).unsqueeze(0) >= 4
    positions = (torch.arange(12) - 4).clamp(min=0).unsqueeze(0)
    seen_and_placed = {"attention_mask": seen[:, None, None], "position_ids": positions}
    again = shadowed(deep, mask_id=MASK, editable=anywhere, **seen_and_placed)(padded, where + 4)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=1e-4)


def test_revoke_over_shadows_leaves_prompt_and_no_mask():
    deep, ids = model(layers=2), torch.randint(9, TEXT, (8, 16))
    editable = torch.arange(16).expand(8, 16) >= 5
    states = list(denoise(shadowed(deep, mask_id=MASK, editable=editable), ids.masked_fill(editable, MASK),
                          revoke(draft=0.15, verify=1.0), editable=editable, mask_id=MASK, steps=None, revise=True))
    assert torch.equal(states[-1].x[:, :5], ids[:, :5]) and not (states[-1].x == MASK).any()
    taken_back = [(a.x != MASK) & (b.x == MASK) for a, b in itertools.pairwise(states)]
    assert torch.stack(taken_back).any()


def test_folded_pictures_have_no_shadows_but_their_text_has():
    folded = model(layers=1, fold=2)
    ids = torch.cat([torch.randint(9, TEXT, (1, 2)), torch.randint(TEXT, TEXT + CODES, (1, 4)),
                     torch.randint(9, TEXT, (1, 2))], 1)
    grid = torch.tensor([[[-1, -1], [-1, -1], [0, 0], [0, 1], [1, 0], [1, 1], [-1, -1], [-1, -1]]])
    editable = torch.arange(8).unsqueeze(0) >= 2
    predict = shadowed(folded, mask_id=MASK, editable=editable, grid=grid)
    hidden = ids.clone()
    hidden[0, 6] = MASK
    with torch.no_grad():
        expected = full(folded, grid=grid)(hidden, torch.tensor([[6]]))
        torch.testing.assert_close(predict(ids, torch.tensor([[6]])), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="folds image places"):
        predict(ids, torch.tensor([[3]]))
    with torch.no_grad():  # a place that only fills the row up is not shadowed
        assert predict(ids, torch.tensor([[1]])).shape == (1, 1, TEXT + CODES)
    with pytest.raises(ValueError, match="expected bool"):
        wrong = {"grid": grid, "attention_mask": torch.zeros(1, 8)}
        shadowed(folded, mask_id=MASK, editable=editable, **wrong)(ids, torch.tensor([[6]]))

"""The mask predictor: everybody sees everybody, rows are independent, folding, bit structure, saving, trunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from mmdlm.models.lfq import codes_to_bits
from mmdlm.models.mask_predictor import (
    DEFAULT_TRUNK,
    MaskPredictor,
    MaskPredictorConfig,
    fold_offsets,
    fold_plan,
    picture_widths,
)
from mmdlm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    text_size=20, image_start=24, image_size=16, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
# Weights well above the usual 0.02, so that a difference in what is seen is no rounding.
TRUNK = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def tiny(trunk: dict[str, Any] | None = None, **settings: Any) -> MaskPredictor:
    torch.manual_seed(0)
    config = {"trunk": TRUNK | (trunk or {}), "vocabulary": VOCABULARY.to_dict(), "max_positions": 64} | settings
    model = MaskPredictor(MaskPredictorConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "layers" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def grid_of(*segments: int | tuple[int, int]) -> Tensor:
    """A grid [L, 2] from numbers of text places and (rows, columns) of pictures, in order."""
    places = []
    for segment in segments:
        if isinstance(segment, int):
            places += [(-1, -1)] * segment
        else:
            places += [(row, column) for row in range(segment[0]) for column in range(segment[1])]
    return torch.tensor(places)


def ids_for(grid: Tensor) -> Tensor:
    """Random ids [..., L] of the right modality for a grid [..., L, 2]."""
    chance = torch.Generator().manual_seed(0)
    text = torch.randint(9, 20, grid.shape[:-1], generator=chance)
    image = torch.randint(24, 40, grid.shape[:-1], generator=chance)
    return torch.where(grid[..., 0] >= 0, image, text)


FULL = {"code_bits": 4, "image_side": 4}
FOLDED = FULL | {"image_fold": 2}
ROW = (3, (4, 2), 2, (2, 4), 1)  # text, a picture, text, another picture, text: 22 places


@torch.no_grad()
def logits(model: MaskPredictor, ids: Tensor, **settings: Any) -> Tensor:
    found = model(ids, **settings).logits
    assert found is not None
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_place_sees_every_other(family: str, attention: str):
    model = tiny({"model_type": family, "head_dim": 8} if family != "llama" else {"model_type": family})
    model.set_attn_implementation(attention)
    ids = ids_for(grid_of(9))[None]
    changed = ids.clone()
    changed[0, -1] = 8
    difference = (logits(model, changed) - logits(model, ids)).abs().amax(-1)[0]
    assert float(difference[:-1].min()) > 1e-3


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree_with_sdpa(implementation: str):
    grid = torch.stack([grid_of(*ROW), grid_of(14, (4, 2))])
    ids, valid = ids_for(grid), torch.ones(2, 22, dtype=torch.bool)
    valid[0, :2] = False
    each = torch.ones(22, 22, dtype=torch.bool).tril(12).expand(2, 1, 22, 22)
    for settings in (FULL, FOLDED):
        model = tiny(**settings)
        for mask in (None, valid[:, None, None], each):
            model.set_attn_implementation("sdpa")
            expected = logits(model, ids, grid=grid, attention_mask=mask)
            model.set_attn_implementation(implementation)
            assert model.trunk.config._attn_implementation == implementation
            # Uncompiled: torch 2.15 writes C++ for flex attention on a CPU that does not compile (cur_kvSplitSize5).
            with torch.compiler.set_stance("force_eager"):
                found = logits(model, ids, grid=grid, attention_mask=mask)
            torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-4)


def test_an_attention_that_takes_no_such_mask_says_so():
    model = tiny()
    model.trunk.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"takes padding only, got a mask \(1, 1, 4, 4\)"):
        model(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("settings", [FULL, FOLDED], ids=["plain", "folded"])
def test_a_row_does_not_depend_on_its_batch_or_padding(settings: dict[str, int]):
    model = tiny(**settings).double()  # what is left is rounding, and the difference of a wrong place is not
    grid = grid_of(*ROW)
    ids = ids_for(grid)
    alone = logits(model, ids[None], grid=grid[None])[0]
    other = ids_for(grid_of(8, (2, 2), (2, 2), 6))
    together = logits(
        model, torch.stack([other, ids]), grid=torch.stack([grid_of(8, (2, 2), (2, 2), 6), grid])
    )  # the other row folds into fewer places
    torch.testing.assert_close(together[1], alone, rtol=0, atol=1e-9)

    padding, text = torch.zeros(5, dtype=torch.long), grid_of(5)
    longer = ids_for(grid_of(3, (4, 2), 2, (2, 4), 6))
    for side in ("right", "left"):
        parts = (ids, padding) if side == "right" else (padding, ids)
        grids = (grid, text) if side == "right" else (text, grid)
        batch = torch.stack([torch.cat(parts), longer])
        valid = torch.ones_like(batch, dtype=torch.bool)
        place = slice(0, 22) if side == "right" else slice(5, 27)
        valid[0] = False
        valid[0, place] = True
        positions = (valid.long().cumsum(1) - 1).clamp_min(0)
        both = torch.stack([torch.cat(grids), grid_of(3, (4, 2), 2, (2, 4), 6)])
        padded = logits(model, batch, grid=both, attention_mask=valid[:, None, None], position_ids=positions)
        torch.testing.assert_close(padded[0, place], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, FULL, FOLDED], ids=["table", "bits", "folded"])
def test_asked_places_and_columns_are_those_of_the_full_logits(settings: dict[str, int]):
    model = tiny(**settings)
    grid = torch.stack([grid_of(*ROW), grid_of(14, (4, 2))])
    ids = ids_for(grid)
    every = logits(model, ids, grid=grid)
    assert every.shape == (2, 22, 40)
    where = torch.tensor([[5, 21, 2, 5], [20, 3, 15, 0]])
    for columns in ((0, 20), (24, 40), (10, 30), (26, 31), (0, 40)):
        expected = every.gather(1, where[..., None].expand(-1, -1, 40))[..., slice(*columns)]
        found = logits(model, ids, grid=grid, where=where, columns=columns)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert model.head_rows(columns).shape == (columns[1] - columns[0], 32)
    assert logits(model, ids, grid=grid, where=where, columns=(0, 0)).shape == (2, 4, 0)


def test_bit_structured_codes_are_the_formula():
    for order in ("big", "little"):
        model = tiny(code_bits=4, bit_order=order)
        ids = torch.tensor([[2, 9, 24, 31, 39, 5]])
        bits = codes_to_bits(torch.arange(16), 4, order)
        weight_in = model.get_input_embeddings().weight.clone()
        weight_in[24:] += bits @ model.bits_in
        hidden = model.trunk(inputs_embeds=weight_in[ids]).last_hidden_state
        weight_out = model.head.weight.clone()
        weight_out[24:] += bits @ model.bits_out
        torch.testing.assert_close(logits(model, ids), hidden @ weight_out.T, rtol=1e-5, atol=1e-5)


def test_pictures_are_placed_by_row_and_column():
    model = tiny(image_side=4)
    grid = grid_of(2, (3, 2))[None]
    ids = ids_for(grid)
    embeddings = model.get_input_embeddings().weight[ids]
    embeddings[0, 2:] += model.rows.weight[[0, 0, 1, 1, 2, 2]] + model.columns.weight[[0, 1, 0, 1, 0, 1]]
    expected = model.trunk(inputs_embeds=embeddings).last_hidden_state @ model.head.weight.T
    torch.testing.assert_close(logits(model, ids, grid=grid), expected, rtol=1e-5, atol=1e-5)


def test_the_plan_of_folding_on_pictures_in_a_row():
    # text, a 2 x 4 picture, a 4 x 2 picture right after it, text, text
    grid = grid_of(1, (2, 4), (4, 2), 2)[None]
    assert picture_widths(grid).tolist() == [[0, *[4] * 8, *[2] * 8, 0, 0]]
    leader, leads, group = fold_plan(grid, 2)
    assert leads.tolist() == [[0, 1, 3, 9, 13, 17, 18]] and leader.nonzero()[:, 1].tolist() == leads[0].tolist()
    assert group.tolist() == [[0, 1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 6]]
    picture = [[0, 1, 4, 5]] * 2 + [[0, 1, 2, 3]] * 2
    assert fold_offsets(grid, 2, leads).tolist() == [[[0] * 4, *picture, [0] * 4, [0] * 4]]


def test_the_plan_of_rows_that_fold_into_different_numbers():
    grid = torch.stack([grid_of(4), grid_of((2, 2))])
    leader, leads, group = fold_plan(grid, 2)
    assert leader.tolist() == [[True] * 4, [True, False, False, False]]
    assert leads.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]] and group.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert fold_plan(grid_of(3, (2, 2))[None], 1)[2].tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_folding_is_the_formula():
    model = tiny(**FOLDED)
    grid = grid_of(2, (4, 4), 1)[None]
    ids = ids_for(grid)
    embedded = model._embed(ids, grid)[0]
    square = torch.tensor([2, 3, 6, 7])
    corners = [0, 2, 8, 10]
    folded = torch.stack([embedded[0], embedded[1], *(model.fold(embedded[square + at].flatten()) for at in corners)])
    out = model.trunk(inputs_embeds=torch.cat([folded, embedded[18:]])[None]).last_hidden_state[0]
    expected = torch.empty(19, 32)
    expected[:2], expected[18] = out[:2], out[6]
    for number, at in enumerate(corners):
        expected[square + at] = model.unfold(out[2 + number]).view(4, 32)
    torch.testing.assert_close(model(ids, grid=grid).hidden[0], expected, rtol=1e-5, atol=1e-5)


def test_what_folding_cannot_do_is_an_error():
    model = tiny(**FOLDED)
    for picture in ((3, 2), (2, 3), (1, 4)):
        grid = grid_of(1, picture)[None]
        with pytest.raises(ValueError, match="no multiple of image_fold 2"):
            model(ids_for(grid), grid=grid)
    with pytest.raises(ValueError, match="cannot be combined with prediction_offset 1"):
        tiny(image_fold=2, prediction_offset=1)


def test_prediction_offset_reads_the_place_before():
    plain, shifted = tiny(), tiny(prediction_offset=1)
    ids = ids_for(grid_of(7))[None]
    expected = logits(plain, ids)
    found = logits(shifted, ids)
    torch.testing.assert_close(found[:, 1:], expected[:, :-1])
    torch.testing.assert_close(found[:, 0], expected[:, 0])
    where = torch.tensor([[6, 1]])
    torch.testing.assert_close(logits(shifted, ids, where=where), expected[:, [5, 0]])


def test_settings_and_rows_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="prediction_offset is 2, expected 0 or 1"):
        tiny(prediction_offset=2)
    with pytest.raises(ValueError, match="code_bits is 3 for 16 image codes"):
        tiny(code_bits=3)
    with pytest.raises(ValueError, match="has no vocabulary"):
        MaskPredictor(MaskPredictorConfig(trunk=TRUNK))
    with pytest.raises(ValueError, match="a row has 65 tokens, expected at most 64"):
        tiny()(torch.ones(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="give grid"):
        tiny(image_side=4)(torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("settings", [FULL, FOLDED | {"tie_word_embeddings": True}], ids=["plain", "folded and tied"])
def test_saving_and_loading_changes_no_bit(tmp_path: Path, settings: dict[str, Any]):
    model = tiny(**settings)
    grid = grid_of(*ROW)[None]
    ids = ids_for(grid)
    model.save_pretrained(tmp_path)
    for again in (MaskPredictor.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert isinstance(again, MaskPredictor) and again.vocabulary == VOCABULARY
        assert torch.equal(logits(again.eval(), ids, grid=grid), logits(model, ids, grid=grid))
        assert again.state_dict().keys() == model.state_dict().keys()
    tied = settings.get("tie_word_embeddings", False)
    assert (again.head.weight is again.get_input_embeddings().weight) == tied
    eager = MaskPredictor.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.trunk.config._attn_implementation == "eager"


def test_gradient_checkpointing_changes_no_gradient():
    grid = grid_of(*ROW)[None]
    ids = ids_for(grid)
    found = []
    for checkpointing in (False, True):
        model = tiny(**FOLDED).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        model(ids, grid=grid).logits.logsumexp(-1).sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in found[0].values())
    torch.testing.assert_close(found[1], found[0])


def test_the_default_has_about_twenty_million_parameters():
    vocabulary = VOCABULARY.to_dict() | {"text_size": 2048, "image_start": 2048, "image_size": 1024}
    with torch.device("meta"):
        model = MaskPredictor(MaskPredictorConfig(vocabulary=vocabulary, code_bits=10, image_side=16))
    assert 18e6 < sum(parameter.numel() for parameter in model.parameters()) < 24e6
    assert model.config.trunk == DEFAULT_TRUNK and model.trunk.config.is_causal is False


@torch.no_grad()
def test_a_float_mask_is_added_to_the_scores_as_it_is():
    model, ids = tiny(), torch.arange(9, 20)[None]
    seen = torch.ones(1, 1, 11, 11, dtype=torch.bool).tril()
    shut = torch.zeros(1, 1, 11, 11).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert torch.equal(logits(model, ids, attention_mask=shut), logits(model, ids, attention_mask=seen))
    # One added everywhere to a query's scores changes nothing; added to one key it does.
    plain = logits(model, ids)
    assert torch.allclose(logits(model, ids, attention_mask=torch.ones(1, 1, 1, 11)), plain, atol=1e-4)
    assert not torch.allclose(logits(model, ids, attention_mask=torch.eye(11)[None, None]), plain, atol=1e-2)
    folded = tiny(**FOLDED)
    grid = grid_of(3, (2, 2), 4)[None]
    with pytest.raises(ValueError, match="float mask"):
        folded(ids_for(grid), grid=grid, attention_mask=torch.zeros(1, 1, 1, 11))


@torch.no_grad()
def test_a_padded_table_gives_logits_for_every_row():
    padded = VOCABULARY.to_dict() | {"rows": VOCABULARY.size + 3}
    for settings in ({}, {"code_bits": 4}):
        model, ids = tiny(vocabulary=padded, **settings), torch.arange(9, 20)[None]
        everything = logits(model, ids)
        assert everything.shape == (1, 11, VOCABULARY.size + 3)
        first, stop = VOCABULARY.image_columns
        assert torch.allclose(logits(model, ids, columns=(first, stop)), everything[..., first:stop], atol=1e-4)
        assert torch.allclose(logits(model, ids, columns=(0, first)), everything[..., :first], atol=1e-4)

"""One id space: nothing overlaps, and nothing out of range passes in silence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from mmdlm.vocabulary import Vocabulary

SMALL = Vocabulary(
    20, 24, 8, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8
)  # fmt: skip


def test_codes_and_ids_are_each_others_inverse():
    codes = torch.arange(8).view(2, 4)
    ids = SMALL.image_ids(codes)
    assert ids.tolist() == [[24, 25, 26, 27], [28, 29, 30, 31]]
    assert torch.equal(SMALL.image_codes(ids), codes)
    assert SMALL.size == 32 and SMALL.image_columns == (24, 32) and SMALL.text_columns == (0, 20)
    assert SMALL.image_ids([]).dtype == torch.int64


def test_only_image_ids_are_images():
    assert SMALL.is_image(torch.arange(33)).nonzero().flatten().tolist() == list(range(24, 32))


@pytest.mark.parametrize("codes", [[8], [-1], [0, 8, 1]])
def test_codes_out_of_range(codes):
    with pytest.raises(ValueError, match=r"is no image code, expected one in \[0, 8\)"):
        SMALL.image_ids(torch.tensor(codes))


@pytest.mark.parametrize("ids", [[23], [32], [SMALL.mask_id]])
def test_ids_out_of_range(ids):
    with pytest.raises(ValueError, match=r"is no image id, expected one in \[24, 32\)"):
        SMALL.image_codes(torch.tensor(ids))


@pytest.mark.parametrize("values", [torch.tensor([1.5]), torch.tensor([True])])
def test_ids_are_integers(values):
    with pytest.raises(ValueError, match="expected integers"):
        SMALL.image_ids(values)


def test_a_special_id_may_lie_in_the_unused_rows_behind_the_text():
    # Qwen3 has no mask word: its first unused row becomes one.
    assert replace(SMALL, mask_id=20, boi_id=23).mask_id == 20
    with pytest.raises(ValueError, match="boi_id is 24, expected an id below image_start 24, or -1 for none"):
        replace(SMALL, boi_id=24)


def test_it_travels_through_json():
    assert Vocabulary.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
    with pytest.raises(ValueError, match="missing: mask_id; unknown: masc_id"):
        Vocabulary.from_dict({("masc_id" if key == "mask_id" else key): v for key, v in SMALL.to_dict().items()})


@pytest.mark.parametrize(
    "change",
    [
        {"image_start": 19},
        {"text_size": 0},
        {"image_size": -1},
        {"mask_id": -1},
        {"mask_id": 24},
        {"eos_id": -2},
        {"eos_id": 1},
        {"pad_id": 0.0},
    ],
)
def test_parts_that_overlap_or_make_no_sense(change):
    with pytest.raises(ValueError, match="Vocabulary"):
        replace(SMALL, **change)


def test_a_published_model_may_lack_words_and_pictures():
    text_only = replace(SMALL, image_size=0, boi_id=-1, eoi_id=-1, draw_id=-1, describe_id=-1, ask_id=-1)
    assert text_only.size == 24 and not text_only.is_image(torch.arange(24)).any()


def test_a_padded_table_has_more_rows_than_ids():
    padded = replace(SMALL, rows=SMALL.size + 4)
    assert padded.size == SMALL.size and padded.image_columns == SMALL.image_columns
    assert (SMALL.table_rows, padded.table_rows) == (SMALL.size, SMALL.size + 4)
    old = {name: value for name, value in SMALL.to_dict().items() if name != "rows"}
    assert Vocabulary.from_dict(old) == SMALL, "what was saved before there was padding still loads"
    with pytest.raises(ValueError, match="rows is 5"):
        replace(SMALL, rows=5)

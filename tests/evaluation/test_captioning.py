"""Caption scores: by hand where hands can, pycocoevalcap with its own Java words where they cannot."""

from __future__ import annotations

import json
import math
import shutil

import pytest

from mmdlm.errors import InputError
from mmdlm.evaluation.captioning import (
    Captioned,
    read_captions,
    read_coco_captions,
    read_flickr30k,
    score_captions,
    write_captions,
)

REFERENCES = [
    Captioned(1, ("1",), ("a red apple on a table", "an apple lies on a wooden table", "a red fruit")),
    Captioned(2, ("2",), ("two dogs run in the grass", "dogs playing in a green field")),
    Captioned(3, ("3",), ("a blue car is parked", "the car in front of the house is blue")),
]
SAID = {1: "a red apple on a wooden table", 2: "two dogs in the grass", 3: "a train"}


def test_the_reference_itself_is_perfect():
    scores = score_captions(REFERENCES, {one.id: one.captions[0] for one in REFERENCES})
    assert scores.summary["bleu_1"] == pytest.approx(1.0, abs=1e-6)
    assert scores.summary["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores.summary["rouge_l"] == pytest.approx(1.0)
    assert scores.summary["cider_d"] > score_captions(REFERENCES, SAID).summary["cider_d"] > 0


def test_bleu_and_rouge_by_hand():
    references = [Captioned(1, ("1",), ("the cat sat on the mat",))]
    scores = score_captions(references, {1: "The cat, the cat!"})
    # clipped words: the 2, cat 1 of 4; brevity exp(1 - 6/4)
    assert scores.summary["bleu_1"] == pytest.approx(3 / 4 * math.exp(1 - 6 / 4), abs=1e-6)
    # longest common subsequence "the cat the": P 3/4, R 3/6, beta 1.2
    assert scores.summary["rouge_l"] == pytest.approx((1 + 1.44) * 0.75 * 0.5 / (0.5 + 1.44 * 0.75))


def test_nothing_in_common_and_nothing_said():
    scores = score_captions(REFERENCES, {1: "zebra", 2: "", 3: "!"})
    assert scores.summary["cider_d"] == 0.0
    assert scores.summary["empty_captions"] == 2
    assert all(row["score"] == 0.0 for row in scores.rows)


def test_rows_do_not_depend_on_the_order():
    forward, backward = score_captions(REFERENCES, SAID), score_captions(REFERENCES[::-1], SAID)
    assert forward.summary == pytest.approx(backward.summary)
    assert forward.rows[0] == pytest.approx(backward.rows[-1])


@pytest.mark.skipif(shutil.which("java") is None, reason="compares with a Java program")
def test_equal_to_pycocoevalcap_with_its_own_words():
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    gold = tokenizer.tokenize({one.id: [{"caption": words} for words in one.captions] for one in REFERENCES})
    ours = tokenizer.tokenize({key: [{"caption": words}] for key, words in SAID.items()})
    expected, _ = Cider().compute_score(gold, ours)
    assert score_captions(REFERENCES, SAID).summary["cider_d"] == pytest.approx(float(expected), abs=1e-12)


def test_meteor_only_with_a_java(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(InputError, match="no java here"):
        score_captions(REFERENCES, SAID, with_java=True)


def test_coco_files(tmp_path):
    path = tmp_path / "captions_val2014.json"
    content = {
        "images": [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 9, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "a dog"}, {"image_id": 9, "id": 2, "caption": "a cat"}],
    }
    path.write_text(json.dumps(content))
    references = read_coco_captions(path)
    assert references[0] == Captioned(7, ("COCO_val2014_000000000007.jpg", "7"), ("a dog",))
    write_captions(tmp_path / "results.json", {7: "a dog", 9: "dog"})
    assert json.loads((tmp_path / "results.json").read_text())[0] == {"image_id": 7, "caption": "a dog"}
    assert score_captions(references, read_captions(tmp_path / "results.json")).summary["pictures"] == 2
    with pytest.raises(InputError, match="9 for one is missing"):
        score_captions(references, {7: "a dog"})
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="picture 9 has no caption"):
        read_coco_captions(path)


def test_flickr30k_files(tmp_path):
    token = tmp_path / "results_20130124.token"
    token.write_text("100.jpg#0\tTwo young guys .\n100.jpg#1\tTwo men .\n200.jpg#0\tA dog .\n")
    assert read_flickr30k(token)[0] == Captioned("100.jpg", ("100.jpg",), ("Two young guys .", "Two men ."))
    split = tmp_path / "dataset_flickr30k.json"
    rows = [
        {"filename": "1.jpg", "split": "test", "sentences": [{"raw": "A dog."}]},
        {"filename": "2.jpg", "split": "train", "sentences": [{"raw": "A cat."}]},
    ]
    split.write_text(json.dumps({"images": rows}))
    assert [one.id for one in read_flickr30k(split, "test")] == ["1.jpg"]
    assert len(read_flickr30k(split)) == 2
    with pytest.raises(InputError, match="no pictures of the split 'val'"):
        read_flickr30k(split, "val")
    with pytest.raises(InputError, match="carries no splits"):
        read_flickr30k(token, "test")
    token.write_text("100.jpg Two men\n")
    with pytest.raises(InputError, match="line 1"):
        read_flickr30k(token)

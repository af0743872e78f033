"""Pictures of a model's own: each one is what its caption says to the model itself, and they are paired data."""

from __future__ import annotations

import pytest
import torch

from mmdlm.data.paired import open_pairs
from mmdlm.errors import InputError
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.pipelines.rehearsal import rehearse, unprompted

THRESHOLD = {"name": "threshold", "tau": 0.9}


def test_the_shipped_model_rehearses_pictures_that_it_describes_as_it_drew_them(tmp_path):
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    made, tried = rehearse(pipe, tmp_path / "own", count=2, questions=["what is this?"], seed=1)
    assert made == 2 <= tried
    pairs = open_pairs(tmp_path / "own")
    assert len(pairs) == 2 and not pairs.problems
    read = ImageToText(pipe.model, pipe.visual_tokenizer, pipe.processor)
    read.presets = pipe.presets
    read.set_progress_bar_config(disable=True)
    for pair in pairs:
        assert read(pair.image, policy=THRESHOLD).texts == pair.texts
        assert read(pair.image, "what is this?", policy=THRESHOLD).texts == pair.questions[0][1]
    assert rehearse(pipe, tmp_path / "own", count=5) == (2, 0)  # it is there: kept as it is


def test_a_model_that_says_nothing_twice_is_told_what_to_do(tiny_model, tmp_path):
    pipe = TextToImage.from_pretrained(tiny_model)
    with pytest.raises(InputError, match="--replay, or --rehearse 0"):
        rehearse(pipe, tmp_path / "own", count=2)
    assert list(tmp_path.iterdir()) == []


def test_what_is_rehearsed_is_varied_and_no_caption_comes_more_than_twice(tmp_path):
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    made, _ = rehearse(pipe, tmp_path / "own", count=12)
    captions = [pair.texts[0] for pair in open_pairs(tmp_path / "own")]
    assert len(captions) == made == 12
    assert max(captions.count(caption) for caption in captions) <= 2
    # The draw preset's own settings gave one caption for 127 of 160 pictures.
    assert len({caption.split()[-1] for caption in captions}) > 3
    first, again = (unprompted(pipe, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert [picture.tobytes() for picture in first] == [picture.tobytes() for picture in again]


def test_a_model_that_says_what_it_knows_draws_just_that(tmp_path):
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    known = [
        {"text": ["a red apple", "an apple that is red"], "question": ["what is this?"], "answers": [["a red apple"]]},
        {"text": ["a cat on a blue background"]},
        {"text": ["a word " * 400]},  # longer than fits beside a picture
    ]
    assert rehearse(pipe, tmp_path / "own", count=5, known=known) == (2, 2)
    pairs = {pair.texts[0]: pair for pair in open_pairs(tmp_path / "own")}
    assert set(pairs) == {"a red apple", "a cat on a blue background"}
    assert pairs["a red apple"].texts == known[0]["text"]
    assert pairs["a red apple"].questions == [("what is this?", ["a red apple"])]
    assert pairs["a cat on a blue background"].image.getpixel((1, 1))[2] > 180

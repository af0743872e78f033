"""Scores on a tiny model of random weights: what they are made of, and that a row does not depend on its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import bounds
from mmdlm.evaluation.scoring import picture_given_words, words_given_picture
from mmdlm.pipelines import ImageToText

TEXTS = ["a red apple", "a blue car on a green background"]


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> ImageToText:
    return ImageToText.from_pretrained(tiny_model)


def test_scores_are_the_bounds_of_the_two_layouts(pipe):
    codes, words = torch.arange(32).view(2, 4, 4), pipe.processor.vocabulary
    ids = [pipe.processor.text_ids(text) for text in TEXTS]
    room = pipe.presets["describe"]["answer_length"]
    told = [sequence.describe_canvas(codes[i], pipe.grid, ids[i], room, words) for i in range(2)]
    drawn = [sequence.draw_canvas(ids[i], codes[i], pipe.grid, words) for i in range(2)]
    for score, canvases in ((words_given_picture, told), (picture_given_words, drawn)):
        found = score(pipe, TEXTS, codes, samples=8, seed=3)
        torch.testing.assert_close(found.nats, bounds(pipe.model, canvases, vocabulary=words, samples=8,
                                                      seeds=[3, 3]).nats)
        assert found.tokens.tolist() == ([room] * 2 if score is words_given_picture else [16, 16])
        for row in range(2):  # alone as beside others
            alone = score(pipe, TEXTS[row : row + 1], codes[row : row + 1], samples=8, seed=3)
            torch.testing.assert_close(alone.nats[0], found.nats[row], rtol=1e-5, atol=1e-5)


def test_texts_may_be_ids_and_may_be_too_long(pipe):
    codes = torch.zeros(1, 4, 4, dtype=torch.long)
    ids = pipe.processor.text_ids(TEXTS[0])
    assert torch.equal(words_given_picture(pipe, [ids], codes, samples=4, seed=0).nats,
                       words_given_picture(pipe, TEXTS[:1], codes, samples=4, seed=0).nats)
    for score in (words_given_picture, picture_given_words):
        with pytest.raises(InputError, match=r"too long by .* tokens, the model has 64 positions"):
            score(pipe, ["word " * 70], codes, samples=4, seed=0)

"""A model before and after: the same numbers for the same model, kept and read back, and a sheet of threes."""

from __future__ import annotations

import pytest
from PIL import Image

from mmdlm.data.paired import Pair
from mmdlm.errors import InputError
from mmdlm.evaluation import before_after
from mmdlm.pipelines import ImageToText, TextToImage


def pair(colour: str, *texts: str, questions: tuple = ()) -> Pair:
    return Pair(colour, Image.new("RGB", (24, 16), colour), list(texts), list(questions), None, None, None)


@pytest.fixture(scope="module")
def pipes(tiny_model) -> tuple[TextToImage, ImageToText]:
    draw = TextToImage.from_pretrained(tiny_model)
    for preset in draw.presets.values():
        preset["num_inference_steps"] = 2
    read = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    read.presets = draw.presets
    for pipe in (draw, read):
        pipe.set_progress_bar_config(disable=True)
    return draw, read


PAIRS = [
    pair("red", "a red apple", "an apple", questions=[("what is it?", ["an apple", "a red apple"])]),
    pair("blue", "a blue car"),
    pair("green", questions=[("what is it?", ["grass"])]),
]


def test_the_same_model_measures_the_same_and_is_kept(pipes, tmp_path):
    found = before_after.measure(*pipes, PAIRS, samples=2)
    again = before_after.measure(*pipes, PAIRS, samples=2)
    assert found.numbers == again.numbers
    assert len(found.captions) == len(found.drawings) == 2  # of the pairs with a caption
    assert 0 < found.numbers["image_nats"] < 20 and found.numbers["text_nats"] > 0
    assert found.numbers["exact"] == 0 and found.numbers["answers"] == 0  # random weights
    assert found.numbers["feature_distance"] > 0
    facts = {"model_hash": "0123456789abcdef", "mmdlm_version": "1"}
    before_after.save_measured(found, tmp_path / "before", prompts=["a red apple", "a blue car"], facts=facts)
    with Image.open(tmp_path / "before" / "0001.png") as drawing:
        assert drawing.text == {"prompt": "a blue car", "seed": "1", **facts}
    kept = before_after.load_measured(tmp_path / "before")
    assert kept is not None and kept.numbers == found.numbers and kept.captions == found.captions
    assert [one.tobytes() for one in kept.drawings] == [one.tobytes() for one in found.drawings]
    assert before_after.load_measured(tmp_path / "after") is None
    lines = before_after.comparison(found, again)
    assert lines[0].split() == ["before", "after"] and len(lines) >= 6


def test_the_sheet_has_three_pictures_for_each_prompt(pipes):
    found = before_after.measure(*pipes, PAIRS[:2], samples=2)
    right = found._replace(captions=["an apple", "a green car"])
    sheet = before_after.before_after_sheet(PAIRS[:2], found, right, side=32)
    assert sheet.width == 6 * (32 + 6 + 6) + 6


def test_pictures_without_captions_are_refused(pipes):
    with pytest.raises(InputError, match="no picture with a caption"):
        before_after.measure(*pipes, PAIRS[2:])

"""GenEval's classes: what their scenes are, and what makes a drawing right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from mmdlm.data.scenes import PictureWorld
from mmdlm.errors import InputError
from mmdlm.evaluation.geneval import CLASSES, class_right, class_scenes
from mmdlm.evaluation.intervals import mean_of_shares, share, wilson


def test_the_scenes_of_every_class_and_what_is_right_of_them(shapes: Path):
    world = PictureWorld(shapes, styles=["noto"], split="train")
    for name, (kind, _) in CLASSES.items():
        scenes = class_scenes(world, name, 3, first=1000)
        assert [scene.caption for scene in scenes] == [s.caption for s in class_scenes(world, name, 3, first=1000)]
        for scene in scenes:
            assert scene.facts["kind"] == kind
            assert class_right(name, scene.facts, scene.facts, world.concepts)
            other = copy.deepcopy(scene.facts)
            other["objects"][0]["concept"] = None
            assert not class_right(name, scene.facts, other, world.concepts)
    assert {s.facts["background"] for s in class_scenes(world, "colors", 3, first=0)} == {"white"}
    with pytest.raises(InputError, match="0 scenes of the class counting, expected 1"):
        class_scenes(world, "counting", 1, first=0, keep=lambda scene: False)


def test_a_class_asks_for_nothing_else(shapes: Path):
    world = PictureWorld(shapes, styles=["noto"], split="train")
    for name, field, still in (
        ("single_object", "background", True), ("counting", "background", True), ("counting", "count", False),
        ("colors", "colour", False), ("colors", "background", True), ("color_attribution", "background", False),
    ):  # fmt: skip
        (scene,) = class_scenes(world, name, 1, first=7)
        seen = copy.deepcopy(scene.facts)
        if field == "background":
            seen["background"] = "pink" if scene.facts["background"] != "pink" else "gray"
        else:
            seen["objects"][0][field] = {"count": 5, "colour": "none of them"}[field]
        assert class_right(name, scene.facts, seen, world.concepts) is still, (name, field)
    (scene,) = class_scenes(world, "two_object", 1, first=7)
    swapped = copy.deepcopy(scene.facts)
    first, second = swapped["objects"]
    first["position"], second["position"] = second["position"], first["position"]
    assert class_right("two_object", scene.facts, swapped, world.concepts)
    assert not class_right("position", scene.facts, swapped, world.concepts)


def test_the_mean_of_shares():
    # one share alone has its Wilson interval; alike ones are the surer the more there are
    low, high = wilson(3, 10)
    assert mean_of_shares([share(3, 10)]) == {"share": 0.3, "low": round(low, 4), "high": round(high, 4), "groups": 1}
    four = mean_of_shares([share(3, 10)] * 4)
    assert four["low"] == pytest.approx(0.3 - (0.3 - low) / 2, abs=1e-4)
    assert mean_of_shares([share(0, 10), share(10, 10)])["share"] == 0.5
    assert mean_of_shares([share(1, 2), share(0, 0)])["share"] is None and mean_of_shares([])["high"] == 1.0

"""The judge on a world of six shapes: trained in seconds, it must see every kind of scene and believe nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmdlm.data.colours import BACKGROUNDS
from mmdlm.data.scenes import KIND_WEIGHTS, PictureWorld, Scene
from mmdlm.errors import InputError
from mmdlm.evaluation.judge import (
    LAYOUTS,
    SLOTS,
    Judge,
    JudgeSettings,
    background_names,
    cached_judge,
    crop,
    is_kept_back,
    layout_of,
    to_pixels,
    train_judge,
)
from mmdlm.evaluation.scene_facts import facts_right, tally
from mmdlm.evaluation.softening import soften

QUICK = JudgeSettings(scenes_per_drawing=1, least_steps=200, batch_scenes=24, widths=(12, 24, 32), learning_rate=4e-3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judges")


@pytest.fixture(scope="module")
def judge(world: PictureWorld, cache: Path) -> Judge:
    return cached_judge(world, QUICK, cache, progress=False)


def shares(judge: Judge, scenes: list[Scene]) -> dict[str, float]:
    seen = judge(np.stack([scene.image for scene in scenes]))
    rows = [(s.facts["kind"], facts_right(s.facts, j.facts, judge.concepts)) for s, j in zip(scenes, seen, strict=True)]
    return {name: counted["share"] for name, counted in tally(rows)["all kinds"].items()}


def test_the_layouts_are_the_worlds(world: PictureWorld):
    assert len(LAYOUTS) == 11 and len(SLOTS) == 13
    for seed in range(100):
        scene = world.scene(seed)
        layout = layout_of(scene.facts)
        assert len(layout.slots) == sum(thing["count"] for thing in scene.facts["objects"])
        rest = scene.image.copy()
        background = np.array(BACKGROUNDS[scene.facts["background"]], np.uint8)
        for cells, left, top in layout.slots:
            square = rest[4 * top : 4 * (top + cells), 4 * left : 4 * (left + cells)]
            assert (square != background).any(), scene.caption
            square[:] = background
        assert (rest == background).all(), f"{scene.caption}: something stands outside the slots"


def test_backgrounds_are_read_exactly_and_through_wear(world: PictureWorld):
    scenes = [world.scene(seed) for seed in range(200)]
    pixels, true = to_pixels(np.stack([s.image for s in scenes])), [s.facts["background"] for s in scenes]
    assert background_names(pixels) == true
    assert background_names(soften(pixels, generator=torch.Generator().manual_seed(0))) == true


def test_a_small_slot_is_seen_pixel_for_pixel():
    pixels = torch.arange(64.0 * 64).view(1, 1, 64, 64).expand(1, 3, 64, 64)
    small = next(slot for slot in SLOTS if slot.cells == 6 and (slot.left, slot.top) == (1, 9))
    assert torch.equal(crop(pixels, small), pixels[:, :, 32:64, 0:32])
    assert {tuple(crop(pixels, slot, shift=(1, -1)).shape) for slot in SLOTS} == {(1, 3, 32, 32)}


@pytest.mark.parametrize("kind", KIND_WEIGHTS)
def test_facts_of_each_kind(judge: Judge, shapes: Path, kind: str):
    held_out = PictureWorld(shapes, concepts=6, styles=["noto"], split="held_out", kind_weights={kind: 1.0})
    scenes = [held_out.scene(seed) for seed in range(20)]
    seen = judge(np.stack([scene.image for scene in scenes]))
    exact = 0
    for scene, judged in zip(scenes, seen, strict=True):
        objects = [{k: v for k, v in thing.items() if k != "style"} for thing in scene.facts["objects"]]
        exact += judged.facts == {**scene.facts, "objects": objects}
    assert exact >= 18


def test_what_was_kept_back_is_seen_all_the_same(judge: Judge, shapes: Path):
    held_out = PictureWorld(shapes, concepts=6, styles=["noto"], split="held_out")
    scenes = [scene for scene in map(held_out.scene, range(600)) if is_kept_back(scene)]
    assert 100 < len(scenes) < 200
    right = shares(judge, scenes)
    assert right["background"] == 1.0 and right["all"] >= 0.95 and min(right.values()) >= 0.8, right


def test_exchanged_names_are_not_believed(judge: Judge, exchanged: Path):
    """Where every shape goes by another's name the objects are wrong, and only the objects."""
    other = PictureWorld(exchanged, concepts=6, styles=["noto"], split="all")
    right = shares(judge, [other.scene(seed) for seed in range(100)])
    assert right["object"] <= 0.05 and right["all"] <= 0.05
    assert right["background"] == 1.0 and right["count"] >= 0.9


def test_a_missing_object_is_missed(judge: Judge, world: PictureWorld):
    three = next(s for s in map(world.scene, range(1000)) if s.facts["objects"][0]["count"] == 3)
    picture = three.image.copy()
    picture[36:60, 36:60] = BACKGROUNDS[three.facts["background"]]
    (judged,) = judge(picture[None])
    right = facts_right(three.facts, judged.facts, judge.concepts)
    assert right["object"] and not right["count"] and not right["all"]


def test_an_empty_picture_shows_nothing(judge: Judge):
    blank = np.full((2, 64, 64, 3), BACKGROUNDS["blue"], np.uint8)
    assert [judged.facts["objects"] for judged in judge(blank)] == [[], []]


def test_a_picture_is_judged_alone_and_at_any_multiple(judge: Judge, world: PictureWorld):
    pictures = np.stack([world.scene(seed).image for seed in range(10)])
    facts = [judged.facts for judged in judge(pictures)]
    assert [judge(picture[None])[0].facts for picture in pictures] == facts
    assert [judged.facts for judged in judge(pictures.repeat(2, 1).repeat(2, 2))] == facts
    with pytest.raises(ValueError, match="multiple of 64"):
        judge(pictures[:, :48, :48])


def test_the_cache_gives_the_same_judge(judge: Judge, world: PictureWorld, cache: Path):
    assert len(list(cache.iterdir())) == 1
    again = cached_judge(world, QUICK, cache, progress=False)
    for name, weight in judge.net.state_dict().items():
        assert torch.equal(weight, again.net.state_dict()[name])
    other = JudgeSettings(scenes_per_drawing=1, least_steps=2, batch_scenes=4, widths=(4, 8, 8))
    cached_judge(world, other, cache, progress=False)
    assert len(list(cache.glob("judge-*.safetensors"))) == 2 and len(list(cache.iterdir())) == 2


def test_only_the_whole_world_makes_a_judge(shapes: Path):
    with pytest.raises(InputError, match="expected 'all' at 64"):
        train_judge(PictureWorld(shapes, concepts=6, styles=["noto"], split="held_out"), QUICK)

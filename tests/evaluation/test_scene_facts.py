"""Facts against facts, and facts read from captions."""

from __future__ import annotations

import random

import pytest

from mmdlm.data.captions import Thing, canonical_caption
from mmdlm.data.concepts import Concept, load_concepts
from mmdlm.evaluation.scene_facts import caption_facts, facts_right, tally

CONCEPTS = load_concepts()


def thing(concept, *, colour=None, count=1, position=None, size=None):
    return {"concept": concept, "colour": colour, "count": count, "position": position, "size": size}


def facts(kind, background, *objects, relation=None):
    return {"kind": kind, "background": background, "relation": relation, "objects": list(objects)}


ALONE = {"position": "centre", "size": "large"}
LEFT, UNDER = thing("cat", position="left"), thing("tree", position="bottom")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a red apple", facts("single", "white", thing("red apple", **ALONE))),
        (
            "a yellow apple on an orange background",
            facts("recoloured", "orange", thing("red apple", colour="yellow", **ALONE)),
        ),
        ("a green apple on a red background", facts("single", "red", thing("green apple", **ALONE))),
        ("scissors on a blue background", facts("single", "blue", thing("scissors", **ALONE))),
        ("three fish on a pink background", facts("count", "pink", thing("fish", count=3))),
        ("two slices of pizza", facts("count", "white", thing("slice of pizza", count=2))),
        (
            "a small cup of coffee in the bottom left on a gray background",
            facts("small", "gray", thing("cup of coffee", position="bottom left", size="small")),
        ),
        (
            "a cat to the left of a bus on a black background",
            facts("pair", "black", LEFT, thing("bus", position="right"), relation="horizontal"),
        ),
        (
            "a house above a tree",
            facts("pair", "white", thing("house", position="top"), UNDER, relation="vertical"),
        ),
        ("a flurb on a blue background", facts("single", "blue", thing(None, **ALONE))),
        ("five cats", facts("single", "white", thing(None, **ALONE))),
        ("", facts("single", "white", thing(None, **ALONE))),
    ],
)
def test_captions_are_read_exactly(caption: str, expected: dict):
    assert caption_facts(caption, CONCEPTS) == expected


def canonical(objects: list[tuple[Concept, dict]], background: str, relation: str | None) -> str:
    things = (Thing(c, "noto", t["colour"], t["count"], t["position"], t["size"]) for c, t in objects)
    return canonical_caption(tuple(things), background, relation)


def test_every_concepts_own_captions_are_read_back():
    chance = random.Random(0)
    for concept in CONCEPTS:
        other = chance.choice([c for c in CONCEPTS if c is not concept])
        single = thing(concept.name, **ALONE)
        small = thing(concept.name, position="top right", size="small")
        pair = [thing(concept.name, position="left"), thing(other.name, position="right")]
        cases = [
            facts("single", "blue", single), facts("small", "orange", small),
            facts("pair", "white", *pair, relation="horizontal"),
        ]  # fmt: skip
        if concept.plural:
            cases.append(facts("count", "red", thing(concept.name, count=3)))
        for true in cases:
            objects = [(concept, true["objects"][0]), *([(other, pair[1])] if true["kind"] == "pair" else [])]
            caption = canonical(objects, true["background"], true["relation"])
            right = facts_right(true, caption_facts(caption, CONCEPTS), CONCEPTS)
            assert all(right.values()), (caption, caption_facts(caption, CONCEPTS))


def test_what_is_wrong_is_told_apart():
    pair = facts("pair", "red", thing("cat", position="left"), thing("dog", position="right"), relation="horizontal")
    swapped = facts("pair", "red", thing("dog", position="left"), thing("cat", position="right"), relation="horizontal")
    assert facts_right(pair, pair, CONCEPTS) == {"object": True, "background": True, "position": True, "all": True}
    assert facts_right(pair, swapped, CONCEPTS) == {"object": True, "background": True, "position": False, "all": False}
    half = facts("pair", "red", thing("cat", position="left"), thing("car", position="right"), relation="horizontal")
    assert facts_right(pair, half, CONCEPTS) == {"object": False, "background": True, "position": True, "all": False}
    three, two = facts("count", "white", thing("cat", count=3)), facts("count", "white", thing("cat", count=2))
    assert facts_right(three, two, CONCEPTS) == {"object": True, "background": True, "count": False, "all": False}
    mixed = facts("count", "white", thing("cat", count=2), thing("dog"))
    assert facts_right(three, mixed, CONCEPTS) == {"object": False, "background": True, "count": True, "all": False}
    nothing = facts("single", "white")
    assert not any(v for k, v in facts_right(three, nothing, CONCEPTS).items() if k != "background")


def test_a_recoloured_thing_goes_by_its_noun():
    at = {"position": "centre", "size": "large"}
    yellow = facts("recoloured", "blue", thing("red apple", colour="yellow", **at))
    other = facts("recoloured", "blue", thing("green apple", colour="yellow", **at))
    own = facts("single", "blue", thing("red apple", **at))
    assert all(facts_right(yellow, other, CONCEPTS).values())
    assert facts_right(yellow, own, CONCEPTS) == {"object": True, "background": True, "colour": False, "all": False}
    assert facts_right(own, facts("single", "blue", thing("green apple", **at)), CONCEPTS)["object"] is False


def test_a_tally_counts_by_kind():
    rows = [("single", {"object": True, "all": True}), ("count", {"object": True, "count": False, "all": False})]
    counted = tally(rows)
    assert list(counted) == ["all kinds", "single", "count"]
    assert (counted["all kinds"]["object"]["right"], counted["all kinds"]["object"]["total"]) == (2, 2)
    assert (counted["all kinds"]["count"]["right"], counted["all kinds"]["count"]["total"]) == (0, 1)
    assert counted["count"]["all"]["share"] == 0.0

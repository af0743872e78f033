"""Words about scenes: exact captions, articles, and questions whose answers follow from the facts."""

from __future__ import annotations

import random
import re

import pytest

from mmdlm.data.captions import Thing, canonical_caption, phrasings, questions
from mmdlm.data.concepts import load_concepts

BY_NAME = {concept.name: concept for concept in load_concepts()}


def thing(name: str, *, colour=None, count=1, position=None, size=None) -> Thing:
    return Thing(BY_NAME[name], "noto", colour, count, position, size)


@pytest.mark.parametrize(
    ("things", "background", "relation", "caption"),
    [
        ([thing("red apple")], "white", None, "a red apple"),
        ([thing("red apple")], "blue", None, "a red apple on a blue background"),
        ([thing("elephant")], "orange", None, "an elephant on an orange background"),
        ([thing("red apple", colour="blue")], "white", None, "a blue apple"),
        ([thing("elephant", colour="blue")], "white", None, "a blue elephant"),
        ([thing("car", colour="orange")], "gray", None, "an orange car on a gray background"),
        ([thing("scissors")], "white", None, "scissors"),
        ([thing("scissors", colour="blue")], "white", None, "blue scissors"),
        ([thing("cat", count=3)], "green", None, "three cats on a green background"),
        ([thing("scissors", count=2)], "white", None, "two pairs of scissors"),
        ([thing("elephant", size="small", position="top left")], "pink", None,
         "a small elephant in the top left on a pink background"),
        ([thing("cat"), thing("owl")], "pink", "horizontal", "a cat to the left of an owl on a pink background"),
        ([thing("cat"), thing("scissors")], "white", "vertical", "a cat above scissors"),
    ],
)  # fmt: skip
def test_canonical_captions(things, background: str, relation, caption: str):
    assert canonical_caption(tuple(things), background, relation) == caption
    found = phrasings(tuple(things), background, relation, random.Random(0))
    assert found[:2] == [caption, f"{caption}, noto style"]
    assert len(set(found)) == len(found) >= 4


def test_phrasings_keep_the_facts():
    things = (thing("cat", position="left"), thing("dog", position="right"))
    for seed in range(200):
        for words in phrasings(things, "blue", "horizontal", random.Random(seed)):
            words = words.lower()
            cat = re.search("cat|kitty", words)
            dog = re.search("dog", words)
            assert "blue" in words and cat and dog
            assert (cat.start() < dog.start()) == ("right of" not in words), words
    for seed in range(200):
        for words in phrasings((thing("cat", count=3),), "white", None, random.Random(seed)):
            assert re.search(r"\b(three|3) cats", words.lower())


def test_no_phrasing_has_a_wrong_article():
    wrong = re.compile(r"\ba (?!uni|euro|ufo|one)[aeiou]|\ban (?!hour|x-ray|suv)[^aeiou]|\ban? an? |  ")
    for number, concept in enumerate(load_concepts()):
        for words in phrasings((Thing(concept, "noto", None, 1, "centre", "large"),), "orange", None,
                               random.Random(number)):  # fmt: skip
            assert not wrong.search(words.lower()), words


def test_questions_about_a_single_thing():
    asked = dict(
        (question.replace("color ", "colour "), answer)
        for seed in range(40)
        for question, answer, _ in questions(
            (thing("red apple", position="centre", size="large"),), "blue", None, BY_NAME["car"], random.Random(seed)
        )
    )
    assert asked["what is this?"] == asked["what is in the picture?"] == "a red apple"
    assert asked["what colour is the background?"] == "blue"
    assert asked["what colour is the apple?"] == "red"
    assert asked["how many red apples are there?"] == "one"
    assert asked["is the red apple small or large?"] == "large"
    assert asked["is there a red apple?"] == "yes"
    assert asked["is there a car?"] == "no"
    assert asked["is the background blue?"] == "yes"
    assert asked["is the background green?"] == "no"


def test_questions_about_a_pair():
    things = (thing("cat", position="left"), thing("scissors", position="right"))
    asked = {
        question: (answer, kind)
        for seed in range(60)
        for question, answer, kind in questions(things, "white", "horizontal", BY_NAME["car"], random.Random(seed))
    }
    assert asked["what is in the picture?"] == ("a cat and scissors", "what")
    assert asked["what is to the left of the scissors?"] == ("a cat", "position")
    assert asked["what is to the right of the cat?"] == ("scissors", "position")
    assert asked["where is the cat?"] == ("on the left", "position")
    assert asked["where are the scissors?"] == ("on the right", "position")
    assert asked["is the cat to the left of the scissors?"] == ("yes", "yes_no")
    assert asked["are the scissors to the left of the cat?"] == ("no", "yes_no")
    assert asked["are there scissors?"] == ("yes", "yes_no")


def test_nothing_is_asked_about_presence_without_a_sure_absentee():
    asked = questions((thing("cat"),), "white", None, None, random.Random(0))
    assert not [question for question, _, _ in asked if "there a" in question]

"""The table of concepts: names, articles and plurals that a reader would accept, commonest first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mmdlm.data.colours import BACKGROUNDS
from mmdlm.data.concepts import article_before, common_concepts, load_concepts, unlike_cldr
from mmdlm.errors import InputError

CONCEPTS = load_concepts()
BY_NAME = {concept.name: concept for concept in CONCEPTS}


def test_names_sequences_and_aliases_are_unique():
    names = [concept.name.lower() for concept in CONCEPTS]
    aliases = [alias.lower() for concept in CONCEPTS for alias in concept.aliases]
    assert 1100 <= len(CONCEPTS) <= 1300
    assert len(set(names)) == len(names)
    assert len({concept.sequence for concept in CONCEPTS}) == len(CONCEPTS)
    assert not set(aliases) & set(names)
    assert len(set(aliases)) == len(aliases)


def test_what_is_left_out():
    for concept in CONCEPTS:
        assert not re.search(r"\d|o'clock|flag:|keycap|skin tone", concept.name), concept
        points = [int(point, 16) for point in concept.sequence.split("-")]
        assert not any(0x1F3FB <= point <= 0x1F3FF for point in points), f"{concept} has a skin tone"
        assert not all(0x1F1E6 <= point <= 0x1F1FF for point in points), f"{concept} is a flag"


def test_the_commonest_come_first():
    first = [concept.name for concept in common_concepts(50)]
    assert {"cat", "dog", "red apple", "car", "tree", "house", "sun", "star", "fish", "banana"} <= set(first)
    assert common_concepts(None) == CONCEPTS


@pytest.mark.parametrize("count", [0, -1, 5000])
def test_a_number_of_concepts_that_there_is_not(count: int):
    with pytest.raises(InputError, match=f"concepts={count} .* give a number from 1 to"):
        common_concepts(count)


@pytest.mark.parametrize(
    ("name", "phrase", "plural"),
    [
        ("cat", "a cat", "cats"),
        ("elephant", "an elephant", "elephants"),
        ("unicorn face", "a unicorn face", "unicorn faces"),
        ("hourglass", "an hourglass", "hourglasses"),
        ("X-ray", "an X-ray", "X-rays"),
        ("scissors", "scissors", "pairs of scissors"),
        ("grapes", "grapes", "bunches of grapes"),
        ("fish", "a fish", "fish"),
        ("sheep", "a sheep", "sheep"),
        ("mouse", "a mouse", "mice"),
        ("goose", "a goose", "geese"),
        ("tooth", "a tooth", "teeth"),
        ("snowman", "a snowman", "snowmen"),
        ("maple leaf", "a maple leaf", "maple leaves"),
        ("loaf of bread", "a loaf of bread", "loaves of bread"),
        ("cup of coffee", "a cup of coffee", "cups of coffee"),
        ("bow and arrow", "a bow and arrow", "bows and arrows"),
        ("strawberry", "a strawberry", "strawberries"),
        ("die", "a die", "dice"),
        ("person running", "a person running", "people running"),
        ("Statue of Liberty", "the Statue of Liberty", "statues of liberty"),
        ("broccoli", "broccoli", ""),
    ],
)
def test_articles_and_plurals(name: str, phrase: str, plural: str):
    assert (BY_NAME[name].phrase, BY_NAME[name].plural) == (phrase, plural)


def test_articles_follow_the_sound():
    for concept in CONCEPTS:
        if concept.article in ("a", "an"):
            assert concept.article == article_before(concept.name, "a"), concept
    assert article_before("orange car", "a") == "an"
    assert article_before("blue elephant", "an") == "a"
    assert article_before("UFO", "an") == article_before("unicorn", "an") == "a"
    assert article_before("hourglass", "a") == article_before("SUV", "a") == "an"
    assert article_before("small scissors", "") == ""


def test_no_plural_has_two_endings():
    for concept in CONCEPTS:
        assert not re.search(r"glasseses|ieses|menses|peoples|[^aeiou]ys\b|person \w+ings\b", concept.plural), concept


def test_are_is_for_plural_names_only():
    assert [name for name in ("scissors", "jeans", "grapes", "socks", "fireworks") if not BY_NAME[name].is_plural] == []
    singular = ("Santa Claus", "bus", "glass of milk", "sushi", "thumbs up", "money with wings", "cactus")
    assert [name for name in singular if BY_NAME[name].is_plural and name != "money with wings"] == []


def test_the_colourless_noun():
    assert BY_NAME["red apple"].noun == BY_NAME["green apple"].noun == "apple"
    for concept in CONCEPTS:
        assert concept.noun.split()[0] not in BACKGROUNDS, concept


def test_groups_are_held_against_unicode_s(tmp_path: Path):
    """The package's two files, as laid out there, written from the table itself."""
    groups = sorted({concept.group for concept in load_concepts()})
    parts = sorted({concept.subgroup for concept in load_concepts()})
    titles = {name: {str(n): title for n, title in enumerate(found)} for name, found in
              (("groups", groups), ("subgroups", parts))}  # fmt: skip
    rows = [{"hexcode": one.sequence, "group": groups.index(one.group), "subgroup": parts.index(one.subgroup)}
            for one in load_concepts()]  # fmt: skip
    for name, content in (("meta/groups.json", titles), ("en/data.json", rows)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    assert unlike_cldr(tmp_path) == []
    rows[3]["subgroup"] = (rows[3]["subgroup"] + 1) % len(parts)
    del rows[7]
    (tmp_path / "en/data.json").write_text(json.dumps(rows))
    assert unlike_cldr(tmp_path) == [load_concepts()[3].name, load_concepts()[7].name]
    (tmp_path / "en/data.json").write_text("[1]")
    with pytest.raises(InputError, match="can not be read"):
        unlike_cldr(tmp_path)

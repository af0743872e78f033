"""Facts against facts: what of a scene is right in what a judge saw, or in what a caption says.

A scene's facts are `{kind, background, relation, objects: [{concept, colour, count, position, size}]}`
(`mmdlm.data.scenes`); a judge gives the same form, and `caption_facts` reads it from a caption.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmdlm.data.captions import NUMBERS, RELATIONS
from mmdlm.data.colours import BACKGROUNDS, PAINTS
from mmdlm.data.concepts import Concept
from mmdlm.evaluation.intervals import share

Facts = Mapping[str, Any]
FACTS = ("object", "background", "colour", "count", "position", "all")
# What a kind of scene is asked about, besides everything together: elsewhere the fact is trivial.
ASKED = {
    "single": ("object", "background"),
    "recoloured": ("object", "background", "colour"),
    "small": ("object", "background", "position"),
    "count": ("object", "background", "count"),
    "pair": ("object", "background", "position"),
}


def facts_right(true: Facts, seen: Facts, concepts: Sequence[Concept]) -> dict[str, bool]:
    """Which of a scene's facts are right: every one of FACTS that its kind is asked about.

    object: exactly the true concepts, in any order and number. colour: exactly the true paint, or none. count: the
    number of objects. position: of a small object; of a pair, the axis, and each object that is right in its place.
    all: all of these, and the kind of scene. A recoloured thing is named by its noun, as in its caption: a red apple
    painted yellow and a green apple painted yellow are both "a yellow apple".
    """
    nouns = {concept.name: concept.noun for concept in concepts}
    wanted, found = true["objects"], seen["objects"]
    painted = any(thing["colour"] for thing in wanted)

    def named(things: Iterable[Facts]) -> list[Any]:
        return [nouns.get(thing["concept"], thing["concept"]) if painted else thing["concept"] for thing in things]

    right = {
        "object": set(named(wanted)) == set(named(found)),
        "background": true["background"] == seen["background"],
        "colour": {thing["colour"] for thing in wanted} == {thing["colour"] for thing in found},
        "count": sum(thing["count"] for thing in wanted) == sum(thing["count"] for thing in found),
        "position": _position_right(true, seen),
    }
    same_kind = true["kind"] == seen["kind"]
    return {name: right[name] for name in ASKED[true["kind"]]} | {"all": all(right.values()) and same_kind}


def _position_right(true: Facts, seen: Facts) -> bool:
    if true["relation"] is None:
        places = {thing["position"] for thing in true["objects"]}
        return seen["relation"] is None and places == {thing["position"] for thing in seen["objects"]}
    if true["relation"] != seen["relation"]:
        return False
    wanted = {thing["concept"]: thing["position"] for thing in true["objects"]}
    known = [thing for thing in seen["objects"] if thing["concept"] in wanted]
    return bool(known) and all(wanted[thing["concept"]] == thing["position"] for thing in known)


def tally(rows: Iterable[tuple[str, Mapping[str, bool]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """(kind, what was right) of many -> {"all kinds" or a kind: {fact: a row of `share`}}, in the order of FACTS."""
    counts: dict[str, dict[str, list[int]]] = {}
    for kind, right in rows:
        for group in ("all kinds", kind):
            for name, value in right.items():
                counted = counts.setdefault(group, {}).setdefault(name, [0, 0])
                counted[0] += bool(value)
                counted[1] += 1
    return {group: {name: share(*counted) for name, counted in facts.items()} for group, facts in counts.items()}


# ---------------------------------------------------------------------------------------------------- captions

_BACKGROUND = re.compile(rf"(?P<rest>.*) on an? (?P<name>{'|'.join(BACKGROUNDS)}) background")
_SMALL = re.compile(r"(?:an? |the )?small (?P<thing>.+) in the (?P<place>(?:top|bottom) (?:left|right)|centre)")
_ARTICLE = re.compile(r"^(?:an?|the) ")
_NUMBER_WORDS = {word: number for number, word in NUMBERS.items() if number > 1}
_POSITIONS = {"horizontal": ("left", "right"), "vertical": ("top", "bottom")}


def caption_facts(caption: str, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What a caption in the canonical form says. What it calls by a name that no concept has is concept None.

    Only canonical names count: other names of the same thing are wrong. The facts of a caption are as a scene's, but
    for the style.
    """
    words = " ".join(caption.split())
    found = _BACKGROUND.fullmatch(words)
    background, words = (found["name"], found["rest"]) if found else ("white", words)
    for relation, phrase in RELATIONS.items():
        first, between, second = words.partition(f" {phrase} ")
        if between:
            pair = zip((first, second), _POSITIONS[relation], strict=True)
            objects = [_thing(part, concepts, position=place, size=None) for part, place in pair]
            return {"kind": "pair", "background": background, "relation": relation, "objects": objects}
    if small := _SMALL.fullmatch(words):
        thing = _thing(small["thing"], concepts, position=small["place"], size="small")
        kind = "small"
    else:
        thing = _thing(words, concepts, position="centre", size="large")
        kind = "recoloured" if thing["colour"] else "single"
        if thing["count"] > 1:
            kind, thing = "count", {**thing, "position": None, "size": None}
    return {"kind": kind, "background": background, "relation": None, "objects": [thing]}


def _thing(words: str, concepts: Sequence[Concept], *, position: str, size: str | None) -> dict[str, Any]:
    """A noun phrase: "a red apple", "a yellow apple" (recoloured), "three cats", "scissors"."""
    bare = _ARTICLE.sub("", words)
    first, _, rest = bare.partition(" ")
    count, paint = 1, None
    # A concept's own name comes first: "a green apple" is no recoloured apple where there is a green one.
    concept = next((c.name for c in concepts if c.name == bare), None)
    if concept is None and first in _NUMBER_WORDS:
        count = _NUMBER_WORDS[first]
        concept = next((c.name for c in concepts if c.plural == rest), None)
    elif concept is None and first in PAINTS:
        concept = next((c.name for c in concepts if c.noun == rest), None)
        paint = first if concept else None
    return {"concept": concept, "colour": paint, "count": count, "position": position, "size": size}

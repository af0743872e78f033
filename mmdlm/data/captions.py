"""Words about a scene: one canonical caption, other phrasings of it, and questions with their short answers.

Everything is derived from the things in the scene, so it is true by construction. The canonical caption is the target
of captioning; the other phrasings are what people might type as a prompt. It names neither the style nor a white
background. Answers are short: "a red apple", "blue", "three", "top left", "yes".
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from mmdlm.data.colours import BACKGROUNDS, PAINTS
from mmdlm.data.concepts import Concept, article_before, with_article
from mmdlm.data.drawings import STYLES

NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
# from the first thing of a pair to the second; the first is the left or the upper one
RELATIONS = {"horizontal": "to the left of", "vertical": "above"}
_REVERSED = {"horizontal": "to the right of", "vertical": "below"}
_PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
_UNCOUNTED = {
    "corn", "maize", "bread", "cheese", "wine", "milk", "beer", "coffee", "tea", "ice cream", "chocolate", "lightning",
    "high voltage", "toilet paper", "luggage", "ice", "salt", "honey", "meat", "cutlery", "rice", "cooked rice",
    "champagne", "sake", "whisky", "lettuce", "bok choy", "French bread", "rain", "snow", "yarn", "wool", "thread",
    "blood", "soap", "green tea", "spaghetti", "pasta", "ramen", "food", "money", "wind", "ginger", "stew", "curry",
    "sheet music", "canned food", "double helix",
}  # fmt: skip
_OPENINGS = (
    "a picture of {}", "picture of {}", "a drawing of {}", "draw {}", "an emoji of {}", "an icon of {}",
    "an image of {}", "show me {}", "please draw {}", "{}, simple drawing",
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """What stands in a scene: `count` drawings of one concept in one size."""

    concept: Concept
    style: str
    colour: str | None  # where it was recoloured
    count: int
    position: str | None  # "top left", "centre", or of a pair "left", "right", "top", "bottom"
    size: str | None  # "small", "large", or None where size says nothing

    @property
    def name(self) -> str:
        """The singular without an article: "red apple", "blue apple" where it was recoloured."""
        return f"{self.colour} {self.concept.noun}" if self.colour else self.concept.name

    @property
    def phrase(self) -> str:
        """With its article or number: "a red apple", "three cats", "scissors"."""
        return self.named(self.name)

    @property
    def definite(self) -> str:
        """ "the cat", "the apple" where colour is what is asked about."""
        return f"the {self.concept.noun if self.colour else self.concept.name}"

    @property
    def be(self) -> str:
        """ "is" or "are"."""
        return "are" if self.count > 1 or self.concept.is_plural else "is"

    def facts(self) -> dict[str, Any]:
        """The thing as plain values, the concept by its name."""
        return {**vars(self), "concept": self.concept.name}

    def named(self, name: str) -> str:
        """`name` (a singular) with the article or number that the thing takes."""
        if self.count > 1:
            return f"{NUMBERS[self.count]} {self.concept.plural}"
        article = self.concept.article
        return with_article(name, article if name == self.concept.name else article_before(name, article))


def canonical_caption(things: tuple[Thing, ...], background: str, relation: str | None) -> str:
    """The one caption that says all there is to say about a scene, in its one form."""
    return _subject(things, relation) + _on(background)


def phrasings(
    things: tuple[Thing, ...], background: str, relation: str | None, rng: random.Random, count: int = 6
) -> list[str]:
    """The canonical caption, the canonical caption with the style named, and up to `count` other phrasings."""
    canonical = canonical_caption(things, background, relation)
    style = STYLES[things[0].style].phrase
    found = [canonical, f"{canonical}, {style} style"]
    for _ in range(count):
        words = _varied_subject(things, relation, rng) + _varied_background(background, rng)
        if rng.random() < 0.4:
            words = rng.choice(_OPENINGS).format(words)
        if rng.random() < 0.3:
            words += rng.choice((f", {style} style", f" in the {style} style", f", {style}"))
        if rng.random() < 0.15:
            words = words[0].upper() + words[1:] + rng.choice((".", "", "!"))
        if words not in found:
            found.append(words)
    return found


def questions(
    things: tuple[Thing, ...], background: str, relation: str | None, absent: Concept | None, rng: random.Random
) -> list[tuple[str, str, str]]:
    """Questions about a scene: (question, answer, kind), kinds what, background, colour, count, position, size, yes_no.

    `absent` is a concept that is not in the scene; without one, nothing is asked about what is there.
    """
    colour = rng.choice(("colour", "color"))
    asked = [(f"what {colour} is the background?", background, "background")]
    first = things[0]
    if relation is None:
        asked.append((rng.choice(("what is this?", "what is in the picture?")), first.phrase, "what"))
    else:
        both = f"{things[0].phrase} and {things[1].phrase}"
        asked.append(("what is in the picture?", both, "what"))
        asked.extend(_pair_questions(things, relation, rng))
    if (own := own_colour(first)) is not None and relation is None and first.count == 1:
        asked.append((f"what {colour} {first.be} the {first.concept.noun}?", own, "colour"))
    for thing in things:
        if thing.concept.plural and thing.colour is None:
            asked.append((f"how many {thing.concept.plural} are there?", NUMBERS[thing.count], "count"))
    if first.size == "small":
        asked.append((f"where {first.be} {first.definite}?", f"in the {first.position}", "position"))
    if first.size is not None:
        asked.append((f"{first.be} {first.definite} small or large?", first.size, "size"))
    if absent is not None:
        asked.append(_presence(rng.choice(things), absent, rng))
    told = background if rng.random() < 0.5 else rng.choice([name for name in BACKGROUNDS if name != background])
    asked.append((f"is the background {told}?", _yes(told == background), "yes_no"))
    return asked


def own_colour(thing: Thing) -> str | None:
    """The colour that the words name: of a recoloured thing, or in the concept's own name ("red apple")."""
    if thing.colour is not None:
        return thing.colour
    word = thing.concept.name.split()[0]
    return word if thing.concept.noun != thing.concept.name and (word in PAINTS or word in BACKGROUNDS) else None


def _subject(things: tuple[Thing, ...], relation: str | None) -> str:
    if relation is not None:
        return f"{things[0].phrase} {RELATIONS[relation]} {things[1].phrase}"
    thing = things[0]
    if thing.size == "small":
        return f"{thing.named(f'small {thing.name}')} in the {thing.position}"
    return thing.phrase


def _on(background: str) -> str:
    return "" if background == "white" else f" on {_a(background)} background"


def _a(word: str) -> str:
    return f"{article_before(word, 'a')} {word}"


def _varied_subject(things: tuple[Thing, ...], relation: str | None, rng: random.Random) -> str:
    if relation is not None:
        first, second = (_varied(thing, rng) for thing in things)
        if rng.random() < 0.4:
            return f"{second} {_REVERSED[relation]} {first}"
        if relation == "horizontal":
            other = (f"{first} left of {second}", f"{first} on the left and {second} on the right")
        else:
            other = (f"{first} over {second}", f"{first} at the top and {second} at the bottom")
        return rng.choice((f"{first} {RELATIONS[relation]} {second}", *other))
    thing = things[0]
    if thing.count > 1:
        words = _varied(thing, rng)
        return rng.choice((words, words, words.replace(NUMBERS[thing.count], str(thing.count), 1)))
    if thing.size == "small":
        words = _varied(thing, rng, rng.choice(("small", "tiny", "little")))
        return f"{words} {rng.choice((f'in the {thing.position}', f'at the {thing.position}'))}"
    return _varied(thing, rng, rng.choice(("large", "big")) if thing.size == "large" and rng.random() < 0.2 else None)


def _varied(thing: Thing, rng: random.Random, adjective: str | None = None) -> str:
    """The thing with or without its article, by its name or another one."""
    if thing.count > 1:
        return thing.phrase
    name = thing.name
    if thing.colour is None and thing.concept.aliases and rng.random() < 0.35:
        name = rng.choice(thing.concept.aliases)
        article = _alias_article(name, thing.concept)
    else:
        article = thing.concept.article if name == thing.concept.name else article_before(name, thing.concept.article)
    if adjective:
        name, article = f"{adjective} {name}", article_before(adjective, article)
    return name if rng.random() < 0.25 else with_article(name, article)


def _alias_article(name: str, concept: Concept) -> str:
    """ "a" or "an", or none before plurals ("trousers", "flowers") and what is not counted ("bread", "snow")."""
    plural = name.split(" of ")[0].endswith("s") and not name.endswith(("ss", "us"))
    return "" if plural or name in _UNCOUNTED else article_before(name, concept.article or "a")


def _varied_background(background: str, rng: random.Random) -> str:
    said = "grey" if background == "gray" and rng.random() < 0.4 else background
    if background == "white" and rng.random() < 0.6:
        return ""
    return rng.choice(
        (
            f" on {_a(said)} background", f" on {_a(said)} background", f" on {said}", f", {said} background",
            f" against {_a(said)} background", f" in front of {_a(said)} background",
        )
    )  # fmt: skip


def _pair_questions(things: tuple[Thing, ...], relation: str, rng: random.Random) -> list[tuple[str, str, str]]:
    first, second = things
    asked = [
        (f"what is {RELATIONS[relation]} {second.definite}?", first.phrase, "position"),
        (f"what is {_REVERSED[relation]} {first.definite}?", second.phrase, "position"),
    ]
    one = rng.choice(things)
    asked.append((f"where {one.be} {one.definite}?", _PLACES[one.position or ""], "position"))
    swapped = rng.random() < 0.5
    a, b = (second, first) if swapped else (first, second)
    asked.append((f"{a.be} {a.definite} {RELATIONS[relation]} {b.definite}?", _yes(not swapped), "yes_no"))
    return asked


def _presence(thing: Thing, absent: Concept, rng: random.Random) -> tuple[str, str, str]:
    """Whether something is there, "yes" and "no" alike often."""
    there = rng.random() < 0.5
    concept = thing.concept if there else absent
    be = "are" if concept.is_plural else "is"
    if there and thing.colour is not None:
        return (f"{be} there {thing.phrase}?", "yes", "yes_no")
    return (f"{be} there {concept.phrase}?", _yes(there), "yes_no")


def _yes(true: bool) -> str:
    return "yes" if true else "no"

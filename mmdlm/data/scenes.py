"""The picture world: scenes composed of drawings on the fly, true by construction, and what is held out of them.

A scene is a pure function of the world's settings and a seed. All places and sizes are whole cells of a sixteenth of
the picture's side (4 pixels at 64), so that a visual tokenizer with such cells sees an object the same way wherever
it stands.

Held out are a tenth of the compositions, by a hash of their key: of object x background (never white), object x
colour, object x count, and unordered pair x axis. A training scene contains no held-out composition at all; a
held-out scene is one whose own composition (its `key`) is held out. One style is never trained on either.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmdlm.data.captions import Thing, phrasings, questions
from mmdlm.data.colours import BACKGROUNDS, PAINTS, MainColour, clashes, main_colour, recolour, takes_paint
from mmdlm.data.concepts import Concept, common_concepts, load_concepts
from mmdlm.data.drawings import HELD_OUT_STYLE, Drawings
from mmdlm.errors import InputError

KIND_WEIGHTS = {"single": 0.3, "recoloured": 0.12, "small": 0.13, "count": 0.2, "pair": 0.25}
SPLITS = ("train", "held_out", "all")
WHITE_SHARE = {"single": 0.25}  # of the scenes of a kind; _WHITE_SHARE for the others
_WHITE_SHARE = 0.15
_HELD_OUT_ONE_IN = 10
_TRIES = 5000
_MOST_PAINTED = 4096  # recoloured drawings kept in memory: 55 MB at 64 pixels

# Sizes and places in cells of a sixteenth of the side: (left, top).
_LARGE, _PAIR, _SMALL = 12, 8, 6
_FACTS_SIDE = 48  # pixels, to judge the colours of a drawing
_CORNERS = {"top left": (1, 1), "top right": (9, 1), "bottom left": (1, 9), "bottom right": (9, 9), "centre": (5, 5)}
_COUNT_PLACES = {2: ((1, 5), (9, 5)), 3: ((5, 1), (1, 9), (9, 9)), 4: ((1, 1), (9, 1), (1, 9), (9, 9))}
_PAIR_PLACES = {"horizontal": ((0, 4), (8, 4)), "vertical": ((4, 0), (4, 8))}
_PAIR_POSITIONS = {"horizontal": ("left", "right"), "vertical": ("top", "bottom")}


@dataclass(frozen=True)
class Scene:
    """A picture and everything that is true about it."""

    image: np.ndarray  # uint8 [H, W, 3]
    caption: str  # canonical
    captions: list[str]  # canonical, canonical with the style, other phrasings
    questions: list[tuple[str, str, str]]  # question, answer, kind
    facts: dict[str, Any]  # kind, background, relation, objects: [{concept, style, colour, count, position, size}]
    key: str  # of its composition


@dataclass(frozen=True)
class _Sprite:
    """What the world remembers about a drawing."""

    main: MainColour
    clashes: frozenset[str]
    paints: tuple[str, ...]  # colours that it may be given


class PictureWorld:
    """Scenes of drawings: `scene(seed)`.

    Args:
        archive_dir: what `mmdlm data build pictures` wrote.
        concepts: how many of the commonest concepts; None for all.
        styles: which drawings.
        resolution: side of a scene in pixels, a multiple of 16.
        split: "train" (no held-out composition), "held_out" (only such), or "all".
        kind_weights: how often each kind of scene comes, instead of KIND_WEIGHTS; missing kinds never come.

    Raises:
        InputError: an unknown style, split or kind, a resolution that the archive does not carry, no archive, or the
            held-out style in training.
    """

    def __init__(
        self,
        archive_dir: str | Path,
        *,
        concepts: int | None = None,
        styles: Sequence[str],
        resolution: int = 64,
        split: str = "train",
        kind_weights: Mapping[str, float] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"There is no split {split!r}: the splits are {', '.join(SPLITS)}.")
        if not styles:
            raise InputError("No style was given: name at least one, for example noto.")
        if split == "train" and HELD_OUT_STYLE in styles:
            raise InputError(f"The style {HELD_OUT_STYLE} is held out of training: leave it out, or use another split.")
        self.kind_weights = _checked_weights(kind_weights)
        self.split, self.styles, self.resolution = split, tuple(styles), resolution
        self.drawings = Drawings(archive_dir, self.styles)
        largest = self.drawings.size * 16 // _LARGE
        if resolution % 16 or not 16 <= resolution <= largest:
            raise InputError(
                f"The resolution is {resolution}: give a multiple of 16 from 16 to {largest - largest % 16}."
            )
        self.cell = resolution // 16
        wanted = common_concepts(concepts)
        # A concept that one of the styles lacks is drawn in the others.
        self._styles_of = {c: tuple(s for s in self.styles if (s, c.sequence) in self.drawings) for c in wanted}
        self.concepts = tuple(concept for concept in wanted if self._styles_of[concept])
        if len(self.concepts) < 2:
            raise InputError(
                f"{archive_dir} draws {len(self.concepts)} of the concepts asked for: at least 2 are needed."
            )
        self._names = {concept.name for concept in load_concepts()}
        self._sprites: dict[tuple[str, Concept], _Sprite] = {}
        self._layers: dict[tuple[str, Concept, int], tuple[np.ndarray, np.ndarray]] = {}
        self._painted: dict[tuple[str, Concept, str], tuple[np.ndarray, np.ndarray]] = {}

    def preload(self) -> None:
        """Read every drawing now instead of at its first use, for example before worker processes are forked."""
        for concept in self.concepts:
            for style in self._styles_of[concept]:
                self._sprite(style, concept)
                for cells in (_LARGE, _PAIR, _SMALL):
                    self._layer(style, concept, cells)

    def scene(self, seed: int, kind: str | None = None) -> Scene:
        """The scene with this seed, of this kind or of one drawn by the weights.

        Raises:
            InputError: an unknown kind, or a negative seed.
        """
        if kind is not None and kind not in KIND_WEIGHTS:
            raise InputError(f"There is no kind of scene {kind!r}: the kinds are {', '.join(KIND_WEIGHTS)}.")
        if seed < 0:
            raise InputError(f"The seed is {seed}: give one from 0 on.")
        rng = random.Random(seed)
        chosen = kind or rng.choices(tuple(self.kind_weights), tuple(self.kind_weights.values()))[0]
        for _ in range(_TRIES):
            plan = self._plan(chosen, rng)
            if plan is not None:
                return self._compose(chosen, plan, rng)
        raise InputError(
            f"No scene of kind {chosen} was found in {_TRIES} tries: "
            "the world has too few concepts for it; take more concepts or styles, or give it no weight."
        )

    # ------------------------------------------------------------------------------------------------ the plan

    def _plan(self, kind: str, rng: random.Random) -> _Plan | None:
        """One attempt at a scene; None where it is not allowed."""
        concepts = rng.sample(self.concepts, 2) if kind == "pair" else [rng.choice(self.concepts)]
        common = [s for s in self._styles_of[concepts[0]] if s in self._styles_of[concepts[-1]]]
        if not common:
            return None
        style = rng.choice(common)
        background = self._background(kind, rng)
        colour = relation = position = size = None
        count = 1
        if kind == "recoloured":
            paints = self._sprite(style, concepts[0]).paints
            if not paints or (colour := rng.choice(paints)) == background:
                return None
        elif kind == "count":
            count = rng.randint(2, 4)
            if not concepts[0].plural:
                return None
        elif kind == "pair":
            relation = rng.choice(("horizontal", "vertical"))
            if related(*concepts):
                return None
        if kind == "small":
            size, position = "small", rng.choice(tuple(_CORNERS))
        elif kind in ("single", "recoloured"):
            size, position = "large", "centre"
        places = _PAIR_POSITIONS[relation] if relation else (position,)
        things = tuple(
            Thing(concept, style, colour, count, place, size) for concept, place in zip(concepts, places, strict=True)
        )
        keys = composition_keys(things, background, relation)
        told_alike = colour_keys(concepts[0].noun, colour) if colour else []
        if self.split == "train" and any(map(is_held_out, [*keys, *told_alike])):
            return None
        if self.split == "held_out" and not all(map(is_held_out, [keys[0], *told_alike])):
            return None
        if background != "white" and colour is None and self._clash(style, concepts, background):
            return None
        return _Plan(things, background, relation, keys[0])

    def _clash(self, style: str, concepts: Sequence[Concept], background: str) -> bool:
        return any(background in self._sprite(style, concept).clashes for concept in concepts)

    def _background(self, kind: str, rng: random.Random) -> str:
        if rng.random() < WHITE_SHARE.get(kind, _WHITE_SHARE):
            return "white"
        return rng.choice(_COLOURED)

    def _absent(self, things: tuple[Thing, ...], rng: random.Random) -> Concept | None:
        """A concept that is surely not in the scene, or None where so small a world has none."""
        for _ in range(100):
            concept = rng.choice(self.concepts)
            if not any(_may_contain(concept, thing.concept) for thing in things):
                return concept
        return None

    # ------------------------------------------------------------------------------------------------ the picture

    def _compose(self, kind: str, plan: _Plan, rng: random.Random) -> Scene:
        things, background, relation = plan.things, plan.background, plan.relation
        image = np.empty((self.resolution, self.resolution, 3), np.uint8)
        image[:] = BACKGROUNDS[background]
        if relation:
            placed = [(thing, _PAIR, place) for thing, place in zip(things, _PAIR_PLACES[relation], strict=True)]
        elif kind == "count":
            placed = [(things[0], _SMALL, place) for place in _COUNT_PLACES[things[0].count]]
        elif kind == "small":
            placed = [(things[0], _SMALL, _CORNERS[things[0].position or ""])]
        else:
            placed = [(things[0], _LARGE, (2, 2))]
        for thing, cells, (left, top) in placed:
            if thing.colour is not None:
                over = self._paint(thing.style, thing.concept, thing.colour)
            else:
                over = self._layer(thing.style, thing.concept, cells)
            paste(image, over, left * self.cell, top * self.cell)
        captions = phrasings(things, background, relation, rng)
        facts = {
            "kind": kind,
            "background": background,
            "relation": relation,
            "objects": [thing.facts() for thing in things],
        }
        asked = questions(things, background, relation, self._absent(things, rng), rng)
        return Scene(image, captions[0], captions, asked, facts, plan.key)

    def _sprite(self, style: str, concept: Concept) -> _Sprite:
        if (found := self._sprites.get((style, concept))) is not None:
            return found
        # At one size whatever the resolution, so that what is drawn does not depend on it.
        picture = self.drawings.picture(style, concept.sequence)
        rgba = np.asarray(picture.resize((_FACTS_SIDE, _FACTS_SIDE), Image.Resampling.LANCZOS))
        main = main_colour(rgba)
        paints: tuple[str, ...] = ()
        if concept.recolourable and main.share >= 0.5:
            paints = tuple(
                name
                for name in PAINTS
                # neither its own colour, nor another concept ("a green apple"), nor one that it would not show
                if name != main.name
                and not concept.name.startswith(f"{name} ")
                and f"{name} {concept.noun}" not in self._names
                and takes_paint(rgba[::2, ::2], main, name)
            )
        sprite = self._sprites[style, concept] = _Sprite(main, clashes(rgba), paints)
        return sprite

    def _layer(self, style: str, concept: Concept, cells: int) -> tuple[np.ndarray, np.ndarray]:
        key = (style, concept, cells)
        if (found := self._layers.get(key)) is None:
            found = self._layers[key] = layer(self.drawings.picture(style, concept.sequence), cells * self.cell)
        return found

    def _paint(self, style: str, concept: Concept, colour: str) -> tuple[np.ndarray, np.ndarray]:
        key = (style, concept, colour)
        if (found := self._painted.get(key)) is not None:
            return found
        side = _LARGE * self.cell
        picture = self.drawings.picture(style, concept.sequence).resize((side, side), Image.Resampling.LANCZOS)
        painted = recolour(np.asarray(picture), self._sprite(style, concept).main, PAINTS[colour])
        if len(self._painted) >= _MOST_PAINTED:
            self._painted.pop(next(iter(self._painted)))
        made = self._painted[key] = layer(Image.fromarray(painted), side)
        return made


@dataclass(frozen=True)
class _Plan:
    things: tuple[Thing, ...]
    background: str
    relation: str | None
    key: str


_COLOURED = tuple(name for name in BACKGROUNDS if name != "white")


def composition_keys(things: Sequence[Thing], background: str, relation: str | None) -> list[str]:
    """The keys of all compositions in a scene; the first is the scene's own."""
    names = sorted(thing.concept.name for thing in things)
    keys = []
    if relation is not None:
        keys.append(f"pair|{names[0]}|{names[1]}|{relation}")
    for thing in things:
        if thing.colour is not None:
            keys.append(f"colour|{thing.concept.name}|{thing.colour}")
        if thing.count > 1:
            keys.append(f"count|{thing.concept.name}|{thing.count}")
    return [*keys, *(f"background|{name}|{background}" for name in names)]


@cache
def colour_keys(noun: str, colour: str) -> list[str]:
    """The keys of all things that are called `noun` once painted: a red and a green apple are "a purple apple"."""
    return [f"colour|{one.name}|{colour}" for one in load_concepts() if one.recolourable and one.noun == noun]


@lru_cache(maxsize=1 << 18)
def is_held_out(key: str) -> bool:
    """Whether a composition is held out of training: a tenth of them is, whatever the world's settings.

    A white background is none: every object has been seen on white.
    """
    if key.startswith("background|") and key.endswith("|white"):
        return False
    return int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") % _HELD_OUT_ONE_IN == 0


def layer(picture: Image.Image, side: int) -> tuple[np.ndarray, np.ndarray]:
    """An RGBA picture at `side` pixels for `paste`: premultiplied colour and transparency, uint16 [side, side, *].

    It is made smaller with premultiplied alpha, so that no colour of invisible pixels bleeds into the edge.
    """
    small = picture.convert("RGBa")
    if small.size != (side, side):
        small = small.resize((side, side), Image.Resampling.LANCZOS)
    values = np.asarray(small, dtype=np.uint16)
    alpha = values[..., 3:]
    # the filter overshoots a little: colour must not exceed what its alpha allows
    return np.minimum(values[..., :3], alpha), 255 - alpha


def paste(image: np.ndarray, over: tuple[np.ndarray, np.ndarray], left: int, top: int) -> None:
    """Lay a layer over `image` (uint8 [H, W, 3]) in place: colour + transparency * image / 255, rounded."""
    colour, transparency = over
    height, width = colour.shape[:2]
    below = image[top : top + height, left : left + width]
    below[:] = colour + (transparency * below + 127) // 255


def related(first: Concept, second: Concept) -> bool:
    """Whether two concepts could be taken for each other by their words: "cat" and "black cat", "sun" and "sunset"."""
    return any(a.startswith(b) or b.startswith(a) for a in _words(first) for b in _words(second))


@cache
def _words(concept: Concept) -> tuple[str, ...]:
    """The telling words of a concept's names; colours and small words are not."""
    found = re.findall(r"[a-zñ]+", " ".join((concept.name, *concept.aliases)).lower())
    return tuple({word for word in found if len(word) > 2 and word not in BACKGROUNDS and word not in _SMALL_WORDS})


_SMALL_WORDS = {"the", "and", "with", "its", "pair", "cup", "glass", "bottle", "bowl", "plate", "pot", "piece", "old"}


def _may_contain(absent: Concept, present: Concept) -> bool:
    """Whether a drawing of `present` may show what `absent` names, so that "is there ...?" has no sure answer "no".

    A parrot is a bird, people wear clothes, a landscape has trees, and "sunglasses" are glasses.
    """
    families = {_family(absent), _family(present)}
    if len(families) == 1 or families == {"people", "clothing"}:
        return True
    words = [(a, b) for a in _words(absent) for b in _words(present)]
    return related(absent, present) or any((len(a) > 3 and a in b) or (len(b) > 3 and b in a) for a, b in words)


def _family(concept: Concept) -> str:
    if concept.group in ("people-body", "smileys-emotion"):
        return "people"
    return "scenery" if concept.subgroup in _SCENERY else concept.subgroup


_SCENERY = {
    "place-geographic", "place-building", "place-religious", "place-other", "place-map",
    "plant-flower", "plant-other", "sky-weather", "event",
}  # fmt: skip


def _checked_weights(weights: Mapping[str, float] | None) -> dict[str, float]:
    if weights is None:
        return dict(KIND_WEIGHTS)
    unknown = sorted(set(weights) - set(KIND_WEIGHTS))
    if unknown:
        raise InputError(f"There is no kind of scene {unknown[0]!r}: the kinds are {', '.join(KIND_WEIGHTS)}.")
    if any(weight < 0 for weight in weights.values()) or not sum(weights.values()) > 0:
        raise InputError(f"The weights of the kinds are {dict(weights)}: give none below zero and at least one above.")
    return {kind: weight for kind, weight in weights.items() if weight > 0}

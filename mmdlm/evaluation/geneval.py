"""GenEval's six classes of prompts (arXiv:2310.11513) in the picture world, where no detector is needed for the truth.

GenEval asks of a drawing only what its class is about: whether the object is there, or both, so many, in this colour,
in these places, or each in its own colour. Here the prompts are canonical captions of the world's scenes, and the judge
(`mmdlm.evaluation.judge`) takes the detector's place. What differs from GenEval's prompts: two objects always stand
beside or above each other, since the world's captions have no "a cat and a dog"; and color_attribution is a painted
object on a background of another colour, where each colour has to land on its own thing, since the world paints no two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mmdlm.data.concepts import Concept
from mmdlm.data.scenes import PictureWorld, Scene
from mmdlm.errors import InputError
from mmdlm.evaluation.scene_facts import Facts, facts_right

# Class -> the kind of scene it is about, and the facts that make a drawing right.
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "single_object": ("single", ("object",)),
    "two_object": ("pair", ("object",)),
    "counting": ("count", ("object", "count")),
    "colors": ("recoloured", ("object", "colour")),
    "position": ("pair", ("object", "position")),
    "color_attribution": ("recoloured", ("object", "colour", "background")),
}
_STEP = 1_000_000  # seeds between classes: more than any class takes
_TRIES = 10_000


def class_scenes(
    world: PictureWorld, name: str, count: int, *, first: int, keep: Callable[[Scene], bool] = lambda scene: True
) -> list[Scene]:
    """`count` scenes of a class, from the seed `first` on, those for which `keep` holds; the same every time.

    colors has a white background, color_attribution a coloured one. Raises InputError where the world has too few.
    """
    kind, _ = CLASSES[name]
    seeds = itertools.count(first + list(CLASSES).index(name) * _STEP)
    scenes = (world.scene(seed, kind) for seed in itertools.islice(seeds, _TRIES + 100 * count))
    found = list(itertools.islice((scene for scene in scenes if _fits(name, scene) and keep(scene)), count))
    if len(found) < count:
        raise InputError(
            f"The world has {len(found)} scenes of the class {name}, expected {count}: take more concepts or styles."
        )
    return found


def class_right(name: str, true: Facts, seen: Facts, concepts: Sequence[Concept]) -> bool:
    """Whether what the judge has seen is right in all that the class asks for."""
    right = facts_right(true, seen, concepts)
    return all(right[fact] for fact in CLASSES[name][1])


def _fits(name: str, scene: Scene) -> bool:
    white = scene.facts["background"] == "white"
    return {"colors": white, "color_attribution": not white}.get(name, True)

"""The concepts of the picture world: what may be drawn, how it is called, and which of them are common.

The table beside this file, `concepts.jsonl`, has one line for each concept, the commonest first. The names are
everyday noun phrases ("car", not "automobile"), written by hand over Unicode's CLDR names; the order follows how
often the words are used, corrected by hand so that concrete things come first. A concept is one emoji sequence; left
out are flags, skin tones, clock faces, keycaps, families, and most symbols.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mmdlm.errors import InputError

TABLE = Path(__file__).with_name("concepts.jsonl")


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn, and the words for it."""

    sequence: str  # Unicode code points in hex, joined by "-"
    name: str  # canonical, singular, unique: "red apple"
    article: str  # "a", "an", "the", or "" ("scissors")
    plural: str  # "red apples"; "" where counting makes no sense
    noun: str  # the name without its colour, for a recoloured one: "apple"
    aliases: tuple[str, ...]  # other everyday names
    group: str  # of CLDR: "food-drink"
    subgroup: str  # of CLDR: "food-fruit"
    slug: str  # of the CLDR label, as some packages name their files
    recolourable: bool  # may be shown in another colour than its own

    @property
    def phrase(self) -> str:
        """The name with its article: "a red apple", "scissors"."""
        return with_article(self.name, self.article)

    @property
    def is_plural(self) -> bool:
        """Whether the name itself takes "are": "scissors", "grapes"."""
        head = re.split(" (?:of|in|with|up) ", self.name)[0]
        return not self.article and head.endswith("s") and self.plural != f"{self.name}es"  # but "Santa Claus"


def with_article(name: str, article: str) -> str:
    """`article name`, or only the name where there is no article."""
    return f"{article} {name}" if article else name


def article_before(words: str, article: str) -> str:
    """The article that stands before `words` when the noun's own is `article`: "an" and "a" change with an adjective.

    "the" and "" stay as they are.
    """
    if article not in ("a", "an"):
        return article
    lower = words.lower()
    vowel = (lower[0] in "aeiou" and not lower.startswith(_SOUND_A)) or lower.startswith(_SOUND_AN)
    return "an" if vowel else "a"


_SOUND_A = ("uni", "euro", "ufo", "use", "one-")  # written with a vowel, spoken with a consonant
_SOUND_AN = ("hour", "x-ray", "suv")  # and the other way round


@cache
def load_concepts(path: Path = TABLE) -> tuple[Concept, ...]:
    """All concepts, the commonest first."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(Concept(**{**row, "aliases": tuple(row["aliases"])}) for row in rows)


def unlike_cldr(package: Path) -> list[str]:
    """The names of concepts whose group or subgroup is not Unicode's, as the npm package emojibase-data has them.

    package: the unpacked package, with en/data.json and meta/groups.json. Raises InputError where it is broken.
    """
    try:
        rows = json.loads((package / "en" / "data.json").read_text(encoding="utf-8"))
        titles = json.loads((package / "meta" / "groups.json").read_text(encoding="utf-8"))
        groups, subgroups = titles["groups"], titles["subgroups"]
        known = {row["hexcode"].replace("-FE0F", ""): (row.get("group"), row.get("subgroup")) for row in rows}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"The names in {package} can not be read ({error}): delete that folder and fetch it again."
        ) from error
    found = {name: (groups.get(str(group)), subgroups.get(str(part))) for name, (group, part) in known.items()}
    return [one.name for one in load_concepts()
            if found.get(one.sequence.replace("-FE0F", "")) != (one.group, one.subgroup)]  # fmt: skip


def common_concepts(count: int | None) -> tuple[Concept, ...]:
    """The `count` commonest concepts, or all of them for None.

    Raises:
        InputError: `count` is not between 1 and the number of concepts.
    """
    concepts = load_concepts()
    if count is None:
        return concepts
    if not 1 <= count <= len(concepts):
        raise InputError(
            f"There are {len(concepts)} concepts and concepts={count} was asked for: "
            f"give a number from 1 to {len(concepts)}."
        )
    return concepts[:count]

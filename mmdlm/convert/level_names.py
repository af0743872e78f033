"""What the published level-by-level tokenizers share in their names: rules from our names to theirs.

Our names are those of `mmdlm.models.levels`. The decoder's levels are stored finest first in the published files and
run from the last to the first; ours are stored in the order they run in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmdlm.convert.key_map import Piece, Shapes
from mmdlm.errors import InputError

Rules = Sequence[tuple[str, str]]  # a pattern in our name -> what stands there in theirs

COMMON: Rules = (
    (r"^(\w+)\.stem\.", r"\1.conv_in."),
    (r"^(\w+)\.norm\.", r"\1.norm_out."),
    (r"^(\w+)\.out\.", r"\1.conv_out."),
    (r"^encoder\.levels\.(\d+)\.", r"encoder.down.\1.block."),
    (r"^decoder\.levels\.(\d+)\.", r"decoder.up.\1.block."),
    (r"\.skip\.", ".nin_shortcut."),
)


def source_name(name: str, shapes: Shapes, rules: Rules) -> str:
    """The published name of our tensor `name`."""
    last = max(int(key.split(".")[2]) for key in shapes if key.startswith("decoder.levels."))
    name = re.sub(r"^decoder\.(levels|ups|modulations)\.(\d+)", lambda at: f"decoder.{at[1]}.{last - int(at[2])}", name)
    for pattern, theirs in rules:
        name = re.sub(pattern, theirs, name)
    return name


def level_pieces(shapes: Shapes, rules: Rules) -> list[Piece]:
    """Every tensor of ours as a whole published one; `shapes` are those of our tensors."""
    return [Piece(source_name(name, shapes, rules), shape, name) for name, shape in shapes.items()]


def widths(base: int, multipliers: Sequence[int]) -> tuple[int, ...]:
    """Channels of every level, finest first."""
    return tuple(base * multiplier for multiplier in multipliers)


def only(settings: dict[str, Any], where: str, **allowed: Any) -> None:
    """InputError when `settings` has another value than the one of `allowed`; an absent key is fine."""
    for key, value in allowed.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"{where} has {key} {settings[key]!r}, expected {value!r}: no published tokenizer has another, and "
                "none can be run here."
            )


def whole_number(settings: dict[str, Any], key: str, where: str) -> int:
    """The positive whole number that `settings` has under `key`. InputError where it is missing or none."""
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{where} has {key} {value!r}, expected a positive whole number: copy the config.json again.")
    return value


def whole_numbers(settings: dict[str, Any], key: str, where: str) -> tuple[int, ...]:
    """The list of positive whole numbers that `settings` has under `key`. InputError where it is missing or none."""
    values = settings.get(key)
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, int) and v > 0 for v in values):
        raise InputError(
            f"{where} has {key} {values!r}, expected a list of positive whole numbers: copy the config.json again."
        )
    return tuple(values)

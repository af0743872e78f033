"""How sure a share is: Wilson's score interval, and a share as it is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Z95 = 1.959963984540054  # the normal distribution's 97.5 % point


def wilson(right: int, total: int, *, z: float = Z95) -> tuple[float, float]:
    """The interval in which the true share lies, (low, high), when `right` of `total` were right.

    Wilson's score interval (JASA 22, 1927); unlike the normal one it stays within [0, 1] and is of use at 0 % and
    100 %. Nothing counted means nothing known: (0, 1). Raises ValueError unless 0 <= right <= total.
    """
    if not 0 <= right <= total:
        raise ValueError(f"{right} of {total} are right, expected from 0 to all: check the counting")
    if total == 0:
        return 0.0, 1.0
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    # At the ends the formula is exact but for the last bit: none right has the low end 0, all right the high end 1.
    return (centre - spread) / scale if right else 0.0, (centre + spread) / scale if right < total else 1.0


def share(right: int, total: int) -> dict[str, Any]:
    """The count as a row of a results file: right, total, share (None for nothing counted), low and high."""
    low, high = wilson(right, total)
    return {
        "right": right,
        "total": total,
        "share": round(right / total, 4) if total else None,
        "low": round(low, 4),
        "high": round(high, 4),
    }


def mean_of_shares(counted: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of several rows of `share`, each weighing alike whatever its total: share, low, high, groups.

    Its 95 % interval is put together from the shares' own Wilson intervals as if they were independent (MOVER, Zou and
    Donner, Statistics in Medicine 27, 2008, eq. 5): no normal distribution is taken for a share near 0 or 1. None and
    (0, 1) where one of them counts nothing.
    """
    if not counted or any(not one["total"] for one in counted):
        return {"share": None, "low": 0.0, "high": 1.0, "groups": len(counted)}
    shares = [one["right"] / one["total"] for one in counted]
    ends = [wilson(one["right"], one["total"]) for one in counted]
    mean = sum(shares) / len(shares)
    below = math.sqrt(sum((share - low) ** 2 for share, (low, _) in zip(shares, ends, strict=True))) / len(shares)
    above = math.sqrt(sum((high - share) ** 2 for share, (_, high) in zip(shares, ends, strict=True))) / len(shares)
    return {
        "share": round(mean, 4),
        "low": round(max(mean - below, 0.0), 4),
        "high": round(min(mean + above, 1.0), 4),
        "groups": len(counted),
    }


def percent(counted: Mapping[str, Any]) -> str:
    """A row of `share` in words: "93.3 % (89.9 to 95.6)"; a dash where nothing was counted."""
    if counted["share"] is None:
        return "–"
    return f"{100 * counted['share']:.1f} % ({100 * counted['low']:.1f} to {100 * counted['high']:.1f})"

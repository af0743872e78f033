"""Named colours: of backgrounds, of drawings, and recolouring a drawing.

A colour has the name that people would give it. Shapes: N pixels; colours are RGB in [0, 1] unless they are uint8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Muted, so that drawings in full colours stand out, and far apart from each other.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "red": (221, 84, 82),
    "orange": (247, 165, 84),
    "yellow": (250, 224, 106),
    "green": (118, 194, 122),
    "blue": (108, 162, 232),
    "purple": (162, 122, 206),
    "pink": (250, 184, 208),
    "brown": (148, 106, 76),
    "gray": (160, 163, 168),
    "black": (36, 36, 42),
}


class Paint(NamedTuple):
    """Mean hue (degrees), saturation and value that the main part of a recoloured drawing gets."""

    hue: float
    saturation: float
    value: float


PAINTS: dict[str, Paint] = {
    "red": Paint(2, 0.82, 0.86),
    "orange": Paint(28, 0.88, 0.97),
    "yellow": Paint(50, 0.80, 0.98),
    "green": Paint(128, 0.66, 0.66),
    "blue": Paint(214, 0.78, 0.86),
    "purple": Paint(276, 0.62, 0.72),
    "pink": Paint(334, 0.42, 0.98),
}
_WINDOW = 30.0  # degrees on both sides of the main hue that belong to it


class MainColour(NamedTuple):
    """The main colour of a drawing: of the hue that most of its saturated pixels have."""

    hue: float
    saturation: float
    value: float
    share: float  # of all visible pixels that have this hue
    name: str | None  # the name that most visible pixels have, None where no name has two fifths of them


def main_colour(rgba: np.ndarray) -> MainColour:
    """The main colour of a drawing (uint8 [H, W, 4])."""
    visible = rgba[rgba[..., 3] > 127][:, :3].astype(np.float32) / 255
    if not len(visible):
        return MainColour(0.0, 0.0, 0.0, 0.0, None)
    hsv = _hsv(visible)
    hue, saturation, value = hsv.T
    coloured = (saturation > 0.3) & (value > 0.25)
    histogram = np.bincount((hue[coloured] // 10).astype(int), minlength=36).astype(np.float32)
    peak = int(np.argmax(sum(np.roll(histogram, shift) for shift in (-2, -1, 0, 1, 2)))) * 10 + 5.0
    main = coloured & (np.abs(_turn(hue - peak)) <= _WINDOW)
    names, counts = np.unique(_names(hsv), return_counts=True)
    name = str(names[np.argmax(counts)]) if counts.max() >= 0.4 * len(visible) else None
    if not main.any():
        return MainColour(0.0, 0.0, 0.0, 0.0, name)
    centre = float((peak + _turn(hue[main] - peak).mean()) % 360)
    return MainColour(centre, float(saturation[main].mean()), float(value[main].mean()), float(main.mean()), name)


def recolour(rgba: np.ndarray, main: MainColour, paint: Paint) -> np.ndarray:
    """The drawing (uint8 [H, W, 4]) with the parts that have its main hue painted; grays and other hues stay.

    Shades stay as they are against their mean: only the mean becomes the paint.
    """
    rgb = rgba[..., :3].reshape(-1, 3).astype(np.float32) / 255
    hue, saturation, value = _hsv(rgb).T
    turned = _turn(hue - main.hue)
    # Smooth edges of the selection: a hard threshold leaves speckles along outlines.
    weight = _ramp(saturation, 0.12, 0.35) * _ramp(value, 0.15, 0.35) * _ramp(-np.abs(turned), -_WINDOW - 15, -_WINDOW)
    painted = _rgb(
        (paint.hue + 0.3 * turned) % 360,
        np.clip(paint.saturation + 0.8 * (saturation - main.saturation), 0, 1),
        np.clip(paint.value + (value - main.value), 0, 1),
    )
    mixed = rgb + weight[:, None] * (painted - rgb)
    out = rgba.copy()
    out[..., :3] = np.rint(mixed * 255).astype(np.uint8).reshape(*rgba.shape[:2], 3)
    return out


def takes_paint(rgba: np.ndarray, main: MainColour, name: str) -> bool:
    """Whether the drawing (uint8 [H, W, 4]) painted `name` has that colour more than any other."""
    painted = recolour(rgba, main, PAINTS[name])
    names = _names(_hsv(painted[painted[..., 3] > 127][:, :3].astype(np.float32) / 255))
    found, counts = np.unique(names, return_counts=True)
    return len(found) > 0 and bool(found[np.argmax(counts)] == name)


def clashes(rgba: np.ndarray) -> frozenset[str]:
    """The backgrounds on which a drawing (uint8 [H, W, 4]) can not be made out well.

    A background clashes where a third of the drawing, or most of its edge, looks the same (less than 24 apart in Lab).
    """
    alpha = rgba[..., 3]
    solid = np.pad(alpha > 127, 1)
    inside = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
    visible = alpha > 127
    if not visible.any():
        return frozenset(BACKGROUNDS)
    lab = _lab(rgba[visible][:, :3].astype(np.float32) / 255)
    edge = ~inside[visible]
    found = set()
    for name, rgb in BACKGROUNDS.items():
        near = np.linalg.norm(lab - _lab(np.array([rgb], np.float32) / 255), axis=1) < 24
        if near.mean() > 0.33 or near[edge].mean() > 0.6:
            found.add(name)
    return frozenset(found)


def _names(hsv: np.ndarray) -> np.ndarray:
    """The colour name of each pixel: [N, 3] hue, saturation, value -> [N] of str."""
    hue, saturation, value = hsv.T
    dark, pale = value < 0.22, saturation < 0.16
    red, orange = (hue < 14) | (hue >= 345), (hue >= 14) & (hue < 42)
    conditions = [
        (dark, "black"),
        (pale & (value > 0.87), "white"),
        (pale & (value < 0.3), "black"),
        (pale, "gray"),
        (red & (saturation < 0.5) & (value > 0.8), "pink"),
        (red, "red"),
        (orange & (value < 0.72), "brown"),
        (orange, "orange"),
        ((hue >= 42) & (hue < 68), "yellow"),
        ((hue >= 68) & (hue < 168), "green"),
        ((hue >= 168) & (hue < 255), "blue"),
        ((hue >= 255) & (hue < 298), "purple"),
    ]
    return np.select([mask for mask, _ in conditions], [name for _, name in conditions], "pink")


def _turn(degrees: np.ndarray) -> np.ndarray:
    """Angles in [-180, 180)."""
    return (degrees + 180) % 360 - 180


def _ramp(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _hsv(rgb: np.ndarray) -> np.ndarray:
    """[N, 3] RGB in [0, 1] -> hue in degrees, saturation, value."""
    red, green, blue = rgb.T
    high, low = rgb.max(1), rgb.min(1)
    spread = high - low
    safe = np.where(spread > 0, spread, 1)
    hue = np.select(
        [high == red, high == green],
        [(green - blue) / safe % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hue = np.where(spread > 0, hue * 60, 0) % 360
    return np.stack([hue, spread / np.where(high > 0, high, 1), high], axis=1)


def _rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Hue in degrees, saturation, value -> [N, 3] RGB in [0, 1]."""
    wheel = (np.array([5, 3, 1], np.float32) + hue[:, None] / 60) % 6
    part = np.clip(np.minimum(wheel, 4 - wheel), 0, 1)
    return value[:, None] * (1 - saturation[:, None] * part)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """[N, 3] sRGB in [0, 1] -> CIE Lab (D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float32)
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089], np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)

"""Colours: exact conversions, names, and recolouring that touches what it should."""

from __future__ import annotations

import colorsys
from itertools import combinations

import numpy as np
import pytest

from mmdlm.data.colours import BACKGROUNDS, PAINTS, _hsv, _names, _rgb, clashes, main_colour, recolour, takes_paint


def filled(*colours: tuple[int, int, int, int]) -> np.ndarray:
    """A picture of equal stripes: uint8 [24, 24, 4]."""
    rows = np.array(colours, np.uint8).repeat(24 // len(colours), axis=0)
    return rows[:, None].repeat(24, axis=1)


def test_hsv_is_the_standard_librarys_and_comes_back():
    rgb = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    rgb[:3] = [[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]
    expected = np.array([colorsys.rgb_to_hsv(*map(float, pixel)) for pixel in rgb]) * [360, 1, 1]
    hsv = _hsv(rgb)
    np.testing.assert_allclose(hsv, expected, atol=1e-3)
    np.testing.assert_allclose(_rgb(*hsv.T), rgb, atol=1e-5)


def test_backgrounds_are_apart_and_deserve_their_names():
    for (name, rgb), (other, other_rgb) in combinations(BACKGROUNDS.items(), 2):
        assert np.linalg.norm(np.subtract(rgb, other_rgb)) > 55, (name, other)
    for name, rgb in BACKGROUNDS.items():
        assert _names(_hsv(np.array([rgb], np.float32) / 255))[0] == name


@pytest.mark.parametrize("name", PAINTS)
def test_a_recoloured_thing_has_the_colour_and_its_other_parts_stay(name: str):
    red, gray, leaf = (200, 40, 40, 255), (130, 130, 130, 255), (40, 160, 50, 255)
    picture = filled(red, red, gray, leaf)
    main = main_colour(picture)
    assert main.name == "red"
    assert main.share == 0.5
    painted = recolour(picture, main, PAINTS[name])
    assert main_colour(painted[:12]).name == name
    np.testing.assert_array_equal(painted[12:], picture[12:])
    np.testing.assert_array_equal(painted[..., 3], picture[..., 3])


def test_an_orange_thing_has_no_gray_left_over_at_hue_wrap():
    crimson = filled((220, 20, 60, 255), (220, 30, 20, 255))  # hues on both sides of 0
    assert main_colour(crimson).share == 1.0


def test_clashes_are_the_backgrounds_that_hide_a_drawing():
    for name, rgb in BACKGROUNDS.items():
        assert name in clashes(filled((*rgb, 255)))
    assert "blue" not in clashes(filled((200, 40, 40, 255)))
    assert clashes(np.zeros((8, 8, 4), np.uint8)) == set(BACKGROUNDS)


def test_what_a_drawing_can_be_painted():
    red, gray = (200, 40, 40, 255), (130, 130, 130, 255)
    mostly_red = filled(red, red, gray)
    assert all(takes_paint(mostly_red, main_colour(mostly_red), name) for name in PAINTS)
    mostly_gray = filled(gray, gray, red)
    assert not any(takes_paint(mostly_gray, main_colour(mostly_gray), name) for name in PAINTS)
    assert not takes_paint(np.zeros((4, 4, 4), np.uint8), main_colour(mostly_red), "red")

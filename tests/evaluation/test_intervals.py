"""Wilson's interval against published values, and at its ends."""

from __future__ import annotations

import pytest

from mmdlm.evaluation.intervals import percent, share, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_published_values(right: int, total: int, low: float, high: float):
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


def test_ends_and_symmetry():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 7)[0] == 0.0 and wilson(7, 7)[1] == 1.0
    low, high = wilson(3, 10)
    assert wilson(7, 10) == pytest.approx((1 - high, 1 - low))
    for right, total in ((5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="check the counting"):
            wilson(right, total)


def test_as_printed():
    assert percent(share(81, 263)) == "30.8 % (25.5 to 36.6)"
    assert percent(share(0, 0)) == "–"

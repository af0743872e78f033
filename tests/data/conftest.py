"""A tiny picture world drawn by hand: the thirty commonest concepts as coloured shapes, in three styles."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmdlm.data.concepts import common_concepts
from mmdlm.data.drawings import tight, webp, write_archive

CONCEPTS = 30
STYLES = ("noto", "twemoji", "openmoji")
FILLS = ("#d62828", "#f08a24", "#f2c521", "#2e9e4a", "#2f6fd6", "#7d4bc4", "#7a4a25", "#222222")


def shape(number: int) -> Image.Image:
    """A drawing that no other number has: a shape, its fill, and a spot whose place tells them apart."""
    picture = Image.new("RGBA", (120, 120))
    draw = ImageDraw.Draw(picture)
    fill = FILLS[number % len(FILLS)]
    if number % 3 == 0:
        draw.ellipse((10, 10, 110, 110), fill=fill)
    elif number % 3 == 1:
        draw.rectangle((10, 25, 110, 95), fill=fill)
    else:
        draw.polygon([(60, 10), (110, 110), (10, 110)], fill=fill)
    x, y = 45 + 5 * (number % 6), 50 + 8 * (number % 5)
    draw.rectangle((x, y, x + 6, y + 6), fill="#888888")
    return picture


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pictures")
    for shift, style in enumerate(STYLES):
        pictures = {
            concept.sequence: webp(tight(shape(number + shift), 128))
            for number, concept in enumerate(common_concepts(CONCEPTS))
        }
        write_archive(directory, style, pictures, 128)
    return directory

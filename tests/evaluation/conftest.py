"""A tiny world: six concepts as plain shapes, in an archive of the real form."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mmdlm.data.concepts import common_concepts
from mmdlm.data.drawings import tight
from mmdlm.data.scenes import PictureWorld

Shape = Callable[[ImageDraw.ImageDraw], None]
SHAPES: list[Shape] = [
    lambda d: d.polygon([(50, 0), (100, 100), (0, 100)], fill="#e8862a"),
    lambda d: (d.rectangle((0, 0, 100, 100), fill="#8a5a34"), d.rectangle((30, 30, 70, 70), fill=(0, 0, 0, 0))),
    lambda d: d.ellipse((0, 0, 100, 100), fill="#cc2222"),
    lambda d: (d.rectangle((0, 30, 100, 60), fill="#2563c9"), d.ellipse((10, 50, 40, 80), fill="#111111")),
    lambda d: (d.rectangle((40, 0, 60, 100), fill="#2a9d3a"), d.rectangle((0, 30, 100, 50), fill="#2a9d3a")),
    lambda d: (d.rectangle((0, 0, 30, 100), fill="#7a2fb0"), d.rectangle((0, 70, 100, 100), fill="#7a2fb0")),
]


def write_archive(directory: Path, shapes: list[Shape], styles: tuple[str, ...] = ("noto",)) -> Path:
    directory.mkdir()
    for style in styles:
        with zipfile.ZipFile(directory / f"{style}.zip", "w") as archive:
            for concept, shape in zip(common_concepts(len(shapes)), shapes, strict=True):
                picture = Image.new("RGBA", (101, 101))
                shape(ImageDraw.Draw(picture))
                content = io.BytesIO()
                tight(picture, 64).save(content, "WEBP", lossless=True)
                archive.writestr(f"{concept.sequence}.webp", content.getvalue())
        facts = {"format": 1, "size": 64, "drawings": len(shapes)}
        (directory / f"{style}.json").write_text(json.dumps(facts), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive, in a style to train on and in the one that is held out."""
    return write_archive(tmp_path_factory.mktemp("shapes") / "archive", SHAPES, ("noto", "openmoji"))


@pytest.fixture(scope="session")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shapes under each other's names."""
    return write_archive(tmp_path_factory.mktemp("exchanged") / "archive", SHAPES[1:] + SHAPES[:1])


@pytest.fixture(scope="session")
def world(shapes: Path) -> PictureWorld:
    return PictureWorld(shapes, concepts=len(SHAPES), styles=["noto"], split="all")

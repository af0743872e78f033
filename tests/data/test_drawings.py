"""Rendering and the archive: exact cropping, no bleeding of invisible colour, lossless, repeatable, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.concepts import load_concepts
from mmdlm.data.drawings import STYLES, TRAINING_STYLES, Drawings, build_pictures, render, tight, webp, write_archive
from mmdlm.errors import InputError

APPLE = next(concept for concept in load_concepts() if concept.name == "red apple")
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # where Debian installs it


def test_tight_crops_to_what_is_visible_and_centres_it():
    picture = Image.new("RGBA", (100, 100), (0, 255, 0, 0))
    picture.paste((255, 0, 0, 255), (10, 40, 70, 70))  # 60 wide, 30 high
    pixels = np.asarray(tight(picture, 64))
    ys, xs = np.nonzero(pixels[..., 3])
    assert (xs.min(), xs.max()) == (2, 61)  # the margin is a 32nd on each side
    assert (ys.min(), ys.max()) == (17, 46)  # 30 rows, centred
    visible = pixels[pixels[..., 3] > 0]
    # the green of the invisible pixels around it has not bled into the edge
    assert (visible[:, :3] == (255, 0, 0)).all()


def test_an_empty_drawing_is_refused():
    with pytest.raises(ValueError, match="empty"):
        tight(Image.new("RGBA", (8, 8)), 8)


def test_the_archive_gives_back_every_visible_pixel(tmp_path: Path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    write_archive(tmp_path, "noto", {APPLE.sequence: webp(Image.fromarray(pixels))}, 16)
    drawings = Drawings(tmp_path, ["noto"])
    back = np.asarray(drawings.picture("noto", APPLE.sequence))
    np.testing.assert_array_equal(back[..., 3], pixels[..., 3])
    visible = pixels[..., 3] > 0
    np.testing.assert_array_equal(back[visible], pixels[visible])
    assert drawings.size == 16
    assert ("noto", APPLE.sequence) in drawings
    assert ("twemoji", APPLE.sequence) not in drawings


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path):
    content = {APPLE.sequence: webp(Image.new("RGBA", (16, 16), "red"))}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_archive(tmp_path / name, "noto", content, 16)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert set(one) == {"noto.zip", "noto.json"}


def svg(colour: str) -> str:
    shape = f'<circle cx="18" cy="18" r="9" fill="{colour}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 36 36">{shape}</svg>'


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Two packages with one drawing each, laid out as the real ones."""
    pytest.importorskip("resvg_py")
    source = tmp_path / "packages"
    for folder, name in (("twemoji-svg", "1f34e.svg"), ("openmoji/color/svg", "1F34E.svg")):
        (source / folder).mkdir(parents=True)
        (source / folder / name).write_text(svg("#ff0000"))
    return source


def test_build_renders_resumes_and_repeats(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert build_pictures(out, source=packages, styles=("twemoji", "openmoji"), size=32, jobs=1) == {
        "twemoji": 1,
        "openmoji": 1,
    }
    picture = np.asarray(Drawings(out, ["twemoji"]).picture("twemoji", APPLE.sequence))
    assert tuple(picture[16, 16]) == (255, 0, 0, 255)
    assert picture[16, 1, 3] > 128  # cropped: the circle fills the square but for the margin
    assert picture[0].max() == 0
    first = (out / "twemoji.zip").read_bytes()
    # What is complete is kept; what is missing or of another size is built again, to the same bytes.
    (packages / "twemoji-svg" / "1f34e.svg").write_text(svg("#0000ff"))
    build_pictures(out, source=packages, styles=("twemoji",), size=32, jobs=1)
    assert (out / "twemoji.zip").read_bytes() == first
    (packages / "twemoji-svg" / "1f34e.svg").write_text(svg("#ff0000"))
    (out / "twemoji.json").unlink()
    build_pictures(out, source=packages, styles=("twemoji",), size=32, jobs=1)
    assert (out / "twemoji.zip").read_bytes() == first
    build_pictures(out, source=packages, styles=("twemoji",), size=48, jobs=1)
    assert Drawings(out, ["twemoji"]).size == 48
    assert not list(out.glob("*.part"))
    titles = {"groups": {}, "subgroups": {}}
    for name, content in (("en/data.json", [{"hexcode": "1F34E"}]), ("meta/groups.json", titles)):
        (packages / "emojibase-data" / name).parent.mkdir(parents=True)
        (packages / "emojibase-data" / name).write_text(json.dumps(content))
    capsys.readouterr()
    build_pictures(out, source=packages, styles=("twemoji",), size=48, jobs=1)
    said = capsys.readouterr().out
    assert f"0 concepts  in the groups of npm emojibase-data   MIT; not {load_concepts()[0].name}, " in said


def test_a_finished_archive_travels_without_its_packages(
    packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    out, styles = tmp_path / "out", ("twemoji", "openmoji")
    build_pictures(out, source=packages, styles=styles, size=32, jobs=1)
    monkeypatch.setitem(sys.modules, "resvg_py", None)  # as where it is not installed
    capsys.readouterr()
    assert build_pictures(out, source=tmp_path / "nowhere", styles=styles, size=32) == {"twemoji": 1, "openmoji": 1}
    said = capsys.readouterr().out
    assert "1 drawings   npm @twemoji/svg 15.0.0   CC-BY-4.0, Copyright Twitter" in said and "CC-BY-SA-4.0" in said
    assert "2 drawings of 1179 concepts in " in said and said.endswith(" MB\n")
    with pytest.raises(InputError, match=r"resvg-py, which renders SVG drawings, is not installed: pip install"):
        build_pictures(out, source=packages, styles=styles, size=48)
    assert Drawings(out, styles).size == 32


@pytest.mark.skipif(not NOTO.is_file(), reason="needs Debian's fonts-noto-color-emoji")
def test_the_noto_font_draws_single_and_joined_sequences(tmp_path: Path):
    folder = tmp_path / "noto" / NOTO.parent.relative_to("/")
    folder.mkdir(parents=True)
    (folder / NOTO.name).symlink_to(NOTO)
    drawn = {concept.name: render(concept, "noto", tmp_path) for concept in load_concepts()[:300]}
    assert all(drawn.values())
    assert drawn["red apple"] != drawn["green apple"]
    assert drawn["black cat"] != drawn["cat"]


def test_styles_name_their_licence_and_one_is_held_out():
    assert all(style.licence and style.package for style in STYLES.values())
    assert "openmoji" not in TRAINING_STYLES
    assert len(TRAINING_STYLES) == 4


def test_bad_input_of_the_builder(tmp_path: Path):
    with pytest.raises(InputError, match=r"fetch the packages with `bash tools/fetch_pictures.sh"):
        build_pictures(tmp_path / "out", source=tmp_path)
    with pytest.raises(InputError, match="no style 'crayon'"):
        build_pictures(tmp_path / "out", source=tmp_path, styles=("crayon",))
    with pytest.raises(InputError, match="is 4 pixels"):
        build_pictures(tmp_path / "out", source=tmp_path, size=4)
    assert not (tmp_path / "out").exists()


def test_an_output_that_can_not_be_made(packages: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can not be made"):
        build_pictures(tmp_path / "file" / "out", source=packages, styles=("twemoji",))


FULL = """
import resource, sys
from pathlib import Path
from mmdlm.data.drawings import build_pictures
from mmdlm.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    build_pictures(sys.argv[1], source=sys.argv[2], styles=("twemoji",), size=64, jobs=1)
except InputError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_full_disk_leaves_nothing_half_written(packages: Path, tmp_path: Path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", FULL, str(out), str(packages)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert "refused: The drawings in the style twemoji can not be written" in done.stderr, done.stderr[-2000:]
    assert list(out.iterdir()) == []


def test_a_broken_drawing_is_named_and_a_broken_archive_built_again(packages: Path, tmp_path: Path):
    out, drawing = tmp_path / "out", packages / "twemoji-svg" / "1f34e.svg"
    drawing.write_text("<svg")
    with pytest.raises(InputError, match=r"1f34e.svg can not be rendered .* fetch it again"):
        build_pictures(out, source=packages, styles=("twemoji",), size=32, jobs=1)
    drawing.write_text(svg("#ff0000"))
    build_pictures(out, source=packages, styles=("twemoji",), size=32, jobs=1)
    about, whole = (out / "twemoji.json").read_text(), (out / "twemoji.zip").read_bytes()
    for broken in (about, "[]", '{"drawings": null}'):
        (out / "twemoji.json").write_text(broken)
        (out / "twemoji.zip").write_bytes(whole[:50])
        build_pictures(out, source=packages, styles=("twemoji",), size=32, jobs=1)
        assert (out / "twemoji.zip").read_bytes() == whole and (out / "twemoji.json").read_text() == about


def test_bad_archives(tmp_path: Path):
    with pytest.raises(InputError, match="mmdlm data build pictures"):
        Drawings(tmp_path, ["noto"])
    with pytest.raises(InputError, match="no style 'crayon'"):
        Drawings(tmp_path, ["crayon"])
    content = {APPLE.sequence: webp(Image.new("RGBA", (16, 16), "red"))}
    write_archive(tmp_path, "noto", content, 16)
    whole = (tmp_path / "noto.zip").read_bytes()
    (tmp_path / "noto.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"can not be read .* build it again"):
        Drawings(tmp_path, ["noto"])
    (tmp_path / "noto.zip").write_bytes(whole)
    facts = json.loads((tmp_path / "noto.json").read_text())
    (tmp_path / "noto.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(InputError, match="in format 99"):
        Drawings(tmp_path, ["noto"])
    (tmp_path / "noto.json").write_text("no json")
    with pytest.raises(InputError, match="can not be read"):
        Drawings(tmp_path, ["noto"])

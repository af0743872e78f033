"""`mmdlm data validate` over a folder with more than thirty kinds of broken rows: each is named, none is fatal, nothing
outside the folder is read, and the clean copy is clean."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.data.duplicates import difference_hash, near_pairs
from mmdlm.data.paired import open_pairs
from mmdlm.data.validation import validate, written

CANARY = "the canary outside"
runner = CliRunner()


def drawing(number: int, side: int = 48) -> Image.Image:
    """Smooth and unlike every other number's."""
    chance = np.random.default_rng(number)
    coarse = Image.fromarray(chance.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    picture = coarse.resize((side, side), Image.Resampling.BICUBIC)
    ImageDraw.Draw(picture).ellipse((8, 8, 20, 20), fill=tuple(int(c) for c in chance.integers(0, 256, 3)))
    return picture


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims so many pixels and holds none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class Broken:
    """A folder, its lines, and what the report has to say of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines, self.number = folder, [], 0
        self.expected: dict[str, str] = {}  # where -> a part of the reason

    def picture(self, name: str | None = None, content: bytes | None = None) -> str:
        self.number += 1
        name = name or f"good-{self.number}.png"
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(drawing(self.number)) if content is None else content)
        return name

    def line(self, content: bytes, reason: str | None = None) -> None:
        self.lines.append(content)
        if reason is not None:
            self.expected[f"metadata.jsonl:{len(self.lines)}"] = reason

    def row(self, reason: str | None = None, **columns: Any) -> None:
        self.line(json.dumps(columns).encode(), reason)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Broken:
    """Two good rows, and every kind of bad one."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "canary.png").write_bytes(encoded(drawing(999)))
    (outside / "words.txt").write_text(CANARY)
    made = Broken(tmp_path_factory.mktemp("broken"))
    for _ in range(2):
        made.row(file_name=made.picture(), text="a good one")
    _bad_pictures(made, outside)
    _bad_words(made)
    _bad_lines(made)
    _bad_companions(made)
    _kept(made)
    (made.folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(made.lines) + b"\n")
    made.expected["metadata.jsonl:1"] = "byte order mark"
    return made


def _bad_pictures(made: Broken, outside: Path) -> None:
    jpeg = encoded(drawing(500), "JPEG")
    made.row("there is no file 'nowhere.png'", file_name="nowhere.png", text="missing file")
    made.row("broken or cut short", file_name=made.picture("cut.jpg", jpeg[: len(jpeg) - 150]), text="truncated")
    made.row("is empty", file_name=made.picture("empty.png", b""), text="zero bytes")
    made.row("no picture that can be read", file_name=made.picture("words.png", b"hello"), text="a text file")
    bomb = made.picture("bomb.png", png_header(40_000, 40_000))
    made.row("more pixels than can be unpacked", file_name=bomb, text="a bomb")
    large = made.picture("large.png", png_header(10_000, 10_000))
    made.row("10000 x 10000 pixels", file_name=large, text="too large")
    frames = [drawing(600), drawing(601)]
    film = made.picture("film.gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    made.row("animated", file_name=film, text="animated GIF")
    made.row("1 x 1 pixels", file_name=made.picture("dot.png", encoded(drawing(1).resize((1, 1)))), text="a dot")
    made.row("leads outside", file_name=str(outside / "canary.png"), text="absolute path")
    made.row("leads outside", file_name=os.path.relpath(outside / "canary.png", made.folder), text="dots")
    made.row("leads outside", file_name="C:\\pictures\\a.png", text="a drive")
    made.row("is an address", file_name="https://example.com/a.png", text="an address")
    (made.folder / "linked.png").symlink_to(outside / "canary.png")
    made.row("symbolic link that leads outside", file_name="linked.png", text="link outside")
    (made.folder / "linked").symlink_to(outside, target_is_directory=True)
    made.row("symbolic link that leads outside", file_name="linked/canary.png", text="linked folder")
    (made.folder / "dangling.png").symlink_to(made.folder / "gone.png")
    made.row("leads nowhere", file_name="dangling.png", text="dangling link")
    (made.folder / "folder.png").mkdir()
    made.row("is a directory", file_name="folder.png", text="directory")
    os.mkfifo(made.folder / "pipe.png")
    made.row("pipe or a device", file_name="pipe.png", text="a pipe that would wait for ever")
    made.row("null byte", file_name="a\0.png", text="null byte in the name")
    made.row("expected the name of a picture", file_name=7, text="a number for a name")
    made.row("cannot be looked up|there is no file", file_name="x" * 5000 + ".png", text="a name too long")


def _bad_words(made: Broken) -> None:
    name = made.picture()
    made.line(b'{"file_name": "%s", "text": NaN}' % name.encode(), "text is NaN")
    for text, reason in (
        ("", "text is empty"), ("  \n ", "text is empty"), ("nan", "an empty cell"),
        ("word " * 2000, "10000 characters"), (7, "text is a number"), (True, "text is true or false"),
        ({"en": "x"}, "text is an object"), ("a\0b", "null byte"), ("a\x1b[2Jb", "control character U\\+001B"),
        ([], "empty list"), (["good", 3], "a number"), ("\ud800", "not valid UTF-8"),
    ):  # fmt: skip
        made.row(reason, file_name=name, text=text)
    made.row("there is no text", file_name=name)
    made.row("there is no file_name \\(the columns are: image_path, caption\\)", image_path=name, caption="other names")


def _bad_lines(made: Broken) -> None:
    name = made.picture()
    made.line(b'{"file_name": "%s", "text": "cut' % name.encode(), "no valid JSON")
    made.line(b'["%s", "a list"]' % name.encode(), "holds a list")
    made.line(b"", "the line is blank")
    made.line('{"file_name": "%s", "text": "café"}'.encode("latin-1") % name.encode(), "not UTF-8 \\(byte 0xe9")
    made.line(b"[" * 100_000, "no valid JSON")


def _bad_companions(made: Broken) -> None:
    name = made.picture()
    small = made.picture("small-mask.png", encoded(Image.new("L", (20, 20), 255)))
    made.row("mask has 20 x 20 pixels, expected 48 x 48", file_name=name, text="mask", mask_file_name=small)
    made.row("source_file_name: there is no file", file_name=name, text="edit", source_file_name="gone.png")
    made.row("source_file_name: '../x.png' leads outside", file_name=name, text="edit", source_file_name="../x.png")
    made.row("answers is text", file_name=name, question="how many?", answers="two")
    made.row("question is given without answers", file_name=name, question="how many?")
    made.row("answers without a question", file_name=name, answers=["two"])
    said = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    made.row("messages have no image", file_name=name, messages=[said])
    made.row("has no role", file_name=name, messages=[{"content": [{"type": "image"}]}])
    shown = {"role": "user", "content": [{"type": "image", "image": "/etc/hostname"}]}
    made.row("leads outside", file_name=name, messages=[shown])


def _kept(made: Broken) -> None:
    """Rows that stay, and of which something is said."""
    twice = made.picture()
    made.row(file_name=twice, text="once")
    made.row("more than one row", file_name=twice, text="twice, in other words")
    made.row("a second time with the same words", file_name=twice, text="once")
    copy = made.picture("copy.png", (made.folder / twice).read_bytes())
    made.row("is that of metadata.jsonl:\\d+ to the pixel, with other captions", file_name=copy, text="a copy")
    paler = drawing(made.number - 1).resize((96, 96), Image.Resampling.BICUBIC)
    made.row("looks like that of", file_name=made.picture("scaled.jpg", encoded(paler, "JPEG")), text="a scaled copy")
    made.row(file_name=made.picture("Case.png"), text="case")
    made.row("upper and lower case only", file_name=made.picture("case.png"), text="the other case")
    thin = made.picture("thin.png", encoded(drawing(700).resize((400, 10))))
    made.row("extreme shape of 400 x 10", file_name=thin, text="extreme aspect")


def test_every_broken_row_is_named_and_none_is_fatal(broken: Broken, tmp_path: Path):
    result = runner.invoke(app, ["data", "validate", str(broken.folder), "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    told: dict[str, list[str]] = {}
    saved = json.loads((tmp_path / "report.json").read_text())
    for problem in saved["problems"] + saved["notes"]:
        told.setdefault(problem["where"], []).append(problem["reason"])
    assert len(broken.expected) > 45
    for where, reason in broken.expected.items():
        assert any(re.search(reason, said) for said in told.get(where, [])), (where, reason, told.get(where))
    assert told.keys() <= broken.expected.keys() | {"."}  # the rest is pictures without a row
    for where in told:  # and people see the same
        assert f"  {where}: " in result.output
    good = json.loads((tmp_path / "report.json").read_text())["parts"]["train"]
    assert good["rows"] == 9 and good["left_out"] == len(saved["problems"])
    assert CANARY not in result.output and "\x1b" not in result.output
    assert runner.invoke(app, ["data", "validate", str(broken.folder), "--strict"]).exit_code == 1


AUDITED = """
import os, sys
from mmdlm.cli import app
from typer.testing import CliRunner
import PIL.Image, tokenizers, mmdlm.data.validation, mmdlm.data.cleaning, mmdlm.assets
PIL.Image.init()
folder, outside, out = map(os.path.realpath, sys.argv[1:])
touched = []
def listen(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        touched.append(os.path.realpath(os.fsdecode(arguments[0])))
    elif event in ("os.listdir", "os.scandir") and arguments[0] is not None:
        touched.append(os.path.realpath(os.fsdecode(arguments[0])))
sys.addaudithook(listen)
result = CliRunner().invoke(app, ["data", "validate", folder, "--fix", out])
assert result.exit_code == 0, result.output
here = os.path.dirname(os.path.dirname(mmdlm.__file__))
allowed = (folder, os.path.dirname(out), here, sys.prefix, sys.base_prefix, "/usr", "/proc", "/sys")
stray = [path for path in touched if not path.startswith(allowed)]
assert not [path for path in touched if path.startswith(outside)] and not stray, stray
assert any(path.startswith(folder) for path in touched)
print("audited", len(touched))
"""


def test_nothing_outside_the_folder_is_read(broken: Broken, tmp_path: Path):
    """Python tells of every file it opens, Pillow's and datasets' included; the folders outside are not among them."""
    outside = next(broken.folder.parent.glob("outside*"))
    command = [sys.executable, "-c", AUDITED, str(broken.folder), str(outside), str(tmp_path / "clean")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("audited")


def test_the_clean_copy_is_clean_and_the_input_is_untouched(broken: Broken, tmp_path: Path):
    before = {path.name: path.lstat().st_mtime_ns for path in broken.folder.iterdir()}
    out = tmp_path / "clean"
    assert runner.invoke(app, ["data", "validate", str(broken.folder), "--fix", str(out)]).exit_code == 0
    assert {path.name: path.lstat().st_mtime_ns for path in broken.folder.iterdir()} == before
    clean = open_pairs(out)
    assert clean.problems == [] and len(clean) == 9
    assert clean.hashes == open_pairs(broken.folder).hashes
    assert (out / "good-1.png").read_bytes() == (broken.folder / "good-1.png").read_bytes()
    for again in (out, broken.folder / "inside"):  # there already; inside the input
        result = runner.invoke(app, ["data", "validate", str(broken.folder), "--fix", str(again)])
        assert result.exit_code == 2 and "choose" in result.output
    assert not (broken.folder / "inside").exists()


def test_pictures_of_every_mode_become_rgb_and_go_through_the_clean_copy(tmp_path: Path):
    folder = tmp_path / "modes"
    folder.mkdir()
    plain = drawing(3)
    half = plain.convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(half.size))
    palette = plain.convert("P")
    palette.info["transparency"] = 0
    pictures = {
        "rgb.png": plain, "palette.png": palette, "grey.png": plain.convert("L"), "bits.png": plain.convert("1"),
        "alpha.png": half, "la.png": half.convert("LA"), "cmyk.jpg": plain.convert("CMYK"),
        "sixteen.png": Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257), "web.webp": half,
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(folder / name, **({"transparency": 0} if name == "palette.png" else {}))
        (folder / name).with_suffix(".txt").write_text(f"a picture\na {name.split('.')[0]} picture\n")
    turned = Image.new("RGB", (60, 30), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "turned.txt").write_text("turned")
    data = open_pairs(folder)
    assert data.problems == [] and len(data) == 10
    by_name = {pair.key: pair for pair in data}
    assert {pair.image.mode for pair in by_name.values()} == {"RGB"}
    assert by_name["turned.jpg"].image.size == (30, 60)
    assert min(by_name["alpha.png"].image.getpixel((20, 0))) > 250  # transparent there: laid on white
    near = np.abs(np.asarray(by_name["sixteen.png"].image, float) - np.asarray(by_name["grey.png"].image, float))
    assert near.max() == 0
    assert by_name["la.png"].texts == ["a picture", "a la picture"]
    result = runner.invoke(app, ["data", "validate", str(folder), "--fix", str(tmp_path / "clean")])
    assert result.exit_code == 0
    for line in (tmp_path / "clean" / "metadata.jsonl").read_text().splitlines():
        name = json.loads(line)["file_name"]
        with Image.open(tmp_path / "clean" / name) as found:
            assert found.mode == "RGB" and found.format in ("PNG", "JPEG")
    assert open_pairs(tmp_path / "clean").hashes == data.hashes


@pytest.mark.parametrize("write", ["csv", "utf16", "nothing", "txt"])
def test_other_metadata(write: str, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded(drawing(1)))
    (folder / "b.png").write_bytes(encoded(drawing(2)))
    if write == "csv":
        rows = [
            b"file_name,text,question,answers", b'a.png,"one, two",how many?,two', b"b.png,caf\xe9,,", b"b.png,one",
            b"b.png,,,", b"", b'b.png,"[""x"", ""y""]",,', b"b.png," + b"x" * 200_000 + b",,",
        ]  # fmt: skip
        (folder / "metadata.csv").write_bytes(b"\r\n".join(rows) + b"\r\n")
        data = open_pairs(folder)
        assert [pair.texts for pair in data] == [["one, two"], ["x", "y"]]
        assert data[0].questions == [("how many?", ["two"])]
        assert [problem.where for problem in data.problems] == [f"metadata.csv:{n}" for n in (3, 4, 5, 8)]
        assert "not valid UTF-8" in data.problems[0].reason and "2 cells, expected 4" in data.problems[1].reason
        assert "text is empty" in data.problems[2].reason and "field" in data.problems[3].reason
    elif write == "utf16":
        (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n', encoding="utf-16")
        data = open_pairs(folder)
        assert len(data) == 0 and "UTF-16" in data.problems[0].reason
    elif write == "nothing":
        report = validate(folder)
        assert "there is no a.txt beside it" in written(report) and len(report.parts["train"]) == 0
    else:
        (folder / "a.txt").write_bytes("é".encode("latin-1"))
        outside = tmp_path / "secret.txt"
        outside.write_text(CANARY)
        (folder / "b.txt").symlink_to(outside)
        data = open_pairs(folder)
        assert len(data) == 0 and CANARY not in str(data.problems)
        assert ["UTF-8" in data.problems[0].reason, "leads outside" in data.problems[1].reason] == [True, True]


def test_leaks_between_splits_and_folders(tmp_path: Path):
    for split, numbers in (("train", (1, 2, 3)), ("test", (4, 2)), ("other", (3, 5))):
        (tmp_path / "data" / split).mkdir(parents=True)
        for number in numbers:
            form = {"train": "PNG", "test": "PNG", "other": "JPEG"}[split]
            (tmp_path / "data" / split / f"{number}.{form.lower()}").write_bytes(encoded(drawing(number), form))
            (tmp_path / "data" / split / f"{number}.txt").write_text(f"number {number}")
    other = (tmp_path / "data" / "other").rename(tmp_path / "other")
    report = validate(tmp_path / "data", held_out=other)
    assert [problem.reason.split(" (")[0].split(str(tmp_path))[0] for problem in report.leaks] == [
        "its picture is in ", "its picture looks like train/3.txt of "
    ]  # fmt: skip
    assert "to the pixel (train/2.txt)" in report.leaks[0].reason and "test/2.txt" in report.leaks[0].where


def test_difference_hashes_tell_pictures_apart_and_copies_not():
    pictures = [drawing(number, 64) for number in range(40)]
    hashes = [difference_hash(picture) for picture in pictures]
    assert near_pairs(hashes) == []
    changed: list[Callable[[Image.Image], Image.Image]] = [
        lambda picture: picture.resize((37, 37), Image.Resampling.LANCZOS),
        lambda picture: Image.open(io.BytesIO(encoded(picture, "JPEG", quality=60))),
        lambda picture: picture.point([int(level * 0.95) for level in range(256)] * 3),
    ]
    for change in changed:
        copies = [difference_hash(change(picture)) for picture in pictures]
        found = near_pairs(hashes, copies)
        assert all(i == j for i, j in found) and len(found) >= 36
    flat = difference_hash(Image.new("RGB", (30, 30), "red"))
    assert near_pairs([flat, flat]) == []

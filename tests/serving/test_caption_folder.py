"""`mmdlm caption-folder`: every picture once, whatever is broken and whenever it is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.pipelines import ImageToText

PICTURES = 150
BROKEN = ("empty.png", "text.jpg", "torn.png", "deep/er/torn.webp")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of noise pictures of many sizes and kinds, some in folders, some broken, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep" / "er").mkdir(parents=True)
    drawn = np.random.default_rng(0)
    for number in range(PICTURES):
        side = 16 + number % 5
        levels = drawn.integers(0, 256, (side, 16, 3), dtype=np.uint8)
        place = folder / ("deep" if number % 3 == 0 else "") / f"{number}.{('png', 'JPG', 'webp', 'bmp')[number % 4]}"
        Image.fromarray(levels).save(place)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("hello")
    (folder / "torn.png").write_bytes((folder / "1.JPG").read_bytes()[:200])
    (folder / "deep" / "er" / "torn.webp").write_bytes((folder / "2.webp").read_bytes()[:60])
    (folder / "notes.txt").write_text("no picture")
    return folder


def captioned(pictures: Path, out: Path, model: Path, *options: object) -> str:
    arguments = ["caption-folder", pictures, out, "--model", model, "--device", "cpu", "--batch-size", 2, *options]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert parquet.read_table(out / "captions.parquet").to_pylist() == found
    return found


@pytest.fixture(scope="module")
def whole(pictures, tiny_model, tmp_path_factory) -> Path:
    """What a run gives that nothing disturbs."""
    out = tmp_path_factory.mktemp("captions") / "whole"
    said = captioned(pictures, out, tiny_model)
    assert said.startswith(f"{out}/captions.jsonl: 154 pictures, 4 could not be read: see their error; 1 files are")
    return out


def test_every_picture_has_one_row_and_a_broken_one_its_reason(whole, pictures, tiny_model):
    found = rows(whole)
    files = [row["file"] for row in found]
    assert len(files) == PICTURES + len(BROKEN) and files == sorted(set(files))
    assert {row["file"] for row in found if row["error"]} == set(BROKEN)
    for row in found:
        if row["error"]:
            assert row["caption"] is None and row["confidence"] is None and "\n" not in row["error"]
        else:
            with Image.open(pictures / row["file"]) as picture:
                assert (row["width"], row["height"]) == picture.size
    errors = {row["file"]: row["error"] for row in found}
    assert "is empty" in errors["empty.png"] and "no picture that can be read" in errors["text.jpg"]
    pipe = ImageToText.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    for row in found[:PICTURES:37]:
        alone = pipe((pictures / row["file"]).read_bytes())
        assert row["caption"] == alone.texts[0] and row["confidence"] == pytest.approx(alone.confidences[0], rel=1e-4)


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_bytes(whole, pictures, tiny_model, tmp_path):
    out = tmp_path / "killed"
    arguments = ["caption-folder", pictures, out, "--model", tiny_model, "--device", "cpu", "--batch-size", 2]
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", *map(str, arguments)]
    # nicer than this process, so that on a busy machine it is not finished before it can be killed
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, preexec_fn=lambda: os.nice(2))
    while not list(out.glob("shards/*.parquet")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL and not (out / "captions.jsonl").exists()
    done = {path: path.read_bytes() for path in out.glob("shards/*.parquet")}
    assert 1 <= len(done) < len(list(whole.glob("shards/*.parquet")))
    before = sum(parquet.read_metadata(path).num_rows for path in done)
    (out / "shards" / ".half.parquet.99999.part").write_bytes(b"half")  # what a kill in the middle of writing leaves

    said = captioned(pictures, out, tiny_model)
    assert f"154 pictures, {before} of them done before, 4 could not be read" in said
    for name in ("captions.jsonl", "captions.parquet"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert {path: path.read_bytes() for path in done} == done  # nothing was done twice
    assert sum(parquet.read_metadata(path).num_rows for path in out.glob("shards/*")) == PICTURES + len(BROKEN)


def test_later_it_takes_in_what_is_new_and_what_changed(whole, pictures, tiny_model, tmp_path):
    out, folder = tmp_path / "later", tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    for path in folder.rglob("*.*"):
        if path.suffix in (".JPG", ".bmp"):
            path.unlink()
    captioned(folder, out, tiny_model)
    (folder / "torn.png").write_bytes((pictures / "4.png").read_bytes())
    (folder / "new.png").write_bytes((pictures / "8.png").read_bytes())
    (folder / "4.png").unlink()
    said = captioned(folder, out, tiny_model)
    expected = {row["file"]: row for row in rows(whole)}
    found = {row["file"]: row for row in rows(out)}
    assert f"{len(found)} pictures, {len(found) - 2} of them done before, 3 could not" in said
    assert "4.png" not in found and found["torn.png"]["caption"] == expected["4.png"]["caption"]
    assert found["new.png"]["caption"] == expected["8.png"]["caption"]
    same = [name for name in found if name not in ("torn.png", "new.png")]
    assert [found[name]["caption"] for name in same] == [expected[name]["caption"] for name in same]
    (next(out.glob("shards/*.parquet"))).write_bytes(b"broken")  # is done again
    captioned(folder, out, tiny_model)
    again = {row["file"]: row["caption"] for row in rows(out)}
    assert again == {name: row["caption"] for name, row in found.items()}


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["caption-folder", *map(str, arguments)])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def test_what_it_cannot_do_is_one_sentence(whole, pictures, tiny_model, tmp_path):
    import fcntl

    (tmp_path / "nothing").mkdir()
    assert "There is no folder at" in refused(tmp_path / "none", tmp_path / "out", "--model", tiny_model)
    assert "There is no picture below" in refused(tmp_path / "nothing", tmp_path / "out", "--model", tiny_model)
    assert "is not empty and holds no manifest.json" in refused(pictures, pictures, "--model", tiny_model)
    assert "was begun with steps None" in refused(pictures, whole, "--model", tiny_model, "--steps", 3)
    assert "was begun with model_hash" in refused(pictures, whole)
    with (whole / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "Another run is at work" in refused(pictures, whole, "--model", tiny_model)
    (tmp_path / "manifest.json").write_text("[]")
    assert "is no manifest of captions" in refused(pictures, tmp_path, "--model", tiny_model)

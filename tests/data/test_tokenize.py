"""Pictures into code shards: killed and gone on with, alone and by a local Ray, every row once and none lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.data.coded_pairs import pixels_of
from mmdlm.data.coded_shards import is_coded, open_coded, tokenizer_hash
from mmdlm.data.paired import open_pairs, split_pairs
from mmdlm.data.shards import done_keys, shard_rows, shards
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer

PICTURES = 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tokenizer")
    widths = {"encoder_widths": (8, 8), "decoder_widths": (8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
    LFQTokenizer(sample_size=16, codebook_bits=6, **widths).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures with captions, and a broken one."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(PICTURES):
        levels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"picture {number}\nnumber {number}\n")
    (folder / "broken.png").write_bytes(b"")
    (folder / "broken.txt").write_text("broken")
    return folder


def command(pictures: Path, out: Path, tokenizer: Path, *options: str) -> list[str]:
    arguments = ["data", "tokenize", str(pictures), str(out), "--model", str(tokenizer), *options]
    return [sys.executable, "-c", "from mmdlm.cli import main; main()", *arguments]


def assert_whole(pictures: Path, out: Path, tokenizer: Path) -> None:
    """Every row once, in shards that are whole, with the codes that the tokenizer gives."""
    keys = [row["key"] for shard in shards(out) for row in shard_rows(shard)]
    assert sorted(keys) == [f"{number:02}.png" for number in range(PICTURES)]
    rows = open_coded(out, tokenizer=tokenizer_hash(tokenizer))[0]
    data = open_pairs(pictures)
    assert rows.captions == [row.texts for row in data.rows]
    model = LFQTokenizer.from_pretrained(tokenizer).eval()
    assert torch.equal(rows.codes, model.encode(pixels_of([pair.image for pair in data], 16)).int())


def descendants(pid: int) -> list[tuple[int, str]]:
    """(pid, command line) of all processes below one, from /proc."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                names[int(path.name)] = (path / "cmdline").read_text(errors="replace")
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return [(one, names.get(one, "")) for one in found[1:]]


def test_a_killed_run_goes_on_without_loss_or_duplicates(pictures: Path, tokenizer: Path, tmp_path: Path):
    out = tmp_path / "out"
    line = command(pictures, out, tokenizer, "--batch-size", "2")
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not any(out.glob("shard-*")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    before = len(done_keys(out))
    assert 0 < before < PICTURES
    result = CliRunner().invoke(app, ["data", "tokenize", str(pictures), str(out), "--model", str(tokenizer)])
    assert result.exit_code == 0, result.output
    assert f"{PICTURES - before} rows written" in result.output and f"{before} were there, 1 left out" in result.output
    assert "broken.txt: The picture is empty" in result.output
    assert_whole(pictures, out, tokenizer)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds Ray's worker in /proc")
def test_a_killed_ray_worker_costs_nothing(pictures: Path, tokenizer: Path, tmp_path: Path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    line = command(pictures, out, tokenizer, "--ray", "--workers", "1", "--batch-size", "2")
    # On a busy machine Ray gives up waiting for its own parts, and its workers are so nice that they hardly run.
    patient = {"RAY_agent_register_timeout_ms": "600000", "RAY_worker_register_timeout_seconds": "600",
               "RAY_worker_niceness": "0"}  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **patient}
    environment.pop("RAY_ADDRESS", None)
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT, env=environment)
        try:
            while not any(out.glob("shard-*")) and process.poll() is None:
                time.sleep(0.01)
            if "Ray could not be started" in (tmp_path / "printed").read_text():
                pytest.skip("Ray waits half a minute for its own parts, which this machine was too busy for")
            workers = [pid for pid, name in descendants(process.pid) if name.startswith("ray::") and "Map" in name]
            assert workers, descendants(process.pid)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            before = len(done_keys(out))
            assert process.wait(timeout=900) == 0, (tmp_path / "printed").read_text()
        finally:
            process.kill()
            process.wait()
    assert 0 < before < PICTURES
    assert_whole(pictures, out, tokenizer)


def test_code_shards_are_split_as_their_pictures_are_and_refuse_another_tokenizer(
    pictures: Path, tokenizer: Path, tmp_path: Path
):
    out = tmp_path / "out"
    for _ in range(2):
        result = CliRunner().invoke(app, ["data", "tokenize", str(pictures), str(out), "--model", str(tokenizer)])
        assert result.exit_code == 0, result.output
    assert "0 rows written" in result.output and is_coded(out) and not is_coded(pictures)
    train, held_out = open_coded(out, held_out_share=0.25, seed=1)
    expected = split_pairs(open_pairs(pictures), held_out_share=0.25, seed=1)
    assert [train.keys, held_out.keys] == [[row.key for row in half.rows] for half in expected]
    assert len(held_out) == 12 and held_out.codes.shape == (12, 4, 4)
    with pytest.raises(InputError, match="codes of the tokenizer"):
        open_coded(out, tokenizer="another")
    other = LFQTokenizer.from_pretrained(tokenizer)
    other.encoder.out.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    result = CliRunner().invoke(app, ["data", "tokenize", str(pictures), str(out), "--model", str(tmp_path / "other")])
    assert result.exit_code == 2 and "another tokenizer" in " ".join(result.output.split())

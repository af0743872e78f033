"""eval/speed.py at a tiny size: the shape of what it says. No number here depends on how fast anything is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdlm.programs import program_path


def speed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program_path("eval/speed")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_part_prints_a_row_and_writes_it_down(tmp_path: Path, tiny_model: Path):
    done = speed(
        "pairs=1", "least_seconds=0.001", "rows=[1, 2]", "entropy_bits=[6, 9]", "entropy_vectors=[32, 8]",
        "further_pictures=1", "threads=1", f"model={tiny_model}", f"out={tmp_path}", "seed=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["command"].startswith("mmdlm run eval/speed pairs=1") and found["seed"] == 3
    assert re.fullmatch(r"none|[0-9a-f]{12}\+?", found["commit"])
    assert found["machine"].keys() == {"cpu", "cores", "threads", "load_average_before"}
    assert found["machine"]["threads"] == 1 and found["versions"].keys() == {"mmdlm", "python", "torch"}
    rows = found["results"]
    assert [row["unit"] for row in rows] == ["x", "x", "x", "x", "s", "GB", "s"]
    assert all(len(row["values"]) == 1 for row in rows)
    assert all(row["values"][0] > 0 for row in rows[:-1])
    assert [max(row["float64_difference"].values()) < 1e-9 for row in rows[2:4]] == [True, True]
    # Two predictor rows of the tiny model: 16 codes, two layers of width 32, seven products each, fold, unfold, head.
    assert "1 x" in rows[0]["what"] and "2 x" in rows[1]["what"]
    printed = done.stdout.splitlines()
    assert len([line for line in printed if line.startswith("| ")]) == 2 + len(rows)
    assert found["command"] in printed[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["part=everything"], "expected all or one of"), (["pairs=0"], "pairs is 0"), (["model=/nowhere"], "/nowhere")],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: list[str], sentence: str, tmp_path: Path):
    done = speed(*arguments, f"out={tmp_path / 'out'}")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()

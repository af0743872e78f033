"""eval/speed.py at a tiny size: the shape of what it says. No number here depends on how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mmdlm.programs import program_path


@pytest.fixture
def speed() -> Iterator[Callable[[list[str]], None]]:
    """The program's main; what it sets for its whole process is set back."""
    spec = importlib.util.spec_from_file_location("program_speed", program_path("eval/speed"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module.main
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_every_part_prints_a_row_and_writes_it_down(speed, tmp_path: Path, tiny_model: Path, capsys):
    speed([
        "pairs=1", "least_seconds=0.001", "rows=[1, 2]", "entropy_bits=[6, 9]", "entropy_vectors=[32, 8]",
        "further_pictures=1", "threads=1", f"model={tiny_model}", f"out={tmp_path}", "seed=3",
    ])  # fmt: skip
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
    assert "1 x" in rows[0]["what"] and "2 x" in rows[1]["what"]
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if line.startswith("| ")]) == 2 + len(rows)
    assert found["command"] in printed[-1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["part=everything"], "expected all or one of"), (["pairs=0"], "pairs is 0"), (["model=/nowhere"], "/nowhere")],
)
def test_what_cannot_be_measured_is_one_sentence(speed, arguments: list[str], sentence: str, tmp_path: Path, capsys):
    with pytest.raises(SystemExit) as stopped:
        speed([*arguments, f"out={tmp_path / 'out'}"])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

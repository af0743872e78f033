"""The run log: what is on disk after a run, a kill and a resume."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from mmdlm.training.run_log import RunLog, plot_curves, read_metrics


def test_every_report_is_a_line(tmp_path: Path, capsys):
    log = RunLog(tmp_path / "run")
    log.write(10, loss=1.23456789, psnr=20)
    log.write(20, loss=1e-9)
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["loss"] == 1.23457 and rows[0]["psnr"] == 20 and rows[1]["loss"] == 1e-9
    assert rows[0]["seconds"] >= 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("step 10  seconds ") and printed[0].endswith("loss 1.23457  psnr 20")


def test_other_processes_are_silent(tmp_path: Path, capsys):
    RunLog(tmp_path / "run", enabled=False).write(1, loss=1.0)
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_resumed_run_reads_as_one(tmp_path: Path):
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.write(step, loss=float(step))
    # The last checkpoint is that of step 2, and the process was killed in the middle of a line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    again = RunLog(tmp_path, step=2)
    again.write(3, loss=30.0)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_empty(tmp_path: Path):
    RunLog(tmp_path).write(1, loss=1.0)
    RunLog(tmp_path)
    assert read_metrics(tmp_path) == [] and read_metrics(tmp_path / "nowhere") == []


def test_curves(tmp_path: Path):
    assert plot_curves(tmp_path) is None
    log = RunLog(tmp_path)
    for step in range(3):
        log.write(step, loss=3.0 - step, **({"psnr": 20.0} if step == 2 else {}))
    with Image.open(plot_curves(tmp_path)) as sheet:
        assert sheet.width > sheet.height > 100
        assert len(sheet.convert("RGB").getcolors(1 << 16) or []) > 5

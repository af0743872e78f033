"""Cases shared among processes: the same rows however many there are, and whenever they were killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from mmdlm.errors import InputError
from mmdlm.evaluation.processes import run_batches, share

# A process that squares its cases and, where told so, is killed with SIGKILL while it appends the batch KILLED.
WORKER = """
import os, signal, sys
from pathlib import Path
from mmdlm.evaluation import processes

killed = int(os.environ.get("KILLED", "-1"))
written = os.fsync
def dies(descriptor):
    if killed >= 0 and any(f'"batch": {killed},' in p.read_text() for p in Path(sys.argv[1]).glob("parts/*.jsonl")):
        path = next(p for p in Path(sys.argv[1]).glob("parts/*.jsonl") if f'"batch": {killed},' in p.read_text())
        os.truncate(path, path.stat().st_size - 9)  # as a kill in the middle of the write leaves it
        os.kill(os.getpid(), signal.SIGKILL)
    written(descriptor)
processes.os.fsync = dies

def work(numbers, cases):
    return [{"number": n, "squared": c * c + 0.1, "batch of": len(cases)} for n, c in zip(numbers, cases)]

rows = processes.run_batches(Path(sys.argv[1]), "squares", list(range(11)), work, batch_size=2, begun_with={"a": 1})
print("none" if rows is None else len(rows))
"""


def start(out, rank=0, world=1, killed=-1):
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "KILLED": str(killed)}
    command = [sys.executable, "-c", WORKER, str(out)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def squares(out, **settings):
    def work(numbers, cases):
        return [{"number": n, "squared": c * c + 0.1, "batch of": len(cases)}
                for n, c in zip(numbers, cases, strict=True)]

    settings = {"batch_size": 2, "begun_with": {"a": 1}} | settings
    return run_batches(out, "squares", list(range(11)), work, **settings)


def test_two_processes_and_a_killed_one_give_what_one_gives(tmp_path):
    alone = squares(tmp_path / "one")
    assert [row["squared"] for row in alone] == [n * n + 0.1 for n in range(11)]
    assert [row["batch of"] for row in alone] == [2] * 10 + [1]
    running = [start(tmp_path / "two", rank, 2) for rank in range(2)]
    printed = [process.communicate()[0].strip() for process in running]
    assert printed == ["11", "none"]
    assert squares(tmp_path / "two") == alone  # from what both have kept
    assert len((tmp_path / "two" / "parts" / "squares.1.jsonl").read_text().splitlines()) == 1 + 3

    # killed with SIGKILL in the middle of its third line; taken up by two others, then looked at by one
    killed = start(tmp_path / "killed", killed=2)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    kept = tmp_path / "killed" / "parts" / "squares.0.jsonl"
    assert not kept.read_bytes().endswith(b"\n") and kept.read_text().count('"batch"') >= 2
    running = [start(tmp_path / "killed", rank, 2) for rank in range(2)]
    assert [process.communicate()[0].strip() for process in running] == ["11", "none"]
    assert squares(tmp_path / "killed") == alone
    lines = [json.loads(line) for path in (tmp_path / "killed" / "parts").iterdir() for line in path.open()]
    assert sorted(line["batch"] for line in lines if "batch" in line) == list(range(6))  # nothing twice


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    squares(tmp_path)
    with pytest.raises(InputError, match=r"begun with other settings \(a\)"):
        squares(tmp_path, begun_with={"a": 2})
    with pytest.raises(InputError, match=r"other settings \(batch_size\)"):
        squares(tmp_path, batch_size=3)
    with pytest.raises(ValueError, match="0 rows for 2 cases"):
        run_batches(tmp_path / "b", "none", [1, 2], lambda numbers, cases: [], batch_size=2, begun_with={})
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="expected a rank below"):
        share()
    monkeypatch.setenv("RANK", "1")
    assert share() == (1, 2) and not share().is_main

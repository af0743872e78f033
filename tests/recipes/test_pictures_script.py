"""train/pictures.sh, with programs that only write down how they were called: order, settings that exist, resuming."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
for word in "$@"; do case "$word" in out=*) mkdir -p "${word#out=}";; esac; done
"""


@pytest.fixture
def called(tmp_path: Path):
    """Runs the script; returns the commands that it gave, as written down by stubs of the programs it calls."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("mmdlm", "torchrun", "accelerate"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)

    def call(**settings: str) -> list[str]:
        calls.write_text("")
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(calls)} | settings
        script = ["bash", str(ROOT / "train" / "pictures.sh"), str(tmp_path / "run")]
        subprocess.run(script, env=environment, check=True, capture_output=True, text=True)
        return calls.read_text().splitlines()

    return call


def steps(commands: list[str]) -> list[str]:
    """What each command does: a program's YAML, or the program."""
    return [(re.findall(r"--config (\w+)", line) or re.findall(r"(?:run|data) ([\w/]+)", line))[0] for line in commands]


def test_on_a_cpu_from_drawings_to_the_judge(called, tmp_path: Path):
    commands = called(DEVICE="cpu", PICTURES=str(tmp_path / "drawings"))
    assert steps(commands) == [
        "pictures_f4", "pictures_f4_decoder", "pictures", "pictures_longer", "train/grow", "pictures_300", "train/ship",
        "eval/pictures",
    ]  # fmt: skip
    for line in commands:
        for program, settings in re.findall(r"(\S+/(?:train_lfq|supervised)\.py) --config (\w+)", line):
            assert Path(program).is_file() and Path(program).with_name(f"{settings}.yaml").is_file()
        # What a step begins with is what one before it wrote.
        for begin in re.findall(rf"(?:init_from|model|tokenizer)={tmp_path}/run/(\w+)", line):
            assert (tmp_path / "run" / begin).is_dir(), line
    assert not any("train/grow" in line for line in called(DEVICE="cpu", PICTURES=str(tmp_path / "drawings")))


def test_on_a_gpu_and_with_drawings_still_to_be_rendered(called, tmp_path: Path):
    (tmp_path / "run" / "packages").mkdir(parents=True)
    (tmp_path / "run" / "packages" / "fetched").touch()
    commands = called(DEVICE="gpu")
    assert steps(commands) == ["build", "pictures_f8_gpu", "pictures_gpu", "train/ship", "eval/pictures"]
    assert all(f"data={tmp_path}/run/pictures" in line for line in commands if "--config" in line)

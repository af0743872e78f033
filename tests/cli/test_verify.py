"""`mmdlm verify` on recorded cases: its lines, its exit codes, its mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mmdlm.cli import app

LLADA = Path(__file__).parent.parent / "parity" / "recorded" / "llada-generate"


def verify(*cases: object) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, cases)])


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A case of two short runs."""
    directory = Path(shutil.copytree(LLADA, tmp_path / "cases" / "short"))
    spec = json.loads((directory / "case.json").read_text())
    spec["runs"] = {name: spec["runs"][name] for name in ("uneven", "padded_cfg")}
    (directory / "case.json").write_text(json.dumps(spec))
    return directory


def test_one_line_for_each_check(case):
    (case.parent / "README.md").write_text("files beside the cases are passed over, as a shell's * gives them")
    done = verify(*sorted(case.parent.iterdir()))
    lines = done.stdout.splitlines()
    assert done.exit_code == 0 and done.stderr == ""
    assert [" ".join(line.split()[:6]) for line in lines[:2]] == [
        "short uneven passes 9 passes equal",
        "short uneven output equal PASS keep_masks:",
    ]
    assert len({line.index("PASS") for line in lines[:-1]}) == 1, "the columns stand below each other"
    assert lines[-1] == "4 checks of 1 case, none failed"


def test_what_fails_says_so_and_the_other_cases_go_on(case):
    broken = Path(shutil.copytree(case, case.parent / "changed"))
    tensors = load_file(broken / "case.safetensors")
    tensors["uneven.output_ids"][0, 0] += 1
    save_file(tensors, broken / "case.safetensors")
    done = verify(broken, case)
    assert done.exit_code == 1 and done.stderr == ""
    assert [line.split()[1:3] for line in done.stdout.splitlines() if " FAIL" in line] == [["uneven", "output"]]
    assert done.stdout.splitlines()[-1] == "8 checks of 2 cases, 1 failed"


def test_a_bug_in_one_replay_hides_no_other_case(case):
    odd = Path(shutil.copytree(case, case.parent / "odd"))
    spec = json.loads((odd / "case.json").read_text())
    spec["runs"]["uneven"]["steps"] = "nine"
    (odd / "case.json").write_text(json.dumps(spec))
    done = verify(odd, case)
    assert done.exit_code == 1 and "Traceback" in done.stderr
    assert done.stdout.splitlines()[-1] == "5 checks of 2 cases, 1 failed"


def test_what_is_no_case_is_refused_before_any_work(case, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for wrong, words in (
        (tmp_path / "empty", "has no case.json"),
        (tmp_path / "none", "has no case.json"),
        (tmp_path / "file", "is a file, expected the directory"),
    ):
        done = verify(wrong) if wrong.name == "file" else verify(case, wrong)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert done.stderr.startswith("mmdlm: ") and words in done.stderr


def test_a_broken_case_is_one_sentence_and_the_others_go_on(case):
    broken = Path(shutil.copytree(case, case.parent / "cut"))
    for name, words in (("model.safetensors", "model.safetensors"), ("case.safetensors", "incomplete or broken")):
        content = (broken / name).read_bytes()
        (broken / name).write_bytes(content[: len(content) // 2])
        done = verify(broken, case)
        assert done.exit_code == 2 and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1 and words in done.stderr
        assert done.stdout.splitlines()[-1] == "4 checks of 2 cases, none failed"
        (broken / name).write_bytes(content)


def test_nothing_given_is_a_usage_error():
    assert verify().exit_code == 2

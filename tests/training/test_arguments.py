"""The command line of every program."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mmdlm.training.arguments import config_from_arguments


@dataclass
class Model:
    widths: list[int] = field(default_factory=lambda: [8])


@dataclass
class Config:
    steps: int = 10
    rate: float = 0.1
    model: Model = field(default_factory=Model)


@pytest.fixture
def program(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text("steps: 3\nmodel:\n  widths: [4, 5]\n")
    (tmp_path / "large.yaml").write_text("steps: 300\n")
    return str(tmp_path / "program.py")


def test_the_yaml_beside_the_program_then_the_settings_given(program: str, tmp_path: Path):
    assert config_from_arguments(Config, [], program=program) == Config()
    assert config_from_arguments(Config, ["--config", "small"], program=program) == Config(3, 0.1, Model([4, 5]))
    found = config_from_arguments(Config, ["rate=1e-3", "--config", "small", "--steps=7"], program=program)
    assert found == Config(7, 1e-3, Model([4, 5]))
    elsewhere = tmp_path / "deeper" / "own.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text("rate: 2.0")
    assert config_from_arguments(Config, ["--config", str(elsewhere)], program=program).rate == 2.0
    assert config_from_arguments(Config, ["model.widths=[1]"], program=program).model == Model([1])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config"], "--config stands last"),
        (["--config", "tiny"], "no configuration 'tiny': expected a YAML file or one of large, small"),
        (["--resume"], "got '--resume', expected key=value"),
        (["stepps=3"], "did you mean steps?"),
        (["steps=many"], "steps is 'many', expected a whole number"),
    ],
)
def test_a_wrong_argument_is_one_sentence_and_exit_code_2(
    program: str, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stopped:
        config_from_arguments(Config, arguments, program=program)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and sentence in printed and printed.count("\n") == 1


@dataclass
class Run:
    out: str = "runs/some"


def test_a_place_that_takes_no_file_shows_before_the_work(
    program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(tmp_path.rglob("*"))
    for out in (tmp_path / "new" / "deeper", tmp_path):
        assert config_from_arguments(Run, [f"out={out}"], program=program).out == str(out)
    file = tmp_path / "small.yaml"
    wrong = [(file, "Not a directory"), (file / "new" / "deeper", "Not a directory")]
    wrong += [(tmp_path / ("x" * 300), "File name too long")]
    wrong += [("/proc/runs", "")] if Path("/proc/self").exists() else []  # where even root may write nothing
    for out, words in wrong:
        with pytest.raises(SystemExit) as stopped:
            config_from_arguments(Run, [f"out={out}"], program=program)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and printed.count("\n") == 1
        assert printed.startswith(f"error: out is {out}, expected a directory to write into, but ") and words in printed
    assert sorted(tmp_path.rglob("*")) == before

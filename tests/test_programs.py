"""Programs by name: found in a checkout here; tests/test_package.py looks for one in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdlm.errors import InputError
from mmdlm.programs import list_programs, program_path

ROOT = Path(__file__).parent.parent


def test_programs_are_found_by_name():
    assert program_path("train/supervised") == ROOT / "train" / "supervised.py"
    assert program_path("train/README.md") == ROOT / "train" / "README.md"
    assert "tokenizers/train_lfq" in list_programs()
    assert all(program_path(name).is_file() for name in list_programs())


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"no program 'train/supervise'.*such as train/supervised"):
        program_path("train/supervise")


@pytest.mark.parametrize("name", ["", "train", "train/", "mmdlm/cli", "train/../pyproject.toml", "/etc/passwd"])
def test_no_name_leaves_the_program_folders(name: str):
    with pytest.raises(InputError, match="There is no program"):
        program_path(name)

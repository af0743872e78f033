"""Recorded cases of the published models, replayed: each directory of recorded/ is one, as `mmdlm verify` takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdlm.evaluation.parity import verify

RECORDED = sorted(path.parent for path in (Path(__file__).parent / "recorded").glob("*/case.json"))


@pytest.mark.parametrize("directory", RECORDED, ids=lambda path: path.name)
def test_the_library_gives_what_was_recorded(directory: Path):
    checks = list(verify(directory))
    assert checks
    assert [f"{check.name}: {check.found}" for check in checks if not check.passed] == []

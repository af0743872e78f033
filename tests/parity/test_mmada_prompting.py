"""MMaDA's recorded prompts: every id, mask and label, with the published special ids."""

from __future__ import annotations

from pathlib import Path

from mmdlm.evaluation.parity import verify

RECORDED = Path(__file__).parent / "recorded" / "mmada-prompting"


def test_every_recorded_tensor_comes_out():
    found = list(verify(RECORDED))
    assert len(found) == 23
    assert [(check.name, check.found) for check in found if not check.passed] == []

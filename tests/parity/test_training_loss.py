"""MMaDA's and LLaDA's recorded training losses, gradients, layouts and masked places."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmdlm.evaluation.parity import Check, verify

RECORDED = Path(__file__).parent / "recorded" / "training-loss"


@pytest.fixture(scope="module")
def found() -> dict[str, Check]:
    return {check.name: check for check in verify(RECORDED)}


def test_every_recorded_number_comes_out(found: dict[str, Check]):
    assert len(found) == 35
    assert [(check.name, check.found) for check in found.values() if not check.passed] == []


def test_what_the_released_programs_do_wrongly_is_named(found: dict[str, Check]):
    assert "mmada_training_bias" in found["loss_t2i"].note
    assert found["loss_t2i, padding hidden"].passed

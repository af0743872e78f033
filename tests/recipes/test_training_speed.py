"""eval/training_speed.py at a tiny size: both steps are one step. No number here depends on how fast anything is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmdlm.errors import InputError


def test_both_steps_have_one_loss_and_one_gradient(run, tmp_path: Path, capsys):
    tiny = ["vocabularies=[small]", "width=64", "layers=1", "side=4", "rows={small: 15}", "pairs=1", "memory=false"]
    run("eval/training_speed", *tiny, f"out={tmp_path}")
    found = json.loads((tmp_path / "run.json").read_text())
    assert found["kind"] == "training_speed" and found["command"][:3] == ["mmdlm", "run", "eval/training_speed"]
    small = found["results"]["small"]
    assert small["loss"]["ours"] == pytest.approx(small["loss"]["plain"], rel=1e-4)
    assert small["gradient_norm"]["ours"] == pytest.approx(small["gradient_norm"]["plain"], rel=1e-4)
    assert small["places"]["asked"] < small["places"]["ours"] < small["places"]["plain"]
    assert "| small, 4208 ids |" in capsys.readouterr().out
    with pytest.raises(InputError, match="expected some of small, full"):
        run("eval/training_speed", "vocabularies=[large]")

"""`mmdlm doctor`: what it says about a model it has not loaded."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.convert.llada import PUBLISHED_CONFIG as LLADA_8B


def test_doctor_reads_nothing_but_the_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLADA_8B))
    done = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), "--vram", "24"])
    assert done.exit_code == 0, done.output
    assert "8.02 B" in done.stdout and "bfloat16 14.9 GiB" in done.stdout
    assert "dtype=bfloat16, device_map=cuda" in done.stdout
    small = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), "--vram", "2"])
    assert "nothing fits" in small.stdout
    wrong = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path / "nowhere")])
    assert wrong.exit_code == 2 and "There is no directory" in wrong.stderr
    assert CliRunner().invoke(app, ["doctor", "--model", str(tmp_path), "--vram", "0"]).exit_code == 2

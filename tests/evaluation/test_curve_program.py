"""eval/curve.py from end to end on the shipped model: every setting, going on after a kill, the drawing."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.programs import program_path


@pytest.fixture
def curve() -> Iterator[Callable[[list[str]], None]]:
    spec = importlib.util.spec_from_file_location("program_curve", program_path("eval/curve"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.main
    torch.set_flush_denormal(False)


def test_every_setting_is_measured_once(curve, shapes: Path, tmp_path: Path, capsys):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text("concepts: 6\nstyles: [noto]\n")
    asked = [
        f"data={shapes}", f"out={out}", f"recipe={recipe}", "scenes=2", "draw_steps=[2]", "caption_steps=[1, 24]",
        "thresholds=[0.9]", "judge.least_steps=3", "judge.scenes_per_drawing=1", "judge.widths=[4,8,8]",
        f"judge_cache={tmp_path}",
    ]  # fmt: skip
    curve(asked)
    points = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
    assert [point["part"] for point in points] == ["draw"] * 4 + ["describe"] * 6
    found = {(point["series"], point["setting"]): point for point in points}
    assert [found[name, "2 steps"]["forwards"] for name in ("no guidance", "guidance 1.5")] == [2.0, 4.0]
    assert found["guidance in the first half", "2 steps"]["forwards"] == 4.0  # 0.71 of 256 are masked: still inside
    assert found["fixed steps", "24 steps"]["forwards"] == 24 and found["fixed steps", "1 steps"]["forwards"] == 1
    assert 1 <= found["threshold", "tau 0.9"]["forwards"] <= 24
    page = (out / "results.md").read_text()
    assert page in capsys.readouterr().out and "mmdlm run eval/curve data=" in page
    assert json.loads((out / "results.json").read_text())["points"] == points
    with Image.open(out / "curve.png") as drawing:
        assert drawing.width > 800 and drawing.height > 800

    # killed within a line: what is whole stays as it was, the rest is measured
    kept = (out / "points.jsonl").read_text().splitlines(keepends=True)
    (out / "points.jsonl").write_text("".join(kept[:-1]) + kept[-1][:20])
    curve([*asked, "parts=[describe]", f"plot={tmp_path / 'plot.png'}"])
    again = (out / "points.jsonl").read_text().splitlines(keepends=True)
    assert again[:-1] == kept[:-1] and json.loads(again[-1])["setting"] == points[-1]["setting"]
    assert json.loads(again[-1])["right"] == points[-1]["right"] and (tmp_path / "plot.png").is_file()
    with pytest.raises(InputError, match="was begun with another model or other scenes"):
        curve([*asked, "seed=1"])


def test_what_cannot_be_measured(curve, shapes: Path, tmp_path: Path):
    for wrong, sentence in (("parts=[sing]", "some of draw, describe"), ("scenes=0", "1 or more")):
        with pytest.raises(InputError, match=sentence):
            curve([f"data={shapes}", f"out={tmp_path / 'a'}", wrong])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("lr: 1\n")
    with pytest.raises(InputError, match="does not say which concepts"):
        curve([f"data={shapes}", f"out={tmp_path / 'b'}", f"recipe={recipe}"])

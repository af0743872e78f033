"""eval/shipped.py: its plan, its section, and that the committed README is what the committed results give."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mmdlm.errors import InputError
from mmdlm.programs import program_path


@pytest.fixture(scope="module")
def shipped() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shipped_program", program_path("eval/shipped"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_what_the_results_give():
    done = subprocess.run(
        [sys.executable, str(program_path("eval/shipped")), "part=readme", "check=true"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_readme_that_was_edited_is_found_out_and_written_again(shipped: ModuleType, tmp_path: Path):
    readme, results = tmp_path / "README.md", program_path("eval/shipped").parent / "results"
    readme.write_text(f"before\n{shipped.BEGIN}\nsomething\n{shipped.END}\nafter\n")
    arguments = ["part=readme", f"readme={readme}", f"results={results}"]
    with pytest.raises(InputError, match="write it with"):
        shipped.main([*arguments, "check=true"])
    shipped.main(arguments)
    shipped.main([*arguments, "check=true"])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "### The shipped model" in text
    readme.write_text("no markers")
    with pytest.raises(InputError, match="has not one"):
        shipped.main(arguments)


def test_sweeps_plots_and_results_of_another_model(shipped: ModuleType, tmp_path: Path):
    """From the committed table as every run: what is swept and plotted needs no new drawing."""
    committed = program_path("eval/shipped").parent / "results" / "table.json"
    names = [run.name for run in shipped.planned(shipped.Config())]
    assert names[0] == "table" and {"drawing-16-1.0", "drawing-16-3.0", "words-24"} <= set(names)
    for name in names:
        shutil.copy(committed, tmp_path / f"{name}.json")
    results = shipped.results_of_one_model(tmp_path)
    assert list(shipped.swept(results, "drawing"))[:2] == [(4.0, 1.0), (8.0, 1.0)]
    section = shipped.section(results)
    assert "| 32 | 1.5 | " in section and "| 24 | " in section and f"(runs: {len(names)}" in section
    shipped.draw_plots(results, tmp_path)
    assert (tmp_path / "drawing.png").stat().st_size > 5000 and (tmp_path / "words.png").is_file()
    content = json.loads(committed.read_text())
    assert not any("/" in word for word in content["run"]["command"] if word.startswith(("data=", "out=")))
    content["run"]["model"]["hash"] = "another"
    (tmp_path / "table.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="of 2 models"):
        shipped.results_of_one_model(tmp_path)


def test_settings_that_do_not_fit(shipped: ModuleType, tmp_path: Path):
    with pytest.raises(InputError, match="expected all, runs or readme"):
        shipped.main(["part=some"])
    with pytest.raises(InputError, match="data is empty"):
        shipped.main([f"out={tmp_path}"])
    (tmp_path / "run.json").write_text(json.dumps({"command": ["mmdlm"] * 3 + ["a"], "model": {"hash": "x"}}))
    assert not shipped.is_finished(tmp_path, ["a"], "x")  # begun
    for arguments, model in ((["b"], "x"), (["a"], "y")):
        with pytest.raises(InputError, match="holds another run"):
            shipped.is_finished(tmp_path, arguments, model)

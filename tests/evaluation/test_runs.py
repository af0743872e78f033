"""Runs on disk, and two of them held together."""

from __future__ import annotations

import json

import pytest

from mmdlm.errors import InputError
from mmdlm.evaluation.runs import check_new, compare_runs, differences, plot_comparison, read_run, write_run


def run(path, scores, *, kind="vqa", results=None):
    check_new(path)
    rows = [{"id": key, "score": value} for key, value in scores.items()]
    command, results = ["mmdlm", "eval", "vqa"], results or {}
    write_run(path, kind=kind, command=command, seed=3, settings={"steps": 4}, results=results, rows=rows)
    return path


def test_what_a_run_holds(tmp_path):
    content = read_run(run(tmp_path / "a", {1: 1.0}, results={"overall": 50.0}))
    assert content["command"] == ["mmdlm", "eval", "vqa"] and content["seed"] == 3
    assert content["results"] == {"overall": 50.0}
    assert {"mmdlm", "python", "torch", "transformers"} <= content["versions"].keys()
    assert "CPU" in content["hardware"]
    with pytest.raises(InputError, match="finished run"):
        check_new(tmp_path / "a")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(InputError, match="no run"):
        read_run(tmp_path / "other.json")
    with pytest.raises(ValueError, match="JSON"):
        run(tmp_path / "nan", {}, results={"x": float("nan")})


def test_paired_differences(tmp_path):
    cases = range(200)
    a = run(tmp_path / "a", {i: float(i % 2) for i in cases})
    b = run(tmp_path / "b", {i: float(i % 2 or i % 10 == 0) for i in reversed(cases)})
    found = compare_runs(a, b / "run.json")
    assert found["cases"] == 200 and found["better"] == 20 and found["worse"] == 0
    assert found["first_mean"] == 0.5 and found["difference"] == pytest.approx(0.1)
    # twenty of two hundred differ by one: standard error sqrt(0.1 * 0.9 / 200) = 0.0212
    assert found["low"] == pytest.approx(0.1 - 1.96 * 0.0212, abs=0.01)
    assert found["high"] == pytest.approx(0.1 + 1.96 * 0.0212, abs=0.01)
    assert compare_runs(a, a)["low"] == compare_runs(a, a)["high"] == 0.0
    plot_comparison(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_sets_of_pictures_are_compared_by_their_errors(tmp_path):
    a, b = (
        run(tmp_path / name, {}, kind="images", results={"fid": value, "fid_error": error, "kid": 1.0})
        for name, value, error in (("a", 10.0, 3.0), ("b", 12.0, 4.0))
    )
    found = compare_runs(a, b)["by_error"]
    assert list(found) == ["fid"] and found["fid"]["difference"] == 2.0
    assert found["fid"]["high"] == pytest.approx(2 + 1.959964 * 5)
    plot_comparison(compare_runs(a, b), tmp_path / "plot.png")


def test_runs_that_cannot_be_compared(tmp_path):
    a, b = run(tmp_path / "a", {1: 1.0, 2: 0.0}), run(tmp_path / "b", {1: 1.0, 3: 0.0})
    with pytest.raises(InputError, match="2 are in one only, '2' for one"):
        compare_runs(a, b)
    with pytest.raises(InputError, match="of one kind"):
        compare_runs(a, run(tmp_path / "c", {1: 1.0}, kind="captions"))
    with pytest.raises(InputError, match="nothing to compare"):
        compare_runs(run(tmp_path / "d", {}), run(tmp_path / "e", {}))
    with (tmp_path / "a" / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"id": 1, "score": 0.0}))
    with pytest.raises(InputError, match="twice"):
        compare_runs(a, a)


def test_differences_of_results():
    then = {"a": 1.0, "b": {"c": 2, "d": "x"}, "e": None}
    assert differences(then, {"a": 1.0 + 1e-9, "b": {"c": 2, "d": "x"}, "e": None}) == []
    assert differences(then, {"a": 1.1, "b": {"c": 2, "d": "y"}}) == [
        "results.a: 1.0 then, 1.1 now",
        "results.b.d: x then, y now",
    ]

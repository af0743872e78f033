"""Checkpoints: what is saved comes back, and a kill at any moment leaves whole ones only."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmdlm.errors import InputError
from mmdlm.training.checkpoints import (
    WeightAverage,
    check_same_weights,
    disk_guard,
    list_checkpoints,
    load_checkpoint,
    read_best,
    save_checkpoint,
    trained_state,
    write_best,
)


def save(run: Path, step: int, *, keep: int = 2, value: float | None = None) -> Path:
    weights = {"model": {"weight": torch.full((2, 3), float(step) if value is None else value).T}}
    state = {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.5, "params": [0]}]}}
    return save_checkpoint(run, step, weights=weights, state=state, meta={"seen": 7}, keep=keep)


def test_what_is_saved_comes_back(tmp_path: Path):
    assert load_checkpoint(tmp_path, "latest") is None
    assert save(tmp_path, 5) == tmp_path / "checkpoint-5"
    found = load_checkpoint(tmp_path, "latest")
    assert found is not None
    weights, state, meta = found
    assert torch.equal(weights["model"]["weight"], torch.full((3, 2), 5.0))  # a transposed view too
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], torch.ones(2))
    assert state["optimizer"]["param_groups"] == [{"lr": 0.5, "params": [0]}] and meta == {"step": 5, "seen": 7}


def test_the_newest_are_kept_in_the_order_of_steps(tmp_path: Path):
    for step in (8, 9, 10, 100):
        save(tmp_path, step, keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert load_checkpoint(tmp_path, "latest")[2]["step"] == 100
    for name in ("checkpoint-9", str(tmp_path / "checkpoint-9")):
        assert load_checkpoint(tmp_path, name)[2]["step"] == 9
    with pytest.raises(InputError, match=r"no checkpoint 'checkpoint-7' in .*one of: checkpoint-9, checkpoint-10"):
        load_checkpoint(tmp_path, "checkpoint-7")


def test_the_best_stays_whatever_its_age(tmp_path: Path):
    assert read_best(tmp_path) is None
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, step, weights={}, state={}, meta={}, keep=1, best=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    write_best(tmp_path, 2, 0.5)
    assert read_best(tmp_path) == (2, 0.5)


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path):
    save(tmp_path, 5)
    for error in (OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672]")):
        sentence = r"writing failed \(.*make room .* checkpoint-5 in .* is whole"
        with pytest.raises(SystemExit, match=sentence), disk_guard(tmp_path):
            raise error
    for error in (FileNotFoundError(2, "no such file"), RuntimeError("shapes cannot be multiplied")):
        with pytest.raises(type(error)), disk_guard(tmp_path):
            raise error


@pytest.mark.parametrize(
    ("file", "left"),
    [(file, left) for file in ("model.safetensors", "state.pt", "meta.json") for left in (0.0, 0.1, 0.5, 0.9)]
    + [("state.pt", None), ("meta.json", None)],
)
def test_a_checkpoint_that_is_cut_short_is_one_sentence(file: str, left: float | None, tmp_path: Path):
    broken = save(tmp_path, 5) / file
    whole = broken.read_bytes()
    for mend in ("delete it, then the run begins anew", "delete it, then checkpoint-4 is used"):
        if left is None:
            broken.unlink(missing_ok=True)
        else:
            broken.write_bytes(whole[: int(len(whole) * left)])
        with disk_guard(tmp_path), pytest.raises(InputError, match=f"checkpoint-5 is broken or cut short .*: {mend}"):
            load_checkpoint(tmp_path, "latest")
        save(tmp_path, 4)
    with pytest.raises(InputError, match=r"expected a whole checkpoint: resume from another \(checkpoint-4\)"):
        load_checkpoint(tmp_path, "checkpoint-5")
    broken.parent.rename(tmp_path / "away")
    assert load_checkpoint(tmp_path, "latest")[2]["step"] == 4


def test_a_disk_that_fails_while_a_checkpoint_is_read_is_the_guards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 5)
    monkeypatch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        load_checkpoint(tmp_path, "latest")


def test_the_weights_of_other_settings_are_refused(tmp_path: Path):
    found = {"model": {"weight": torch.ones(2, 3)}, "more": {}}
    check_same_weights(found, {"model": {"weight": torch.zeros(2, 3)}}, tmp_path)
    for other in ({"weight": torch.ones(3, 2)}, {"bias": torch.ones(2, 3)}, {}):
        with pytest.raises(InputError, match=r"other weights \(model\) than these settings train: give another out"):
            check_same_weights(found, {"model": other}, tmp_path)
    with pytest.raises(InputError, match=r"other weights \(discriminator\)"):
        check_same_weights(found, {"discriminator": {"weight": torch.ones(1)}}, tmp_path)


def test_only_what_is_trained_is_kept_of_a_frozen_model():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert trained_state(module).keys() == module.state_dict().keys()
    module[0].requires_grad_(False)
    assert set(trained_state(module)) == {"1.weight", "1.bias"} == set(WeightAverage(module, 0.5).state)


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    save(tmp_path, 3)
    save(tmp_path, 3, value=-1.0)
    assert float(load_checkpoint(tmp_path, "latest")[0]["model"]["weight"][0, 0]) == -1.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_failure_leaves_the_old_ones_and_nothing_else(tmp_path: Path):
    save(tmp_path, 1)
    with pytest.raises(Exception, match=r"(?i)pickle|lambda"):
        save_checkpoint(tmp_path, 2, weights={}, state={"no": lambda: 0}, meta={}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_what_a_killed_process_left_is_swept_and_never_listed(tmp_path: Path):
    for name in (".writing-abc", ".deleting-checkpoint-1", "checkpoint-x", "checkpoint-2.old"):
        (tmp_path / name).mkdir()
    assert list_checkpoints(tmp_path) == []
    save(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2.old", "checkpoint-4", "checkpoint-x"]


# One process imports torch, and forks one child after the other that does nothing but save; each is killed at another
# moment, most of them in the middle of a save.
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mmdlm.training.checkpoints import list_checkpoints, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
run, chance = Path(sys.argv[1]), random.Random(0)

def newest():
    found = list_checkpoints(run)
    return int(found[-1].name.split("-")[1]) if found else 0

def save_for_ever():
    step = newest()
    while True:
        step += 1
        weights = {"model": {"weight": torch.full((500_000,), float(step))}}
        state = {"moments": torch.full((1_000_000,), float(step))}
        save_checkpoint(run, step, weights=weights, state=state, meta={}, keep=2)

middle = 0
for kill in range(8):
    before, child = newest(), os.fork()
    if child == 0:
        save_for_ever()
    while newest() < before + 2 or not (kill % 4 == 0 or any(run.glob(".writing-*"))):
        time.sleep(0.0002)
    time.sleep(chance.random() * 0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    middle += any(run.glob(".writing-*"))
    names = list_checkpoints(run)
    assert names, "a kill lost every checkpoint"
    for path in names:
        weights, state, meta = load_checkpoint(run, path.name)
        step = float(path.name.split("-")[1])
        assert meta["step"] == step
        assert torch.equal(weights["model"]["weight"], torch.full((500_000,), step))
        assert torch.equal(state["moments"], torch.full((1_000_000,), step))
print(middle)
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="forks")
def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # some kills did fall into a save


def test_the_moving_average_on_a_hand_case():
    module = nn.Linear(1, 1, bias=False)
    module.register_buffer("count", torch.tensor(0))
    with torch.no_grad():
        module.weight.fill_(1.0)
    average = WeightAverage(module, decay=0.5)
    with torch.no_grad():
        module.weight.fill_(11.0)
    module.count.fill_(3)
    average.update(module, 0)  # keeps min(0.5, 1/10) of the old
    assert average.state["weight"].item() == pytest.approx(10.0) and average.state["count"].item() == 3
    average.update(module, 90)  # keeps min(0.5, 91/100)
    assert average.state["weight"].item() == pytest.approx(10.5)
    assert module.weight.item() == 11.0


def test_the_average_follows_the_module_to_its_device():
    module = nn.Linear(2, 2)
    average = WeightAverage(module, decay=0.9)
    average.update(module.to("meta"), 0)
    assert {value.device.type for value in average.state.values()} == {"meta"}

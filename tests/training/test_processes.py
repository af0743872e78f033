"""Tensors spread by FSDP2 over two gloo processes: whole in a checkpoint, and the same step as one process takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.training.processes import gathered, load_optimizer, load_optimizers, peak_memory, spread_like

SHARDED = """
import os, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sequence import batch, draw_canvas
from mmdlm.training.checkpoints import WeightAverage, trained_state
from mmdlm.training.masked_loss import MaskedLoss, NoiseSettings, corrupt, normalisers
from mmdlm.training.processes import gathered, load_optimizer, spread_like
from mmdlm.vocabulary import Vocabulary

torch.set_num_threads(1)
special = ["pad", "mask", "bos", "eos", "boi", "eoi", "draw", "describe", "ask"]
vocabulary = Vocabulary(text_size=30, image_start=30, image_size=16, **{f"{s}_id": n for n, s in enumerate(special)})
trunk = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}

def run(rank, count):
    torch.manual_seed(0)
    model = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), image_side=2))
    step = MaskedLoss(model)
    if count > 1:
        mesh = init_device_mesh("cpu", (count,))
        for layer in model.trunk.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(step, mesh=mesh)
    average = WeightAverage(model, 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    codes = torch.arange(4).view(2, 2)
    for number in range(3):
        if number == 2:  # through what a checkpoint holds
            saved = {"model": trained_state(model), "average": average.state, "moments": optimizer.state_dict()}
            saved = gathered(saved)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            load_optimizer(optimizer, saved["moments"])
            average.state = {name: spread_like(value, average.state[name]) for name, value in saved["average"].items()}
        rows = [draw_canvas([10 + number, 20 - n], codes + 3 * n, (2, 2), vocabulary) for n in range(4)]
        canvas, valid = batch(rows[rank * 4 // count : (rank + 1) * 4 // count], pad_id=0)
        noised = corrupt(canvas, valid, [0] * len(valid), mask_id=1, settings=NoiseSettings(),
                         generator=torch.Generator().manual_seed(number), share=(rank, count))
        counts = normalisers(noised)
        if count > 1:
            dist.all_reduce(counts)
        found = step(noised)
        (found["image"] / counts[1] * count + found["text"] * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, number)
    return gathered({"model": trained_state(model), "average": average.state})

if __name__ == "__main__":
    out = sys.argv[1]
    expected = run(0, 1)
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
            torch.save(run(rank, 2), f"{out}/{rank}")
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    for rank in range(2):
        found = torch.load(f"{out}/{rank}", weights_only=True)
        for part in expected:
            for name, value in expected[part].items():
                torch.testing.assert_close(found[part][name], value, rtol=1e-4, atol=2e-5, msg=lambda m: f"{name}: {m}")
"""


def test_spread_over_two_processes_it_takes_the_same_steps(tmp_path: Path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "sharded.py"), str(tmp_path)], capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_what_is_whole_stays_as_it_is():
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    tree = gathered({"optimizer": optimizer.state_dict(), "list": [weight, 3]})
    assert tree["list"][0] is weight and spread_like(weight, weight) is weight
    other = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 2))])
    load_optimizer(other, tree["optimizer"])
    assert torch.equal(other.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_peak_memory_is_this_process_own():
    assert 0.05 < peak_memory(torch.device("cpu")) < 100


def test_moments_of_other_optimizers_are_refused():
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))]
    both = [torch.optim.AdamW(weights)]
    sum(weight.sum() for weight in weights).backward()
    both[0].step()
    saved = [both[0].state_dict()]
    again = [torch.optim.AdamW(weights)]
    load_optimizers(again, saved, Path("run"))
    assert torch.equal(again[0].state[weights[1]]["exp_avg"], both[0].state[weights[1]]["exp_avg"])
    load_optimizers(again, [], Path("run"))  # DeepSpeed's, which are not in the checkpoint's file
    with pytest.raises(InputError, match="another optimizer"):
        load_optimizers([torch.optim.AdamW(weights[:1]), torch.optim.SGD(weights[1:])], saved, Path("run"))

"""What several processes have to do together, and what each of them uses.

Tensors that FSDP2 has spread over processes (DTensor) are made whole for a checkpoint and spread again from one, so
that a checkpoint does not depend on how many processes wrote it; sums and decisions are made alike in all of them.
Every process has to call each of these functions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from mmdlm.errors import InputError


def gathered(tree: Any) -> Any:
    """The same dicts and lists with every spread tensor whole; tensors that are whole already are the same objects."""
    if isinstance(tree, dict):
        return {name: gathered(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gathered(value) for value in tree)
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def spread_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor spread as `example` is; the same tensor where the example is whole or of another shape."""
    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` of a gathered state: moments are spread as their parameters are."""
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    order = [n for group in saved["param_groups"] for n in group["params"]]
    state = {
        n: {name: spread_like(v, parameter) if isinstance(v, Tensor) else v for name, v in saved["state"][n].items()}
        for n, parameter in zip(order, parameters, strict=True)
        if n in saved["state"]
    }
    optimizer.load_state_dict({**saved, "state": state})


def load_optimizers(optimizers: Sequence[torch.optim.Optimizer], saved: Sequence[dict[str, Any]], run: Path) -> None:
    """`load_optimizer` for each of them; nothing where nothing was saved (DeepSpeed keeps its moments to itself).

    Raises InputError where the checkpoint in `run` has the moments of other optimizers than these.
    """
    if not saved:
        return
    there = [[len(group["params"]) for group in state["param_groups"]] for state in saved]
    expected = [[len(group["params"]) for group in optimizer.param_groups] for optimizer in optimizers]
    if there != expected:
        raise InputError(
            f"The checkpoint in {run} was written with another optimizer than these settings name: give the one in its "
            "config.yaml, or another out."
        )
    for optimizer, state in zip(optimizers, saved, strict=True):
        load_optimizer(optimizer, state)


def summed(accelerator: Any, values: Tensor) -> Tensor:
    """The sum over processes of a float64 tensor, on the CPU; the tensor itself where there is one process."""
    if accelerator.num_processes == 1:
        return values.cpu()
    return accelerator.reduce(values.to(accelerator.device), reduction="sum").cpu()


def largest(accelerator: Any, values: Sequence[float]) -> list[float]:
    """Of each value the largest of any process, so that all of them decide alike."""
    if accelerator.num_processes == 1:
        return list(values)
    mine = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    return list(accelerator.gather(mine).amax(0).tolist())


def peak_memory(device: torch.device) -> float:
    """The most memory this process has held so far, in GB: of the GPU, or resident of a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        # Not getrusage's ru_maxrss, which a child inherits from the process that started it.
        line = next(n for n in Path("/proc/self/status").read_text().splitlines() if n.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)

"""Checkpoints that a kill cannot spoil, and the moving average of weights.

A checkpoint is a directory `checkpoint-<step>` written under a temporary name and renamed, so a directory with that
name is whole. It holds safetensors for weights and averages, and the optimizers' state as a tensor-only file read with
`weights_only=True`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdlm.errors import InputError

_NAME = re.compile(r"checkpoint-(\d+)")


class WeightAverage:
    """Exponential moving average of a module's parameters and buffers, with the warm-up of arXiv 1803.05407's users:
    the decay at step n is min(decay, (1 + n) / (10 + n)), so early weights are forgotten quickly."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module's present weights; `step` counts from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            # Made before the module moved, or read from a checkpoint, the average lies elsewhere: it follows.
            mean = self.state[name] = self.state[name].to(value.device)
            if value.is_floating_point():
                mean.lerp_(value.detach(), 1 - keep)
            else:
                mean.copy_(value)


def list_checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run directory, oldest first."""
    found = [(int(m.group(1)), p) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def save_checkpoint(
    run: Path,
    step: int,
    *,
    weights: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Writes `run/checkpoint-<step>`: one safetensors file per entry of `weights`, `state.pt` (optimizers, generators)
    and `meta.json`; keeps the newest `keep` checkpoints. Returns its path."""
    run.mkdir(parents=True, exist_ok=True)
    for abandoned in [*run.glob(".writing-*"), *run.glob(".deleting-*")]:  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=run))
    try:
        for name, tensors in weights.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, place / f"{name}.safetensors")
        torch.save(state, place / "state.pt")
        (place / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1))
        target = run / f"checkpoint-{step}"
        if target.exists():
            _delete(target)
        os.replace(place, target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        _delete(old)
    return target


def _delete(checkpoint: Path) -> None:
    """Removes a checkpoint that is whole until it is gone: a kill halfway leaves no directory of its name."""
    doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(
    run: Path, which: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]] | None:
    """(weights, state, meta) of `latest` or of a named checkpoint of the run; None where `latest` finds none."""
    if which == "latest":
        found = list_checkpoints(run)
        if not found:
            return None
        place = found[-1]
    else:
        place = run / Path(which).name
        if not place.is_dir():
            known = ", ".join(p.name for p in list_checkpoints(run)) or "none"
            raise InputError(f"no checkpoint {which!r} in {run}, expected 'latest' or one of: {known}")
    weights = {p.stem: load_file(p) for p in sorted(place.glob("*.safetensors"))}
    state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
    return weights, state, json.loads((place / "meta.json").read_text())

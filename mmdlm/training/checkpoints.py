"""Checkpoints that a kill cannot spoil, and the moving average of weights.

A checkpoint is a directory `checkpoint-<step>` written under a temporary name and renamed, so a directory with that
name is whole. It holds safetensors for weights and averages, and the optimizers' state as a tensor-only file read with
`weights_only=True`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.picture_files import write_whole

_NAME = re.compile(r"checkpoint-(\d+)")


class WeightAverage:
    """Exponential moving average of what a module trains, with the warm-up of arXiv 1803.05407's users: the decay at
    step n is min(decay, (1 + n) / (10 + n)), so early weights are forgotten quickly."""

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in trained_state(module).items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Moves the average towards the module's present weights; `step` counts from 0."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, value in trained_state(module).items():
            # Made before the module moved, or read from a checkpoint, the average lies elsewhere: it follows.
            mean = self.state[name] = self.state[name].to(value.device)
            if value.is_floating_point():
                mean.lerp_(value.detach(), 1 - keep)
            else:
                mean.copy_(value)


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What a run changes: parameters and buffers; where some parameters are frozen (an adapter), the others only."""
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    if not frozen:
        return dict(module.state_dict())
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


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
    best: int | None = None,
) -> Path:
    """Writes `run/checkpoint-<step>`: one safetensors file per entry of `weights`, `state.pt` (optimizers, generators)
    and `meta.json`; keeps the newest `keep` checkpoints, and that of step `best` besides. Returns its path."""
    run.mkdir(parents=True, exist_ok=True)
    for abandoned in [*run.glob(".writing-*"), *run.glob(".deleting-*")]:  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    place = Path(tempfile.mkdtemp(prefix=".writing-", dir=run))
    try:
        for name, tensors in weights.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, place / f"{name}.safetensors")
        torch.save(state, place / "state.pt")
        (place / "meta.json").write_text(json.dumps({"step": step, **meta}, indent=1))
        for file in place.iterdir():  # on the disk before it has its name, should the power fail
            with file.open("rb") as written:
                os.fsync(written.fileno())
        target = run / f"checkpoint-{step}"
        if target.exists():
            _delete(target)
        os.replace(place, target)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    for old in list_checkpoints(run)[:-keep]:
        if old.name != f"checkpoint-{best}":
            _delete(old)
    return target


@contextmanager
def disk_guard(run: Path) -> Iterator[None]:
    """Inside, a disk that is full or fails ends the program with one sentence that says what is left."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch and safetensors raise errors of their own when a write fails, with the system's words inside.
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, OSError) and not isinstance(error, SafetensorError):
            failed = error.errno in _FULL
        else:
            failed = any(hint in words.lower() for hint in _WRITE_FAILED)
        if not failed:
            raise
        found = list_checkpoints(run)
        left = f"{found[-1].name} in {run} is whole" if found else f"there was no checkpoint in {run} yet"
        raise SystemExit(f"writing failed ({words}): make room and start the same command again; {left}") from error


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_WRITE_FAILED = ("os error", "no space left", "file too large", "pytorchstreamwriter", "inline_container")


def read_best(run: Path) -> tuple[int, float] | None:
    """(step, loss) of the checkpoint with the lowest held-out loss so far; None where there is none."""
    path = run / "best.json"
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    return int(found["step"]), float(found["held_out"])


def write_best(run: Path, step: int, held_out: float) -> None:
    write_whole(run / "best.json", json.dumps({"step": step, "held_out": held_out}).encode())


def _delete(checkpoint: Path) -> None:
    """Removes a checkpoint that is whole until it is gone: a kill halfway leaves no directory of its name."""
    doomed = checkpoint.with_name(f".deleting-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def load_checkpoint(
    run: Path, which: str | None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any], dict[str, Any]] | None:
    """(weights, state, meta) of `latest` or of a named checkpoint of the run; None where `latest` finds none, or where
    none is asked for. Raises InputError where the named one is not there, and where one cannot be read."""
    if not which:
        return None
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
    try:
        weights = {p.stem: load_file(p) for p in sorted(place.glob("*.safetensors"))}
        state = torch.load(place / "state.pt", map_location="cpu", weights_only=True)
        meta = json.loads((place / "meta.json").read_text())
        int(meta["step"])
    except _UNREADABLE as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".:")
        others = [p.name for p in list_checkpoints(run) if p != place]
        mend = f"delete it, then {others[-1]} is used" if others else "delete it, then the run begins anew"
        if which != "latest":
            mend = f"resume from another ({', '.join(others) or 'there is none'})"
        raise InputError(f"{place} is broken or cut short ({why}), expected a whole checkpoint: {mend}.") from error
    return weights, state, meta


# No other OSError: a disk that fails is disk_guard's.
_UNREADABLE = (
    SafetensorError, FileNotFoundError, EOFError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError,
)  # fmt: skip


def check_same_weights(
    found: Mapping[str, Mapping[str, Tensor]], expected: Mapping[str, Mapping[str, Tensor]], run: Path
) -> None:
    """InputError unless a checkpoint of `run` has all parts of `expected`, with weights of these names and shapes."""
    for part, weights in expected.items():
        there = {name: value.shape for name, value in found.get(part, {}).items()}
        if there != {name: value.shape for name, value in weights.items()}:
            raise InputError(
                f"The checkpoint in {run} has other weights ({part}) than these settings train: give another out, or "
                "the settings in its config.yaml."
            )

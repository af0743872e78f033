"""`mmdlm verify`: recorded outputs of the reference projects, replayed through the library's public code.

A case is a directory: `case.json` (its kind under `case`, its arguments under `runs` or `args`, its tolerances),
`case.safetensors` (inputs and expected outputs), and for most kinds a tiny checkpoint in the reference's own format
(`config.json`, `model.safetensors`). One module beside this one replays one kind of case; each yields `Check`s.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdlm.errors import InputError

# The kind of a case -> the module that replays it.
KINDS = {
    "mmada-forward": "mmada_forward",
    "mmada-t2i": "mmada_t2i",
    "mmada-mmu": "mmada_mmu",
    "mmada-prompting": "mmada_prompting",
    "mmada-image-io": "mmada_image_io",
    "llada-generate": "llada_generate",
    "fast-dllm": "fast_dllm",
    "daedal": "daedal",
    "magvitv2": "magvitv2",
    "open-magvit2": "open_magvit2",
    "open-magvit2-ema": "open_magvit2",
    "sdar": "sdar",
    "training-loss": "training_loss",
    "lumina-dimoo": "lumina_dimoo",
    "lumina-vq": "lumina_vq",
    "published-shapes": "published_shapes",
}


@dataclass(frozen=True)
class Check:
    """One line of the report: `found` is what was compared ("equal", "12 of 16 equal", "max error 3e-6")."""

    name: str
    found: str
    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Case:
    """A case's directory and what its files say."""

    directory: Path
    spec: dict[str, Any]

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every recorded tensor, by name (`<run>.<tensor>` where the case has runs)."""
        return load_file(self.directory / "case.safetensors")

    @property
    def kind(self) -> str:
        return str(self.spec["case"])

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """The arguments of each run; {} for a kind without runs."""
        return dict(self.spec.get("runs") or {})

    @cached_property
    def named_ids(self) -> dict[str, int]:
        """The ids that `vocab` names ("bos=211 eos=212"), and as `text_size` the length of its text tokenizer."""
        text = str(self.spec.get("vocab", ""))
        ids = {name: int(value) for name, value in re.findall(r"([^\s=(),;]+)=(\d+)", text)}
        size = re.search(r"len\(text tokenizer\)=(\d+)", text)
        return ids | ({"text_size": int(size[1])} if size else {})

    def run(self, name: str) -> dict[str, Tensor]:
        """The tensors of one run, without their prefix."""
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}


def read_case(directory: str | Path) -> Case:
    """The case in `directory`; InputError where its files are missing or broken, or its kind is unknown."""
    directory = Path(directory)
    path = directory / "case.json"
    if not path.is_file():
        raise InputError(f"{directory} is no case, it has no case.json: give the directory of a recorded case.")
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): copy the case again.") from error
    kind = spec.get("case") if isinstance(spec, dict) else None
    if kind not in KINDS:
        raise InputError(f"{path} is a case of kind {kind!r}, expected one of {', '.join(KINDS)}.")
    return Case(directory, spec)


def verify(directory: str | Path) -> Iterator[Check]:
    """Replays the case in `directory`, check by check; InputError where it cannot be read."""
    case = read_case(directory)
    checks: Callable[[Case], Iterator[Check]] = import_module(f"{__name__}.{KINDS[case.kind]}").checks
    try:
        with torch.random.fork_rng(devices=[]):
            yield from checks(case)
    except (SafetensorError, FileNotFoundError, KeyError) as error:
        raise InputError(f"{directory} is incomplete or broken ({error!r}): copy the case again.") from error


def equal(name: str, got: Tensor, expected: Tensor, *, note: str = "") -> Check:
    """Whether two tensors of ids or flags are the same, element by element."""
    if got.shape != expected.shape:
        return Check(name, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}", False, note)
    same = int((got == expected).sum())
    total = expected.numel()
    return Check(name, "equal" if same == total else f"{same} of {total} equal", same == total, note)


def close(name: str, got: Tensor, expected: Tensor, *, atol: float = 0.0, rtol: float = 0.0, note: str = "") -> Check:
    """Whether |got - expected| <= atol + rtol * |expected| everywhere; a NaN is never close."""
    if got.shape != expected.shape:
        return Check(name, f"shape {tuple(got.shape)}, expected {tuple(expected.shape)}", False, note)
    error = (got.double() - expected.double()).abs()
    fine = bool((error <= atol + rtol * expected.double().abs()).all())
    return Check(name, f"max error {float(error.max()) if error.numel() else 0.0:.1e}", fine, note)


@contextmanager
def handed_to(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that every forward of `model` appends its ids to, in order, as long as the context lasts."""
    handed: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        handed.append((arguments[0] if arguments else keywords["input_ids"]).clone())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield handed
    finally:
        handle.remove()


def same_passes(name: str, got: Sequence[Tensor], expected: Sequence[Tensor] | Tensor, *, note: str = "") -> Check:
    """Whether each pass was handed the recorded ids; says at which one (from 1) the first difference is."""
    wanted = list(expected)
    for number, (one, other) in enumerate(zip(got, wanted, strict=False), start=1):
        if one.shape != other.shape or not torch.equal(one, other):
            return Check(name, f"pass {number} of {len(wanted)} differs", False, note)
    if len(got) != len(wanted):
        return Check(name, f"{len(got)} passes, not {len(wanted)}", False, note)
    return Check(name, f"{len(wanted)} passes equal", True, note)

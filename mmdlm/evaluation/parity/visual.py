"""What the cases of visual tokenizers share: tolerances in words, the weights' way back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.convert.open_magvit2 import AVERAGED
from mmdlm.convert.weights import read_tensors, weight_files
from mmdlm.evaluation.parity import Case, Check


def tolerance(case: Case, name: str) -> dict[str, Any]:
    """`atol` and `rtol` as the case words them: "atol 2e-4, rtol 1e-4" -> {"atol": 2e-4, "rtol": 1e-4}."""
    words = str((case.spec.get("tolerance") or {}).get(name, ""))
    return {kind: float(value) for kind, value in re.findall(r"\b(atol|rtol)\s+([0-9.]+(?:e[+-]?\d+)?)", words)}


def published_weights(case: Case, back: Mapping[str, Tensor], *, averaged: bool = False) -> Check:
    """Whether `back`, our weights in the published form, is bit for bit what the case's files hold of them."""
    stored: dict[str, Tensor] = {}
    for path in weight_files(case.directory):
        stored.update(read_tensors(path))
    wanted = {name: AVERAGED + name.replace(".", "") if averaged else name for name in back}
    same = sum(
        stored[theirs].dtype == back[name].dtype and torch.equal(stored[theirs], back[name])
        for name, theirs in wanted.items()
        if theirs in stored
    )
    # With averaged weights the files hold the last ones too, and a discriminator's may stand beside either.
    rest = 0 if averaged else len([name for name in stored if name not in back and not name.startswith("loss.")])
    passed = same == len(back) and not rest
    found = "equal" if passed else f"{same} of {len(back)} equal, {rest} left over"
    return Check("weights there and back", found, passed)

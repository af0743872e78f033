"""Cases of MMaDA's picture preparation: shorter side and centre, squashed, and decoder output to 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdlm.evaluation.parity import Case, Check, close, equal
from mmdlm.evaluation.parity.visual import tolerance
from mmdlm.processing import fit_square, to_levels

NOTE = "truncate=True: the reference cuts the fraction off, ours rounds"


def checks(case: Case) -> Iterator[Check]:
    """Every recorded picture both ways, and the recorded decoder output."""
    side, within = int(case.spec["args"]["resolution"]), tolerance(case, "transform")
    for number in count():
        if f"{number}.image" not in case.tensors:
            break
        picture = Image.fromarray(case.tensors[f"{number}.image"].numpy())
        for name, fit in (("transform", "crop"), ("squash", "squash")):
            if f"{number}.{name}" in case.tensors:
                found = _pixels(fit_square(picture, side, fit))
                yield close(f"{number}.{name}", found, case.tensors[f"{number}.{name}"], **within)
    post = case.run("post")
    yield equal("post.uint8", to_levels(post["decoder_output"], truncate=True), post["uint8"], note=NOTE)


def _pixels(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0

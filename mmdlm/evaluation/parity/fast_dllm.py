"""Fast-dLLM v1 (arXiv:2505.22618): fixed steps, threshold and factor, without a cache and with either of the two."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, equal, same_passes
from mmdlm.evaluation.parity.blocks import MASK_MAY_STAY, fill_in_blocks
from mmdlm.evaluation.parity.computed import computed_by
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.caches import dual_cache, prefix_cache
from mmdlm.sampling.denoise import State

# (model, the run's name, its arguments, its tensors) -> its checks
Replay = Callable[[MaskPredictor, str, Mapping[str, Any], Mapping[str, Tensor]], Iterator[Check]]


def checks(case: Case) -> Iterator[Check]:
    """Per run the ids of every pass, the number of passes and the output."""
    model = load_predictor(case.directory, dtype=torch.float32)
    for name, arguments in case.runs.items():
        function = str(arguments["function"])
        if function in REPLAYS:
            yield from REPLAYS[function](model, name, arguments, case.run(name))
        else:
            yield Check(name, "not replayed", False, f"the function {function} is unknown")


def without_cache(
    model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Check]:
    """generate: the whole canvas in each pass."""
    filled = fill_in_blocks(model, tensors["input_ids"], int(run["gen_length"]), run)
    yield same_passes(f"{name} passes", filled.passes, _recorded_passes(tensors))
    yield equal(f"{name} nfe", torch.tensor(filled.state.forwards), tensors["nfe"])
    yield equal(f"{name} output", filled.state.x, tensors["output_ids"], note=MASK_MAY_STAY)


def with_cache(
    model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Check]:
    """generate_with_prefix_cache and generate_with_dual_cache: after a block's first pass its suffix or itself alone.

    The first version of the program passes once more over a block that its first pass has filled. Nothing comes of it,
    so that pass is counted here and its ids compared, but it is not made.
    """
    prompt, block_length = tensors["input_ids"], int(run["block_length"])
    dual, idle = run["function"] == "generate_with_dual_cache", run["implementation"] == "old"
    mask_id = int(run.get("mask_id", model.vocabulary.mask_id))
    handed: list[Tensor] = []
    extra = 0

    def note_idle_pass(state: State) -> bool:
        nonlocal extra
        last, start = passes[-1], prompt.shape[1]
        handed.append(last.ids)
        if idle and bool(last.places.all()):
            start += (int(state.written.nonzero()[:, 1].max()) - start) // block_length * block_length
            if not bool((state.x[:, start : start + block_length] == mask_id).any()):
                handed.append(state.x[:, start : start + block_length if dual else None])
                extra += 1
        return False

    cache = dual_cache if dual else prefix_cache
    with computed_by(model) as passes:
        filled = fill_in_blocks(model, prompt, int(run["gen_length"]), run, predictor=cache, stop=note_idle_pass)
    version = f"old: {extra} idle passes counted, not made" if idle else "new: no idle passes"
    yield same_passes(f"{name} passes", handed, _recorded_passes(tensors), note=version)
    yield equal(f"{name} nfe", torch.tensor(filled.state.forwards + extra), tensors["nfe"], note=version)
    yield equal(f"{name} output", filled.state.x, tensors["output_ids"], note=MASK_MAY_STAY)


def _recorded_passes(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The ids of each pass [1, n], without the -1 that fill them up."""
    lengths = tensors["step_len"].tolist()
    return [ids[:, :length] for ids, length in zip(tensors["step_model_input"], lengths, strict=True)]


# The reference's function -> its replay.
REPLAYS: dict[str, Replay] = {
    "generate": without_cache,
    "generate_with_prefix_cache": with_cache,
    "generate_with_dual_cache": with_cache,
}

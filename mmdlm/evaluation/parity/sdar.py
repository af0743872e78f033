"""SDAR (arXiv:2510.06303): the block-causal forward, and block after block with the cache of finished ones.

B rows, T places of the prompt, L places of the canvas: T + gen_length, rounded up to whole blocks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.convert import load_predictor
from mmdlm.errors import InputError
from mmdlm.evaluation.parity import Case, Check, close, equal, same_passes
from mmdlm.evaluation.parity.computed import Computed, computed_by
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.caches import block_cache
from mmdlm.sampling.denoise import Policy, State, denoise
from mmdlm.sampling.predictors import full
from mmdlm.sampling.published_sdar import dynamic, filtered, sequential, static

NOTE = "keep_masks: the mask token may be drawn"


def checks(case: Case) -> Iterator[Check]:
    """The two forwards, and per run the ids of every pass, which of them are kept, and the output."""
    model = load_predictor(case.directory, dtype=torch.float32)
    yield from _forwards(model, case.tensors)
    for name, arguments in case.runs.items():
        yield from _run(model, name, arguments, case.run(name))


def _forwards(model: MaskPredictor, tensors: Mapping[str, Tensor]) -> Iterator[Check]:
    ids = tensors["forward.input_ids"]
    everywhere = torch.arange(ids.shape[1]).expand_as(ids)
    seen = tensors["forward.attention_mask"].bool().view(-1, 1, ids.shape[1], ids.shape[1])
    for name, mask in (("forward", seen), ("forward_full", None)):
        logits = full(model, attention_mask=mask)(ids, everywhere)
        yield close(f"{name} logits", logits, tensors[f"{name}.logits"], atol=2e-4)


def _run(model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    with computed_by(model) as passes:
        state = _fill(model, tensors["input_ids"], run)
    recorded = [ids[:, :n] for ids, n in zip(tensors["step_model_input"], tensors["step_len"].tolist(), strict=True)]
    yield same_passes(f"{name} passes", [one.ids for one in passes], recorded)
    yield equal(f"{name} kept passes", _kept(passes, model, run), tensors["step_store_kv"], note="apart")
    yield equal(f"{name} output", state.x, tensors["output_ids"], note=NOTE)


def _fill(model: MaskPredictor, prompt: Tensor, run: Mapping[str, Any]) -> State:
    """Runs the loop until a block is finished in which a stop id stands, and keeps that block too."""
    block_length, mask_id = int(run["block_length"]), _mask_id(model, run)
    length = -(-(prompt.shape[1] + int(run["gen_length"])) // block_length) * block_length
    x = torch.full((len(prompt), length), mask_id)
    x[:, : prompt.shape[1]] = prompt
    blocks = (torch.arange(length) // block_length).expand_as(x)
    random = torch.Generator()
    seed = re.search(r"manual_seed\((\d+)\)", str(run.get("multinomial", "")))
    if seed is not None:
        random.manual_seed(int(seed[1]))  # torch's global generator, seeded so, gives the same numbers
    draw = filtered(
        temperature=float(run.get("temperature") or 1.0),
        top_k=int(run.get("top_k") or 0),
        top_p=float(run.get("top_p") or 1.0),
        block_length=None if "argmax" in str(run.get("multinomial", "")) else block_length,
        generator=random,
    )
    predict = block_cache(model, block=block_length, apart=True)
    steps = int(run["denoising_steps"]) * blocks[x == mask_id].unique().numel()
    states = denoise(
        predict, x, _policy(run, block_length), editable=x == mask_id, mask_id=mask_id, block=blocks, draw=draw,
        steps=steps, generator=[random] * len(x), keep_masks=True,
    )  # fmt: skip
    stop = torch.tensor(run.get("stopping_criteria_idx") or [], dtype=torch.long)
    left = blocks[x == mask_id].unique().numel()
    for state in states:
        unfinished = blocks[state.x == mask_id].unique().numel()
        if unfinished < left and bool(torch.isin(state.x[:, prompt.shape[1] :], stop).any()):
            break
        left = unfinished
    predict.store(state.x)
    return state


def _policy(run: Mapping[str, Any], block_length: int) -> Policy:
    rule = str(run["remasking_strategy"])
    if rule == "low_confidence_static":
        return static(block_length=block_length)
    if rule == "low_confidence_dynamic":
        return dynamic(float(run["confidence_threshold"]), block_length=block_length)
    if rule == "sequential":
        return sequential(block_length=block_length)
    raise InputError(f"remasking_strategy is {rule!r}, expected low_confidence_static, low_confidence_dynamic or "
                     "sequential: the released program has no other that works")


def _kept(passes: list[Computed], model: MaskPredictor, run: Mapping[str, Any]) -> Tensor:
    """Which passes computed whole blocks, for later ones to read."""
    return torch.tensor([not bool((one.ids == _mask_id(model, run)).any()) for one in passes])


def _mask_id(model: MaskPredictor, run: Mapping[str, Any]) -> int:
    return int(run.get("mask_id", model.vocabulary.mask_id))

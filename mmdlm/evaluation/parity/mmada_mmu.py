"""MMaDA's answers about a picture, and its text alone (arXiv:2505.15809): mmu_generate, mmu_generate_fast, generate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, equal, same_passes
from mmdlm.evaluation.parity.blocks import MASK_MAY_STAY, fill_in_blocks
from mmdlm.sampling.denoise import State


def checks(case: Case) -> Iterator[Check]:
    """Per run the ids of every pass, the unconditional copies included, and the output."""
    sizes = {key: case.named_ids[key] for key in ("text_size",) if key in case.named_ids}
    model = load_predictor(case.directory, dtype=torch.float32, vocabulary=sizes)
    for name, arguments in case.runs.items():
        tensors = case.run(name)
        prompt = tensors["input_ids"]
        length = int(arguments.get("max_new_tokens", arguments.get("gen_length", 0)))
        note, valid = MASK_MAY_STAY, None
        if "attention_mask" in tensors:
            valid = tensors["attention_mask"].bool()  # of the prompt and of the places to be filled
            if arguments.get("cfg_scale"):
                valid, note = None, f"{note}; guidance ignores the padding's mask, as released"
        filled = fill_in_blocks(
            model, prompt, length, arguments, valid=valid, all_steps=True,
            stop=_all_rows_ended(arguments, prompt.shape[1], length),
        )  # fmt: skip
        yield same_passes(f"{name} passes", filled.passes, tensors["step_model_input"])
        yield equal(f"{name} output", filled.state.x, tensors["output_ids"], note=note)


def _all_rows_ended(run: Mapping[str, Any], start: int, length: int) -> Callable[[State], bool]:
    """mmu_generate_fast: after a block, whether its last token is the end of the turn in every row."""
    eot = run.get("eot_token")
    if not str(run.get("function", "")).endswith("_fast") or eot is None:
        return lambda state: False
    block_length = int(run.get("block_length", length))
    passes = int(run["steps"]) // (length // block_length)

    def ended(state: State) -> bool:
        blocks, rest = divmod(state.step, passes)
        return rest == 0 and bool((state.x[:, start + blocks * block_length - 1] == eot).all())

    return ended

"""LLaDA's generate (arXiv:2502.09992): blocks, guidance, left padding, end-of-text options, sampling, random order."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, equal, same_passes
from mmdlm.evaluation.parity.blocks import MASK_MAY_STAY, fill_in_blocks


def checks(case: Case) -> Iterator[Check]:
    """Per run the ids of every pass, the unconditional copies included, and the output."""
    model = load_predictor(case.directory, dtype=torch.float32)
    eos = case.named_ids.get("eos", model.vocabulary.eos_id)
    for name, arguments in case.runs.items():
        tensors = case.run(name)
        prompt, length = tensors["input_ids"], int(arguments["gen_length"])
        seen = tensors.get("attention_mask")
        valid = None
        if seen is not None:
            valid = torch.cat([seen.bool(), torch.ones(len(seen), length, dtype=torch.bool)], dim=1)
        # At temperature 0 the released code writes both ids' -inf into the logits that the confidence is taken from,
        # above it only eot's: there eos goes into a copy that nothing reads any more.
        late = [case.named_ids["eot"]] if arguments.get("confidence_eos_eot_inf") else []
        if late and not arguments.get("temperature"):
            late.append(eos)
        filled = fill_in_blocks(
            model,
            prompt,
            length,
            arguments,
            valid=valid,
            all_steps=True,
            never=[eos] if arguments.get("logits_eos_inf") else None,
            last=late,
        )
        yield same_passes(f"{name} passes", filled.passes, tensors["step_model_input"])
        yield equal(f"{name} output", filled.state.x, tensors["output_ids"], note=MASK_MAY_STAY)

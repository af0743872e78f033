"""DAEDAL (arXiv:2508.00819): answers that grow before and while they are written, every pass of both stages.

`fit_length` and `grow` replay it with the released code's own ways by name: `tail` (half the window in end-of-text ids
behind the masks), `cut` (an insertion pushes what stands at the end past the budget) and `keep_masks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, equal
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.denoise import ABSENT, Predictor
from mmdlm.sampling.lengths import fit_length, grow, ragged
from mmdlm.sampling.predictors import guided, masked_prompt

NOTE = "tail: end-of-text ids behind the masks; cut: insertions drop what passes the budget; keep_masks"


def checks(case: Case) -> Iterator[Check]:
    """Per run the ids and the attention mask of every pass, and the output's rows, each of its own length."""
    model = load_predictor(case.directory, dtype=torch.float32)
    for name, arguments in case.runs.items():
        tensors = case.run(name)
        passes, output = _replay(model, tensors["input_ids"], arguments)
        yield _passes(f"{name} passes", passes, tensors, int(arguments["eos_token_id"]))
        padded = _widened(output, tensors["output_ids"].shape[1])
        yield equal(f"{name} output", padded, tensors["output_ids"], note=NOTE)
        yield equal(f"{name} lengths", (output != ABSENT).sum(dim=1), tensors["output_len"])


def _replay(model: MaskPredictor, prompt: Tensor, run: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
    """The ids of each pass, [B, L] or with guidance [2 B, L], and the last canvas."""
    both = {"mask_id": int(run["mask_id"]), "eos_id": int(run["eos_token_id"])}
    both |= {"longest": run["max_gen_length"], "window": run["eos_check_tokens"], "expansion": run["expansion_factor"]}
    first, second, other = (list[Tensor]() for _ in range(3))
    fitted = fit_length(
        _noted(ragged(model), first),
        prompt,
        initial_length=run["initial_gen_length"],
        eos_threshold=run["eos_confidence_threshold"],
        tail=run["eos_check_tokens"] // 2,
        **both,
    )
    predict = _noted(ragged(model), second)
    scale = float(run.get("cfg_scale") or 0)
    if scale > 0:  # DAEDAL's w is our scale - 1; its first stage is never guided
        is_prompt = torch.arange(fitted.x.shape[1]).expand_as(fitted.x) < prompt.shape[1]
        unconditional = _noted(ragged(model), other)
        predict = guided(predict, unconditional, scale + 1, other=masked_prompt(is_prompt, both["mask_id"]))
    states = grow(
        predict,
        fitted.x,
        prompt_length=prompt.shape[1],
        block=run["block_length"],
        threshold=run["high_conf_threshold"],
        low=run["low_conf_threshold"],
        eos_threshold=run["expand_eos_confidence_threshold"],
        cut=True,
        keep_masks=True,
        **both,
    )
    *_, last = states
    if scale > 0:
        second = [torch.cat(pair) for pair in zip(second, other, strict=True)]
    return first + second, last.x


def _noted(predict: Predictor, passes: list[Tensor]) -> Predictor:
    def noting(ids: Tensor, where: Tensor) -> Tensor:
        passes.append(ids)
        return predict(ids, where)

    return noting


def _passes(name: str, got: list[Tensor], tensors: Mapping[str, Tensor], eos_id: int) -> Check:
    """Width, ids and attention mask of every pass; the released code fills up with end-of-text ids."""
    widths = tensors["step_len"].tolist()
    recorded = zip(tensors["step_model_input"], tensors["step_attention_mask"], widths, strict=True)
    for number, (ids, (wanted, seen, width)) in enumerate(zip(got, recorded, strict=False), start=1):
        # with guidance only the second stage has rows for the unconditional copy
        wanted, seen = wanted[: len(ids), :width], seen[:, :width].bool()
        same = ids.shape == wanted.shape and torch.equal(ids.masked_fill(ids == ABSENT, eos_id), wanted)
        if not same or not torch.equal((ids != ABSENT)[: len(seen)], seen):
            return Check(name, f"pass {number} of {len(widths)} differs", False, NOTE)
    if len(got) != len(widths):
        return Check(name, f"{len(got)} passes, not {len(widths)}", False, NOTE)
    return Check(name, f"{len(widths)} passes equal", True, NOTE)


def _widened(x: Tensor, width: int) -> Tensor:
    """Absent places up to `width`, or less of them; what is wider stays wider."""
    used = int((x != ABSENT).any(dim=0).long().cumsum(dim=0).argmax()) + 1
    return F.pad(x[:, :used], (0, max(width - used, 0)), value=ABSENT)

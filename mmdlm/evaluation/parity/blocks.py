"""Text filled in block after block, as LLaDA, MMaDA and Fast-dLLM's uncached loop do it: one replay for all of them.

The arguments have the reference's own names (steps, block_length, temperature, cfg_scale, remasking, mask_id,
threshold, factor). Every part is public: `sequence` makes the canvas, `denoise` fills it, `policies`, `predictors` and
`published` say how. B rows, P places of the prompt, L places of the canvas.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdlm import sequence
from mmdlm.attention import full as everybody
from mmdlm.evaluation.parity import handed_to
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.denoise import Decision, Policy, Predictor, State, View, denoise
from mmdlm.sampling.draws import Draw
from mmdlm.sampling.policies import factor, threshold, top_k
from mmdlm.sampling.predictors import full, guided_together, masked_prompt
from mmdlm.sampling.published import forbidden, gumbel_together, random_together, unsure

# A rule that writes what it is sure of needs as many passes as it needs; the released loop has no limit at all.
NO_LIMIT = 10_000

# What goes for all of these loops, said in each note.
MASK_MAY_STAY = "keep_masks: the mask token may be drawn"


class Filled(NamedTuple):
    """`passes` are the ids handed to the model, one tensor per pass; `state` is the loop's last."""

    passes: list[Tensor]
    state: State


def fill_in_blocks(
    model: MaskPredictor,
    prompt: Tensor,
    length: int,
    run: Mapping[str, Any],
    *,
    valid: Tensor | None = None,
    never: list[int] | None = None,
    last: list[int] | None = None,
    all_steps: bool = False,
    predictor: Callable[[MaskPredictor], Predictor] | None = None,
    stop: Callable[[State], bool] = lambda state: False,
) -> Filled:
    """Fill `length` masks behind `prompt` [B, P] with the arguments of `run`.

    `valid` bool [B, L]: what may be seen. `never`: ids that are not drawn; `last`: ids whose confidence is 0.
    `all_steps`: a block that has nothing left to write goes on until its steps are used up. `predictor`: makes another
    one than the uncached. `stop`: asked after each pass.
    """
    mask_id = int(run.get("mask_id", model.vocabulary.mask_id))
    x, editable, block = _canvas(prompt, length, int(run.get("block_length", length)), mask_id)
    random = torch.Generator()
    seed = run.get("torch_manual_seed_before_call")
    if seed is not None:
        random.manual_seed(seed)  # torch's global generator, seeded so, gives the same numbers
    draw: Draw = gumbel_together(temperature=run.get("temperature") or 0.0, length=x.shape[1], generator=random)
    scale = float(run.get("cfg_scale") or 0)
    predict = predictor(model) if predictor is not None else _predictor(model, x, mask_id, scale, valid)
    if never:
        predict = forbidden(predict, never)
    if last:
        draw = unsure(draw, last)
    policy, steps = _policy(run, x.shape[1], random)
    if bool((prompt == mask_id).any()):
        policy = _counting_answers_only(policy, min(int(run.get("block_length", length)), length))
    states = denoise(
        predict, x, policy, editable=editable, mask_id=mask_id, steps=steps, block=block, draw=draw,
        generator=[random] * len(x), revise=all_steps and steps > length, keep_masks=True,
    )  # fmt: skip
    with handed_to(model) as passes:
        for state in states:
            if stop(state):
                break
    return Filled(passes, state)


def _canvas(prompt: Tensor, length: int, block_length: int, mask_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, what may be written, and the block of each place, [B, L] each. A mask in the prompt belongs to the first."""
    rows = [
        sequence.interleave([
            sequence.text(row, editable=row == mask_id), sequence.text([mask_id] * length, editable=True)
        ])
        for row in prompt
    ]  # fmt: skip
    canvas, _ = sequence.batch(rows, pad_id=mask_id)
    place = torch.arange(canvas.ids.shape[1]).expand_as(canvas.ids) - prompt.shape[1]
    return canvas.ids, canvas.editable, place.clamp(min=0) // block_length


def _predictor(model: MaskPredictor, x: Tensor, mask_id: int, scale: float, valid: Tensor | None) -> Predictor:
    seen = None if valid is None else everybody(valid)
    if scale <= 0:
        return full(model, attention_mask=seen)
    inputs = {"attention_mask": seen}
    other = masked_prompt(x != mask_id, mask_id)  # LLaDA's w is our scale - 1
    return guided_together(model, inputs, inputs, scale + 1, other=other)


def _policy(run: Mapping[str, Any], places: int, random: torch.Generator) -> tuple[Policy, int]:
    """The rule and its steps."""
    policy, steps = top_k(), int(run["steps"])
    if run.get("threshold") is not None:
        policy, steps = threshold(run["threshold"]), NO_LIMIT
    elif run.get("factor") is not None:
        policy, steps = factor(run["factor"], accept_last=True), NO_LIMIT
    if run.get("remasking") == "random":
        policy = random_together(policy, length=places, generator=random)
    return policy, steps


def _counting_answers_only(policy: Policy, block_length: int) -> Policy:
    """Masks of the prompt are filled too, but the plan counts those of the answer's block."""

    def counted(view: View) -> Decision:
        return policy(view._replace(n_start=torch.full_like(view.n_start, block_length)))

    return counted

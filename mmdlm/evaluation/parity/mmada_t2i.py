"""MMaDA's pictures (arXiv:2505.15809): MaskGIT's rounds, guided or not, with codes given or drawn with a seed.

The released loop leaves a mask in its canvas after the last round and returns that round's raw draw; it is replayed so,
step by step, under `keep_masks`. By default no mask remains, and the same codes come out: that is a check of its own.
B rows, N places of the picture, L places of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.attention import full as everybody
from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, close, equal, handed_to, same_passes
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.prompts import MMaDAIds, mmada_t2i
from mmdlm.sampling.denoise import Decision, Policy, Predictor, State, View, denoise
from mmdlm.sampling.draws import greedy
from mmdlm.sampling.policies import choice_decay, maskgit
from mmdlm.sampling.predictors import full, guided_together, other_canvas
from mmdlm.sampling.published import gumbel_of_places, multinomial_together, rounded_counts

DECAY = "product"  # of the choice temperature
GIVEN = torch.finfo(torch.float32).max  # what is recorded as the probability of a code that was given


def checks(case: Case) -> Iterator[Check]:
    """Per run what every pass was handed, drew, ranked and masked again, and the codes."""
    for name, arguments in case.runs.items():
        vocabulary = {"text_size": case.named_ids["text_size"], "image_size": int(arguments["codebook_size"])}
        model = load_predictor(case.directory, dtype=torch.float32, vocabulary=vocabulary)
        yield from _prompts(case, name, arguments)
        yield from _run(model, name, arguments, case.run(name))


def _prompts(case: Case, name: str, run: Mapping[str, Any]) -> Iterator[Check]:
    """The ids and masks that the recorded texts become, and those of the empty prompt."""
    tensors = case.run(name)
    texts, images = tensors["text_ids"], tensors["image_ids"]
    words = {"text": [row[row >= 0] for row in texts], "empty": [row[:0] for row in texts]}
    for kind, prefix in (("text", ""), ("empty", "uncond_")):
        if f"{prefix}input_ids" in tensors:
            made = mmada_t2i(words[kind], images, max_text_length=int(run["max_text_len"]), ids=_special(case))
            got = torch.stack([made.ids, made.valid.long()])
            recorded = torch.stack([tensors[f"{prefix}input_ids"], tensors[f"{prefix}attention_mask"]])
            yield equal(f"{name} prompt, {kind}", got, recorded)


def _special(case: Case) -> MMaDAIds:
    """The case's ids in place of the published ones."""
    names = {"bos": "bos", "eos": "eos", "mask": "mask", "soi": "<|soi|>", "eoi": "<|eoi|>", "t2i": "<|t2i|>"}
    return MMaDAIds(**{ours: case.named_ids[theirs] for ours, theirs in {**names, "left_pad": "[iPAD]"}.items()})


def _run(model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    ids, mask_id = tensors["input_ids"], int(run.get("mask_token_id", model.vocabulary.mask_id))
    places = torch.arange(ids.shape[1] - run["num_vq_tokens"] - 1, ids.shape[1] - 1)  # eoi is the last
    with handed_to(model) as handed:
        views, states = _as_released(model, ids, mask_id, places, run, tensors)
    rows = len(ids)
    yield same_passes(f"{name} passes", [both[:rows] for both in handed], tensors["step_input_ids"])
    if "step_uncond_ids" in tensors:
        yield same_passes(f"{name} unconditional", [both[rows:] for both in handed], tensors["step_uncond_ids"])

    codes = torch.stack([model.vocabulary.image_codes(view.x0) for view in views])
    yield equal(f"{name} drawn codes", codes, tensors["step_sampled_codes"])
    probabilities = torch.stack([view.confidence.masked_fill(~view.masked, GIVEN) for view in views])
    yield close(f"{name} probabilities", probabilities, tensors["step_selected_probs"], atol=1e-4)
    masked = torch.stack([state.x[:, places] == mask_id for state in states])
    yield equal(f"{name} masked again", masked, tensors["step_masking"])
    yield equal(f"{name} number masked", masked.sum(2, keepdim=True).float(), tensors["step_mask_len"])
    scale = torch.stack([float(run["temperature"]) * choice_decay(DECAY, view)[0] for view in views])
    yield close(f"{name} temperature", scale, tensors["step_temperature"], atol=1e-6)
    yield equal(
        f"{name} codes", model.vocabulary.image_codes(states[-1].x0[:, places]), tensors["final_codes"],
        note="keep_masks: a mask stays after the last round, its draw is returned",
    )  # fmt: skip
    final = _by_default(model, ids, mask_id, places, run, tensors)
    if bool((final.x == mask_id).any()):
        yield Check(f"{name} codes by default", f"{int((final.x == mask_id).sum())} masks remain", False)
    else:
        found = model.vocabulary.image_codes(final.x[:, places])
        yield equal(f"{name} codes by default", found, tensors["final_codes"], note="no mask remains")


def _as_released(
    model: MaskPredictor, ids: Tensor, mask_id: int, places: Tensor, run: Mapping[str, Any], tensors: dict[str, Tensor]
) -> tuple[list[View], list[State]]:
    """Every view and state of the loop that draws at all the picture's places, whether they are masked or not."""
    views: list[View] = []
    parts = _parts(model, ids, places, run, tensors)

    def watched(view: View) -> Decision:
        views.append(view)
        return parts["policy"](view)

    picture = torch.zeros_like(ids, dtype=torch.bool).index_fill(1, places, True)
    # revise asks the written and the given codes too; the policy writes none of them
    states = denoise(
        x=ids, editable=picture, mask_id=mask_id, revise=True, keep_masks=True, **{**parts, "policy": watched}
    )
    return views, list(states)


def _by_default(
    model: MaskPredictor, ids: Tensor, mask_id: int, places: Tensor, run: Mapping[str, Any], tensors: dict[str, Tensor]
) -> State:
    """The last state of the loop as anybody would call it: what is masked may be written, and all of it is."""
    *_, final = denoise(x=ids, editable=ids == mask_id, mask_id=mask_id, **_parts(model, ids, places, run, tensors))
    return final


def _parts(
    model: MaskPredictor, ids: Tensor, places: Tensor, run: Mapping[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """What both loops are called with."""
    random = torch.Generator()
    if run.get("generator_seed") is not None:
        random.manual_seed(int(run["generator_seed"]))
    policy: Policy = maskgit(
        choice_temperature=float(run["temperature"]),
        decay=DECAY,
        keep=rounded_counts(run["schedule"], len(places)),
        noise=gumbel_of_places(places, generator=random),
    )
    return {
        "predict": _predictor(model, ids, run, tensors),
        "policy": policy,
        "steps": int(run["timesteps"]),
        "draw": greedy if "argmax" in str(run.get("multinomial")) else multinomial_together(places, generator=random),
        "generator": [random] * len(ids),
        "first_id": model.vocabulary.image_columns[0],
    }


def _predictor(model: MaskPredictor, ids: Tensor, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Predictor:
    columns = model.vocabulary.image_columns
    seen: dict[str, Any] = {"attention_mask": everybody(tensors["attention_mask"].bool())}
    scale = float(run.get("guidance_scale") or 0)
    if scale <= 0 or "uncond_input_ids" not in tensors:
        return full(model, columns=columns, **seen)
    # The prompt is another one up to `resolution`, in fact its length; the rest follows the conditional canvas.
    shared = torch.arange(int(run["resolution"]) + 1, ids.shape[1]).expand(len(ids), -1)
    other = other_canvas(tensors["uncond_input_ids"], shared, shared)
    unseen: dict[str, Any] = {"attention_mask": everybody(tensors["uncond_attention_mask"].bool())}
    return guided_together(model, seen, unseen, scale + 1, other=other, columns=columns)  # MMaDA's w is scale - 1

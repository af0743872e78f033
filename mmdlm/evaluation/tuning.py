"""The fastest sampling preset that keeps a stated quality on somebody's own prompts or pictures: `mmdlm tune`.

Every candidate is run on all cases beside the reference, the model's own preset, in turn. Quality is 1 for the
reference and is

    tokens   captions and answers: the share of a text's tokens, its end included, that are the reference's
    prompt   pictures: how likely their prompts are, given the picture: exp of the mean over tokens of the difference in
             the bound of -log p(prompt | picture) (`mmdlm.evaluation.scoring`); 0.98 is 2 % less likely a token. A
             picture of other steps is another picture even at the same seed, so codes are no measure of how good it is
    codes    pictures: the share of codes that are the reference's at the same seed

The measure `prompt` sees what the model itself sees and no more. N cases, W places of an answer, h x w codes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.evaluation.benchmark import in_turn
from mmdlm.evaluation.reconstruction import levels, psnr
from mmdlm.evaluation.scoring import words_given_picture

MEASURES = {"draw": ("prompt", "codes"), "describe": ("tokens",), "ask": ("tokens",)}
ROWS_AT_ONCE = 8
SAMPLES = 32  # masks of a bound


class Candidate(NamedTuple):
    """`changes`: the settings of the preset that differ from the reference's."""

    name: str
    changes: Mapping[str, Any]


class Cases(NamedTuple):
    """What is to be done: `inputs` are prompts, or pictures with one `question` or none. Case n has the seed + n."""

    task: str  # draw, describe or ask, as the presets are called
    inputs: Sequence[Any]
    question: str | None = None
    seed: int = 0


class Tried(NamedTuple):
    """A candidate and what was found: seconds per case and ratios, one per pair; quality with its standard error."""

    candidate: Candidate
    seconds: list[float]
    ratios: list[float]
    quality: float
    error: float
    psnr: float | None = None  # of drawn pictures to the reference's, dB


def candidates_of(task: str, preset: Mapping[str, Any]) -> list[Candidate]:
    """Fewer steps and caches; for words as many tokens at once as are sure, for pictures guidance on part of the steps
    or none. What the preset has already of these is no candidate's change."""
    steps = int(preset["num_inference_steps"] or preset.get("answer_length", 1))
    fewer = sorted({max(1, round(steps * share)) for share in (0.75, 0.5, 0.375, 0.25, 0.125)} - {steps}, reverse=True)
    found = [Candidate(f"{count} steps", {"num_inference_steps": count}) for count in fewer]
    if task == "draw":
        ways: list[tuple[str, dict[str, Any]]] = [("image_cache", {"cache": {"name": "image_cache"}})]
        if preset["guidance_scale"] != 1:
            # after half of the steps cos(pi/4) = 0.71 of the codes are masked
            ways += [("guidance in the first half", {"guidance_interval": [0.7, 1.0]}),
                     ("no guidance", {"guidance_scale": 1.0})]  # fmt: skip
        for name, changes in ways:
            found += [
                Candidate(f"{count} steps, {name}", {"num_inference_steps": count, **changes})
                for count in [steps, *fewer[:4]]
            ]
        return found
    for tau in (0.95, 0.9, 0.8, 0.7, 0.5):
        # at most a pass for each place: the threshold ends it before
        rule = {"num_inference_steps": preset["answer_length"], "policy": {"name": "threshold", "tau": tau}}
        found.append(Candidate(f"threshold {tau:g}", rule))
        found.append(Candidate(f"threshold {tau:g}, dual_cache", {**rule, "cache": {"name": "dual_cache"}}))
    return found


def try_candidates(
    pipe: Any,
    cases: Cases,
    candidates: Sequence[Candidate],
    *,
    measure: str,
    pairs: int,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Tried]:
    """The reference, first, and every candidate. InputError for a measure of another task."""
    if measure not in MEASURES[cases.task]:
        raise InputError(f"--measure is {measure!r}, expected {' or '.join(MEASURES[cases.task])} for this task.")
    everything = [Candidate("the preset as it is", {}), *candidates]
    outputs, quality = [], []
    for candidate in everything:
        progress(candidate.name)
        outputs.append(run(pipe, cases, candidate.changes))
        quality.append(_quality(pipe, cases, outputs[-1], outputs[0], measure))

    def timer(candidate: Candidate) -> Callable[[], float]:
        def timed() -> float:
            started = time.perf_counter()
            run(pipe, cases, candidate.changes)
            return (time.perf_counter() - started) / len(cases.inputs)

        return timed

    progress("timing")
    reference, others = in_turn(timer(everything[0]), [timer(candidate) for candidate in candidates], pairs)
    times = [[(one, one) for one in reference], *others]
    return [
        Tried(candidate, [own for _, own in pair], [beside / own for beside, own in pair],
              float(found.mean()), float(found.std() / len(found) ** 0.5) if len(found) > 1 else 0.0,
              _psnr(output, outputs[0]) if cases.task == "draw" else None)
        for candidate, pair, found, output in zip(everything, times, quality, outputs, strict=True)
    ]  # fmt: skip


def fastest(tried: Sequence[Tried], keep: float) -> Tried:
    """The candidate of the highest median ratio whose quality is at least `keep`; the reference if none is faster."""
    fine = [one for one in tried if one.quality >= keep or not one.candidate.changes]
    return max(fine, key=lambda one: median(one.ratios))


def run(pipe: Any, cases: Cases, changes: Mapping[str, Any]) -> list[Any]:
    """The pipeline's outputs of all cases, a few at once, under the task's preset with `changes`."""
    before = pipe.presets[cases.task]
    pipe.presets[cases.task] = {**before, **changes}
    outputs = []
    try:
        for start in range(0, len(cases.inputs), ROWS_AT_ONCE):
            batch = list(cases.inputs[start : start + ROWS_AT_ONCE])
            chances = [torch.Generator().manual_seed(cases.seed + start + row) for row in range(len(batch))]
            if cases.task == "draw":
                outputs.append(pipe(batch, generator=chances, output_type="pt"))
            else:
                outputs.append(pipe(batch, cases.question, generator=chances))
    finally:
        pipe.presets[cases.task] = before
    return outputs


def equal_tokens(ids: Tensor, reference: Tensor, end: int) -> Tensor:
    """The share of equal tokens [N] of answers [N, W], up to and with the later of both texts' ends."""
    within = torch.zeros_like(ids, dtype=torch.bool)
    for part in (ids, reference):
        ended = (part == end).long()
        within |= ended.cumsum(dim=1) - ended == 0
    return ((ids == reference) & within).sum(dim=1).double() / within.sum(dim=1)


def _quality(pipe: Any, cases: Cases, outputs: Sequence[Any], reference: Sequence[Any], measure: str) -> Tensor:
    """Of each case, float64 [N]."""
    if measure == "tokens":
        ids, truth = (torch.cat([output.ids for output in part]) for part in (outputs, reference))
        return equal_tokens(ids, truth, pipe.processor.vocabulary.eos_id)
    codes, truth = (torch.cat([output.codes for output in part]) for part in (outputs, reference))
    if measure == "codes":
        return (codes == truth).flatten(1).double().mean(dim=1)
    if codes.equal(truth):
        return torch.ones(len(codes), dtype=torch.float64)
    own, first = (
        words_given_picture(pipe, list(cases.inputs), part, samples=SAMPLES, seed=cases.seed).nats.double()
        for part in (codes, truth)
    )
    count = torch.tensor([len(pipe.processor.text_ids(prompt)) + 1 for prompt in cases.inputs], dtype=torch.float64)
    return ((first - own) / count).exp()


def _psnr(outputs: Sequence[Any], reference: Sequence[Any]) -> float:
    """Mean over pictures; equal ones count as 99 dB."""
    own, first = (levels(torch.cat([output.images for output in part])) for part in (outputs, reference))
    return float(psnr(own, first).clamp(max=99).mean())


# ---------------------------------------------------------------- what is told


def table(tried: Sequence[Tried], keep: float, measure: str) -> str:
    """Markdown, one line for each candidate."""
    drawn = tried[0].psnr is not None
    lines = [
        f"| setting | x the preset (least to most) | s each | {measure} | {'PSNR, dB | ' if drawn else ''}kept |",
        "|---|---|---:|---|---|" + ("---|" if drawn else ""),
    ]
    for one in tried:
        ratio = f"{median(one.ratios):.2f} ({min(one.ratios):.2f} to {max(one.ratios):.2f})"
        beside = "" if one.psnr is None else f"{one.psnr:.1f} | "
        quality = f"{one.quality:.4f} +- {one.error:.4f}"
        lines.append(f"| {one.candidate.name} | {ratio} | {median(one.seconds):.3g} | {quality} | {beside}"
                     f"{'yes' if one.quality >= keep else 'no'} |")
    return "\n".join(lines)

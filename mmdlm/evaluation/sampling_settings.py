"""How a workload is sampled: the exact levers one by one, the caches, guidance on part of the steps, fewer steps.

One `Sampling` is a setting of the benchmark, a candidate of `mmdlm tune`, a point of `eval/curve.py`. All run the
library's one loop; only what the predictor is wrapped from differs.

B rows, L places, W asked places, E editable places of a row, V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdlm.evaluation.bench_workloads import Rows, Workload
from mmdlm.models.fused import fuse_projections, unfuse_projections
from mmdlm.sampling.caches import cached_from_config
from mmdlm.sampling.denoise import Predictor, State, denoise
from mmdlm.sampling.guidance_interval import within
from mmdlm.sampling.policies import ADAPTIVE, draw_from_config, policy_from_config
from mmdlm.sampling.predictors import full, guided, other_canvas


class Levers(NamedTuple):
    """The exact levers that a workload is sampled with: each leaves the tokens as they are."""

    head: bool = True  # the head at masked places and their modality's columns; False: everywhere, then cut out
    tight: bool = True  # rows without padding and without a mask where none is needed; False: as published
    hidden: bool = True  # guidance combined before the head, the first unprompted row for all; needs head
    narrow: bool = True  # the last layer's queries and MLP only where logits are read; needs head
    kept: bool = True  # that row computed once for a model, not once a run; needs hidden
    fused: bool = False  # q, k, v and gate, up in one product each; `fitted` does it to the model; pays on a GPU
    compiled: bool = False  # torch.compile of the forward


PLAIN = Levers(False, False, False, False, False, False)  # the library's loop with none of them


@dataclass(frozen=True)
class Sampling:
    """A way to sample; what is None comes from the workload.

    guidance: (low, high), the shares of masked places between which there is guidance, see `within`. cache: {"name":
    ..., **settings}. `steps` is as many as needed where the policy finds that out itself.
    """

    steps: int | None = None
    policy: Mapping[str, Any] | None = None
    draw: Mapping[str, Any] = field(default_factory=lambda: {"name": "greedy"})
    scale: float | None = None
    guidance: tuple[float, float] = (0.0, 1.0)
    block: int | None = None
    cache: Mapping[str, Any] | None = None
    levers: Levers = field(default_factory=Levers)


def states(
    model: nn.Module,
    work: Workload,
    sampling: Sampling,
    *,
    generator: list[torch.Generator] | None = None,
    kept: dict[str, Any] | None = None,
) -> Iterator[State]:
    """The loop over a workload: a State after every pass. InputError for settings that cannot be.

    `kept`: what runs with the same model may share. The model has to be `fitted` to the levers before.
    """
    policy = dict(sampling.policy or {"name": "maskgit" if work.task == "t2i" else "top_k"})
    steps = None if policy["name"] in ADAPTIVE and sampling.steps is None else sampling.steps or work.steps
    rows = work.rows if sampling.levers.tight else work.padded
    return denoise(
        predictor(model, work, sampling, steps or work.tokens, {} if kept is None else kept),
        rows.canvas.ids,
        policy_from_config(policy),
        editable=rows.canvas.editable,
        mask_id=work.mask_id,
        steps=steps,
        block=sampling.block or work.block,
        draw=draw_from_config(sampling.draw),
        generator=generator,
        first_id=work.columns[0],
    )


def sampled(model: nn.Module, work: Workload, sampling: Sampling, **chance: Any) -> Iterator[Tensor]:
    """`states` as the editable ids [B, E] after every pass, masks included."""
    editable = (work.rows if sampling.levers.tight else work.padded).canvas.editable
    for state in states(model, work, sampling, **chance):
        yield state.x[editable].view(len(state.x), -1)


def fitted(model: nn.Module, levers: Levers) -> None:
    """Fuses the model's projections, or takes them apart again, as `levers` has it; weights are the same."""
    (fuse_projections if levers.fused else unfuse_projections)(model)


def predictor(model: nn.Module, work: Workload, sampling: Sampling, steps: int, kept: dict[str, Any]) -> Predictor:
    """The workload's predictor: one branch, or two with guidance. `kept`: one per model, see `guided`."""
    levers, scale = sampling.levers, work.scale if sampling.scale is None else sampling.scale
    rows, others = (work.rows, work.without) if levers.tight else (work.padded, work.padded_without)
    with_prompt = _branch(model, rows, work, sampling, steps)
    if scale == 1 or others is None:
        return with_prompt
    both = guided(
        with_prompt,
        _branch(model, others, work, sampling, steps),
        scale,
        other=other_canvas(others.canvas.ids, rows.places(), others.places()),
        combine="hidden" if levers.hidden else "logits",
        kept=kept if levers.kept else None,
    )
    return within(both, with_prompt, sampling.guidance, editable=rows.canvas.editable, mask_id=work.mask_id)


def _branch(model: nn.Module, rows: Rows, work: Workload, sampling: Sampling, steps: int) -> Predictor:
    levers, canvas = sampling.levers, rows.canvas
    inputs: dict[str, Any] = {"attention_mask": rows.mask, "position_ids": canvas.positions, "grid": canvas.grid}
    if sampling.cache is not None:
        return cached_from_config(sampling.cache, model, steps=steps, columns=work.columns, **inputs)
    if levers.head:
        return full(model, columns=work.columns, narrow=levers.narrow, compile=levers.compiled, **inputs)
    return everywhere(model, work.columns, **inputs)


def everywhere(model: nn.Module, columns: tuple[int, int], **inputs: Any) -> Predictor:
    """`full`'s slow twin: the head over the whole vocabulary at every place, and then what was asked for."""
    start, stop = columns

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        with torch.no_grad():
            logits = model(ids, **inputs).logits
        return logits.gather(1, where.unsqueeze(-1).expand(*where.shape, logits.shape[-1]))[..., start:stop]

    return predict

"""Predictors: a model, wrapped until it is a callable (ids [B, L], where [B, W]) -> logits [B, W, V].

They compose, `guided(restricted(full(model)), ...)`, and the loop knows none of them. Guidance has one convention
everywhere: logits = unconditional + scale * (conditional - unconditional), so that scale 1 is no guidance and scale 0
the unconditional model (LLaDA's and MMaDA's w is scale - 1; classifier-free guidance, arXiv:2207.12598).

Logits are linear in the hidden states that the head reads, so guidance weighs those and runs the head once, wherever
its branches are heads of one model (`Headed`, which `full` makes).

Shape letters: B rows, L positions, W asked places, V columns of the logits, D width, E places that two canvases share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.models.weights import WeightsState, weights_that_decide
from mmdlm.sampling.denoise import Predictor

# (ids [B, L], where [B, W]) of the conditional canvas -> those of the unconditional one, [B, L'] and [B, W]
Other = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Headed:
    """A predictor that is the head of a model, for some columns, on hidden states that it also gives by themselves.

    hidden: (ids [B, L], where [B, W]) -> [B, W, D]. logits: what calling it does, if that is no two steps. alone: the
    hidden states of rows that all are the first one, for which only that is computed: [1, W, D].
    """

    def __init__(
        self,
        model: nn.Module,
        hidden: Predictor,
        columns: tuple[int, int] | None,
        *,
        logits: Predictor | None = None,
        inputs: Sequence[Tensor | None] = (),
        alone: Predictor | None = None,
    ) -> None:
        self.model, self.hidden, self.columns = model, hidden, columns
        self.inputs, self.alone, self._logits = inputs, alone, logits

    def __call__(self, ids: Tensor, where: Tensor) -> Tensor:
        return self.head(self.hidden(ids, where)) if self._logits is None else self._logits(ids, where)

    def head(self, hidden: Tensor) -> Tensor:
        """[B, W, D] -> logits [B, W, V]."""
        with torch.no_grad():
            rows: Tensor = cast(Any, self.model).head_rows(self.columns)
            return hidden.to(rows) @ rows.T


def full(
    model: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
    narrow: bool = True,
    compile: bool = False,
) -> Headed:
    """One forward of the whole canvas; the head runs at the asked places, for the ids [start, stop) of `columns` only.

    With `columns` pass `first_id=columns[0]` to denoise. The tensors and `narrow` are the model's own, for the same
    rows.

    `compile`: the step through torch.compile, with CUDA graphs on a GPU, for which it is meant. The first step of every
    new shape is compiled, which takes half a minute or more; so that shapes stay the same, places are asked in a fixed
    number (the widest so far, filled up), and the last layer runs whole. Worth it for long runs of one shape.
    """
    inputs = attention_mask, position_ids, grid
    every = _forward(model, inputs, narrow=narrow, compile=compile)

    def hidden(ids: Tensor, where: Tensor) -> Tensor:
        return cast(Tensor, every(ids, where, (0, 0)).hidden)[:, : where.shape[1]]

    def logits(ids: Tensor, where: Tensor) -> Tensor:
        return cast(Tensor, every(ids, where, columns).logits)[:, : where.shape[1]]

    def alone(ids: Tensor, where: Tensor) -> Tensor:
        one = _forward(model, [part if part is None else part[:1] for part in inputs], narrow=narrow, compile=compile)
        return cast(Tensor, one(ids[:1], where[:1], (0, 0)).hidden)[:, : where.shape[1]]

    return Headed(model, hidden, columns, logits=logits, inputs=inputs, alone=alone)


def _forward(
    model: nn.Module, inputs: Sequence[Tensor | None], *, narrow: bool, compile: bool
) -> Callable[[Tensor, Tensor, tuple[int, int] | None], Any]:
    """The model over one canvas: what does not change from pass to pass is computed in the first."""
    attention_mask, position_ids, grid = inputs
    fixed: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": position_ids, "grid": grid}
    step: Callable[..., Any] = model
    if not narrow:
        fixed["narrow"] = False
    if compile:
        on_gpu = next(model.parameters()).is_cuda
        step = torch.compile(model.forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)
    fold_once = getattr(model, "fold_once", None)
    widest = 0

    def forward(ids: Tensor, where: Tensor, columns: tuple[int, int] | None) -> Any:
        nonlocal fold_once, widest
        if fold_once is not None:
            fixed["folding"], fold_once = fold_once(grid), None
        if compile:
            widest = max(widest, where.shape[1])
            where = F.pad(where, (0, widest - where.shape[1]))
        with torch.no_grad():
            out = step(ids, where=where, columns=columns, **fixed)
        # a CUDA graph writes its next answer into the same memory
        return type(out)(**{name: part.clone() for name, part in out.items()}) if compile else out

    return forward


def restricted(
    predict: Predictor, kind: Tensor, ranges: Sequence[tuple[int, int]], *, first_id: int = 0
) -> Predictor:
    """Each place may only become an id of its own kind: the rest of its columns are -inf.

    `kind` [B, L] indexes `ranges`, [start, stop) of ids each (a canvas's modality and the vocabulary's text and image
    columns). For batches and canvases that mix modalities. The head of a `Headed` runs at every place for the ids of
    its own kind only; of any other predictor the rest is shut afterwards, which is the slow twin. `first_id`: the id of
    `predict`'s first column. ValueError for a range that a head has no column of.
    """
    if isinstance(predict, Headed):
        return _head_by_kind(predict, kind, ranges)
    bounds = torch.tensor(list(ranges), device=kind.device)[kind]  # [B, L, 2]

    def predict_restricted(ids: Tensor, where: Tensor) -> Tensor:
        logits = predict(ids, where)
        start, stop = bounds.gather(1, where.unsqueeze(-1).expand(*where.shape, 2)).unsqueeze(-2).unbind(-1)
        column = torch.arange(first_id, first_id + logits.shape[-1], device=logits.device)
        return logits.masked_fill((column < start) | (column >= stop), -torch.inf)

    return predict_restricted


def _head_by_kind(predict: Headed, kind: Tensor, ranges: Sequence[tuple[int, int]]) -> Predictor:
    model: Any = predict.model
    first, end = predict.columns or (0, model.vocabulary.table_rows)
    own = [(max(start, first), min(stop, end)) for start, stop in ranges]
    if any(start >= stop for start, stop in own):
        raise ValueError(f"the head has the ids {first} to {end}, none of a range of {list(ranges)}: ask it for more")

    def predict_by_kind(ids: Tensor, where: Tensor) -> Tensor:
        hidden, kind_of = predict.hidden(ids, where), kind.gather(1, where)
        with torch.no_grad():
            for number, (start, stop) in enumerate(own):
                rows, here = model.head_rows((start, stop)), kind_of == number
                if number == 0:
                    logits = torch.full((*where.shape, end - first), -torch.inf, dtype=rows.dtype, device=rows.device)
                logits[..., start - first : stop - first][here] = hidden[here].to(rows) @ rows.T
        return logits

    return predict_by_kind


def other_canvas(unconditional: Tensor, places_conditional: Tensor, places_unconditional: Tensor) -> Other:
    """The unconditional canvas of a conditional one: `unconditional` [B, L'] with the shared places copied into it.

    The shared places, [B, E] in each canvas, are those the loop may write (and any others to be equal), in the same
    order. The canvases may differ in length and in everything else, such as the prompt. A row that shares fewer than
    E places repeats one of its own pairs.
    """
    if places_conditional.shape != places_unconditional.shape:
        raise ValueError(
            f"places are {tuple(places_conditional.shape)} in the conditional and {tuple(places_unconditional.shape)} "
            "in the unconditional canvas: pass them in pairs"
        )

    def other(ids: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        copied = unconditional.scatter(1, places_unconditional, ids.gather(1, places_conditional))
        there = torch.zeros_like(ids).scatter(1, places_conditional, places_unconditional)
        return copied, there.gather(1, where)

    return other


def masked_prompt(prompt: Tensor, mask_id: int) -> Other:
    """The unconditional canvas of LLaDA and of MMaDA's text, arXiv:2410.18514: `prompt` [B, L] bool all masked.

    Places that a growing canvas gained behind the L (`mmdlm.sampling.lengths`) are no prompt.
    """

    def other(ids: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        return ids.masked_fill(F.pad(prompt, (0, ids.shape[1] - prompt.shape[1])), mask_id), where

    return other


def guided(
    conditional: Predictor,
    unconditional: Predictor,
    scale: float | Tensor,
    *,
    other: Other,
    combine: str = "hidden",
    kept: dict[str, Any] | None = None,
) -> Predictor:
    """Classifier-free guidance in two calls: unconditional + scale * (conditional - unconditional).

    `scale`: one, or one per row [B]. `other` makes the unconditional canvas: `other_canvas`, `masked_prompt`.
    combine: "hidden", two heads of one model and the same columns are weighed before the head, which runs once;
    "logits", its slow twin and what any other predictors get, after it.

    With "hidden", where all rows of the first unconditional canvas are alike (masks, and no prompts), one of them is
    computed. `kept`: a dictionary in which that row stays for later runs, until another is asked for or the model's
    weights change. Adapters keep this off.
    """
    _check_combine(combine)
    if combine == "hidden" and isinstance(conditional, Headed) and isinstance(unconditional, Headed):
        model, columns = conditional.model, conditional.columns
        if unconditional.model is model and unconditional.columns == columns:
            hidden = guided(conditional.hidden, _first_alike(unconditional, kept), scale, other=other)
            return Headed(model, hidden, columns)

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        return guide(conditional(ids, where), unconditional(*other(ids, where)), scale)

    return predict


def guided_by_each(
    conditional: Predictor, unconditional: Sequence[tuple[Predictor, float | Tensor, Other]]
) -> Predictor:
    """Guidance away from several canvases: conditional + sum of (scale - 1) * (conditional - unconditional) over them.

    With one it is `guided`. InstructPix2Pix' two scales are another rule; this is Lumina-DiMOO's for a picture made
    from a picture (arXiv:2510.06308): one canvas without the text and one without the picture. Each `scale` as there.
    """

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        with_all = conditional(ids, where)
        with_all = with_all if with_all.dtype == torch.float64 else with_all.float()
        total = with_all
        for branch, scale, other in unconditional:
            weight = scale.view(-1, 1, 1) - 1 if isinstance(scale, Tensor) else scale - 1
            total = total + weight * (with_all - branch(*other(ids, where)).to(with_all))
        return total.masked_fill(with_all == -torch.inf, -torch.inf)

    return predict


def guided_together(
    model: nn.Module,
    conditional: Mapping[str, Tensor | None],
    unconditional: Mapping[str, Tensor | None],
    scale: float | Tensor,
    *,
    other: Other,
    columns: tuple[int, int] | None = None,
    combine: str = "hidden",
    narrow: bool = True,
    compile: bool = False,
) -> Predictor:
    """`guided` in one forward of 2B rows, the conditional ones first; equal to it but for rounding.

    `conditional` and `unconditional` are the keywords of `full` for each canvas: attention_mask (bool, True = may be
    seen, [B, L] or [B, 1, 1, L]), position_ids [B, L], grid [B, L, 2]. The shorter canvas is padded on the right and
    nobody sees its padding. ValueError for an attention mask of another shape: take `guided` for it.

    combine: "hidden", the branches are weighed before the head, which runs once; "logits", its slow twin, after it.
    narrow, compile: as in `full`.
    """
    _check_combine(combine)
    both: Headed | None = None
    lengths: tuple[int, int] | None = None

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        nonlocal both, lengths
        ids_other, where_other = other(ids, where)
        if both is None or lengths != (ids.shape[1], ids_other.shape[1]):  # the rest does not depend on the ids
            lengths = ids.shape[1], ids_other.shape[1]
            both = full(model, **_stack(ids, conditional, ids_other, unconditional), columns=columns, narrow=narrow,
                        compile=compile)
        found = (both.hidden if combine == "hidden" else both)(
            _join(ids, ids_other, 0), torch.cat([where, where_other]))
        return guide(found[: len(ids)], found[len(ids) :], scale)

    return predict if combine == "logits" else Headed(model, predict, columns)


def _first_alike(predict: Headed, kept: dict[str, Any] | None) -> Predictor:
    """The hidden states of `predict`; of one row only, or from `kept`, where all rows of the first call are alike."""
    fresh = True

    def hidden(ids: Tensor, where: Tensor) -> Tensor:
        nonlocal fresh
        asked = [ids, where, *predict.inputs]
        # adapters may differ from row to row
        if not fresh or predict.alone is None or hasattr(predict.model, "peft_config") or not all(
            part is None or bool((part == part[:1]).all()) for part in asked
        ):
            fresh = False
            return predict.hidden(ids, where)
        fresh = False
        weights = None if kept is None else weights_that_decide(predict.model)
        if kept is None or weights is None:
            return predict.alone(ids, where).expand(len(ids), -1, -1)
        question = [None if part is None else part[:1] for part in asked]
        known = kept.get("first")
        if not (known and known[0].holds(weights) and all(map(_same, known[1], question))):
            # in one piece, for threads that share it
            known = kept["first"] = WeightsState(weights), question, predict.alone(ids, where)
        answer: Tensor = known[2]
        return answer.expand(len(ids), -1, -1)

    return hidden


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else a.device == b.device and torch.equal(a, b)


def _check_combine(combine: str) -> None:
    if combine not in ("hidden", "logits"):
        raise InputError(f"combine is {combine!r}, expected 'hidden' or 'logits': change combine")


def guide(conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
    """unconditional + scale * (conditional - unconditional), of logits of one shape; float32 or better."""
    if conditional.dtype != torch.float64:  # a difference of close numbers, multiplied: not in half precision
        conditional, unconditional = conditional.float(), unconditional.float()
    if isinstance(scale, Tensor):
        scale = scale.to(conditional).view(-1, 1, 1)
    guided_logits = unconditional + scale * (conditional - unconditional)
    # a column that is shut in both branches stays shut: -inf - -inf is no number
    return guided_logits.masked_fill(conditional == -torch.inf, -torch.inf)


def _stack(
    ids: Tensor, first: Mapping[str, Tensor | None], ids_other: Tensor, second: Mapping[str, Tensor | None]
) -> dict[str, Tensor | None]:
    """The two canvases' keywords along the rows, padded to one length; None where no tensor is needed."""
    pairs = {name: (first.get(name), second.get(name)) for name in ("attention_mask", "position_ids", "grid")}
    unknown = (first.keys() | second.keys()) - pairs.keys()
    if unknown:
        raise ValueError(f"unknown input {min(unknown)!r}: pass attention_mask, position_ids or grid")

    stacked: dict[str, Tensor | None] = dict.fromkeys(pairs)
    seen = [_seen(i, mask) for i, mask in zip((ids, ids_other), pairs["attention_mask"], strict=True)]
    if ids.shape[1] != ids_other.shape[1] or any(mask is not None for mask in pairs["attention_mask"]):
        stacked["attention_mask"] = _join(seen[0], seen[1], 0)[:, None, None, :]
    if any(positions is not None for positions in pairs["position_ids"]):
        a, b = (torch.arange(i.shape[1], device=i.device).expand_as(i) if positions is None else positions
                for i, positions in zip((ids, ids_other), pairs["position_ids"], strict=True))
        stacked["position_ids"] = _join(a, b, 0)
    if any(grid is not None for grid in pairs["grid"]):
        a, b = (i.new_full((*i.shape, 2), -1) if grid is None else grid
                for i, grid in zip((ids, ids_other), pairs["grid"], strict=True))
        stacked["grid"] = _join(a, b, -1)
    return stacked


def _seen(ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape not in (ids.shape, (ids.shape[0], 1, 1, ids.shape[1])):
        raise ValueError(f"attention_mask is {mask.dtype} {tuple(mask.shape)} for ids {tuple(ids.shape)}: pass bool "
                         "[B, L] or [B, 1, 1, L], or take guided() where the mask differs from query to query")
    return mask.view(ids.shape)


def _join(a: Tensor, b: Tensor, fill: int) -> Tensor:
    """[B, L, ...] and [B, L', ...] along the rows, the shorter one filled up on the right."""
    length = max(a.shape[1], b.shape[1])
    rows = torch.full((len(a) + len(b), length, *a.shape[2:]), fill, dtype=a.dtype, device=a.device)
    rows[: len(a), : a.shape[1]] = a
    rows[len(a) :, : b.shape[1]] = b
    return rows

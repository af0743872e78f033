"""Predictors: a model, wrapped until it is a callable (ids [B, L], where [B, W]) -> logits [B, W, V].

They compose, `guided(restricted(full(model)), ...)`, and the loop knows none of them. Guidance has one convention
everywhere: logits = unconditional + scale * (conditional - unconditional), so that scale 1 is no guidance and scale 0
the unconditional model (LLaDA's and MMaDA's w is scale - 1; classifier-free guidance, arXiv:2207.12598).

Shape letters: B rows, L positions, W asked places, V columns of the logits, E places that two canvases share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.sampling.denoise import Predictor

# (ids [B, L], where [B, W]) of the conditional canvas -> those of the unconditional one, [B, L'] and [B, W]
Other = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def full(
    model: nn.Module,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
) -> Predictor:
    """One forward of the whole canvas; the head runs at the asked places, for the ids [start, stop) of `columns` only.

    With `columns` pass `first_id=columns[0]` to denoise. The other tensors are the model's own, for the same rows.
    """

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        with torch.no_grad():
            return model(
                ids, attention_mask=attention_mask, position_ids=position_ids, grid=grid, where=where, columns=columns
            ).logits

    return predict


def restricted(
    predict: Predictor, kind: Tensor, ranges: Sequence[tuple[int, int]], *, first_id: int = 0
) -> Predictor:
    """Each place may only become an id of its own kind: the rest of its columns are -inf.

    `kind` [B, L] indexes `ranges`, [start, stop) of ids each (a canvas's modality and the vocabulary's text and image
    columns). For batches and canvases that mix modalities; where all asked places are of one, `full(columns=...)` does
    less work. `first_id`: the id of `predict`'s first column. ValueError where a place would be left with no column.
    """
    bounds = torch.tensor(list(ranges), device=kind.device)[kind]  # [B, L, 2]

    def predict_restricted(ids: Tensor, where: Tensor) -> Tensor:
        logits = predict(ids, where)
        start, stop = bounds.gather(1, where.unsqueeze(-1).expand(*where.shape, 2)).unsqueeze(-2).unbind(-1)
        column = torch.arange(first_id, first_id + logits.shape[-1], device=logits.device)
        return logits.masked_fill((column < start) | (column >= stop), -torch.inf)

    return predict_restricted


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


def guided(conditional: Predictor, unconditional: Predictor, scale: float | Tensor, *, other: Other) -> Predictor:
    """Classifier-free guidance in two calls: unconditional + scale * (conditional - unconditional).

    `scale`: one, or one per row [B]. `other` makes the unconditional canvas: `other_canvas`, `masked_prompt`.
    """

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
) -> Predictor:
    """`guided` in one forward of 2B rows, the conditional ones first; equal to it but for rounding.

    `conditional` and `unconditional` are the keywords of `full` for each canvas: attention_mask (bool, True = may be
    seen, [B, L] or [B, 1, 1, L]), position_ids [B, L], grid [B, L, 2]. The shorter canvas is padded on the right and
    nobody sees its padding. ValueError for an attention mask of another shape: take `guided` for it.
    """

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        ids_other, where_other = other(ids, where)
        inputs = _stack(ids, conditional, ids_other, unconditional)
        both = full(model, **inputs, columns=columns)(_join(ids, ids_other, 0), torch.cat([where, where_other]))
        return guide(both[: len(ids)], both[len(ids) :], scale)

    return predict


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

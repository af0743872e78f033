"""Predictors that keep keys and values between passes: prefix_cache, dual_cache, block_cache and image_cache.

    prefix_cache   Fast-dLLM, arXiv:2505.22618, 3.2    what lies before the asked places is kept            approximate
    dual_cache     Fast-dLLM, arXiv:2505.22618, 3.2    everything but the asked places is kept              approximate
    block_cache    BD3-LM, arXiv:2503.09573; SDAR      finished blocks of a block-causal model are kept     exact
    image_cache    Lumina-DiMOO, arXiv:2510.06308      the places that the last pass was sure of are kept   approximate

Each is called as any predictor, wraps a `MaskPredictor`, and belongs to one run of `denoise`: make another for the
next run. With guidance wrap the two branches each in a cache of its own, `guided(dual_cache(...), dual_cache(...))`.
A cache sees by itself when its places no longer serve, from the ids alone, and computes the whole canvas again; the
loop knows nothing of it. Rows are independent: each refreshes for itself, and a row that is done is not computed.

They need a trunk of plain attention layers, whatever else the model has (folded pictures, prediction_offset): sliding
windows and recurrent layers are an InputError. Padding is hidden by `attention_mask`, which flash attention does not
take here; with sdpa and eager attention it may be any mask.

Shape letters: B rows, L positions, W asked places, V columns of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.sampling.cached_predictor import CachedPredictor, Pass, Rule, unfinished


def prefix_cache(
    model: nn.Module,
    *,
    refresh_interval: int | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
) -> CachedPredictor:
    """Keeps everything before the asked places; from the first of them on all is computed in each pass.

    The whole canvas is computed when places are asked that were not asked at the last refresh (a new block: that pass
    counts as any other, its logits are used), when an id changed that is kept, and after `refresh_interval` >= 1 passes
    (1: in each, which is the uncached loop). The other tensors are those of `full`.
    """
    rule = _keep_outside(lambda asked: asked.long().cumsum(dim=1) > 0, refresh_interval)
    return CachedPredictor(model, rule, attention_mask, position_ids, grid, columns)


def dual_cache(
    model: nn.Module,
    *,
    refresh_interval: int | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
) -> CachedPredictor:
    """Keeps everything but the asked places of the present block, before and after them; refreshed as `prefix_cache`.

    `refresh_interval` >= 1, 1 being the uncached loop. The other tensors are those of `full`.
    """
    rule = _keep_outside(lambda asked: asked, refresh_interval)
    return CachedPredictor(model, rule, attention_mask, position_ids, grid, columns)


def block_cache(
    model: nn.Module,
    *,
    block: int | Tensor | None = None,
    apart: bool = False,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
    columns: tuple[int, int] | None = None,
) -> CachedPredictor:
    """Keeps the blocks before the present one: exact for a model that sees its own and earlier blocks only.

    It gives what `full(model, attention_mask=attention.block_causal(block))` gives. A block is computed once more when
    it is finished, for it last saw itself with masks: together with the next block's first pass, or `apart` from it in
    a pass of its own (as SDAR's and Fast-dLLM v2's programs do, which costs a forward per block). So is a prompt's.

    `block`: length of a block, counted from position 0, or the index of each position's block, [B, L], never falling;
    default the model's own. `attention_mask`: bool [B, 1, 1 or L, L], what else is hidden, such as padding. The other
    tensors are those of `full`. InputError for a model that is not block-causal where no `block` is given.
    """
    config: Any = model.config
    if block is None:
        block = int(config.block_length)
    if not isinstance(block, Tensor) and block < 1:
        raise InputError(
            f"block is {block}, expected 1 or more: block_cache is for models that see no later blocks; use dual_cache "
            "for another, or give the block length that the model was trained with"
        )
    if isinstance(block, Tensor) and bool((block.diff(dim=1) < 0).any()):
        raise InputError("block has indices that fall from one position to the next: number the blocks in their order")
    return CachedPredictor(model, _keep_finished(apart), attention_mask, position_ids, grid, columns, block=block)


def image_cache(
    model: nn.Module,
    *,
    steps: int,
    columns: tuple[int, int],
    cache_ratio: float = 0.9,
    refresh_interval: int = 5,
    warmup_ratio: float = 0.3,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    grid: Tensor | None = None,
) -> CachedPredictor:
    """Keeps the places whose best logit among `columns` was highest in the last pass: the share `cache_ratio` of the
    row. The others are computed, wherever they lie; the kept ones' logits are those of the pass that computed them.

    In the manner of Lumina-DiMOO's ML-Cache (arXiv:2510.06308). All is computed in the first passes, up to pass
    floor(steps * warmup_ratio) counted from 0, and then in every `refresh_interval`-th. `cache_ratio` 0 or
    `refresh_interval` 1 is the uncached loop. Makes the most sense for a picture in one block. InputError for ratios
    outside [0, 1], and for steps or an interval below 1.
    """
    for name, share in (("cache_ratio", cache_ratio), ("warmup_ratio", warmup_ratio)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} is {share}, expected a share in [0, 1]: change {name}")
    for name, count in (("steps", steps), ("refresh_interval", refresh_interval)):
        if count < 1:
            raise InputError(f"{name} is {count}, expected 1 or more: change {name}")
    if columns[1] <= columns[0]:
        raise InputError(f"columns is {columns}, expected the range of the image ids: this model has none, use full()")
    best: list[Tensor] = []  # of the last pass
    step = 0
    warm = int(steps * warmup_ratio)

    def rule(now: Pass) -> list[Tensor]:
        nonlocal step
        whole = torch.ones_like(now.asked)
        chosen = whole
        if best and best[0].shape == now.ids.shape and not (step <= warm or (step - warm) % refresh_interval == 0):
            shown = best[0] if seen is None else best[0].masked_fill(~seen, torch.nan)
            # a row of padding only has no quantile, and is done
            limit = shown.nanquantile(1 - cache_ratio, dim=1, keepdim=True)
            chosen = (best[0] <= limit) & (True if seen is None else seen)
        step += 1
        return [chosen]

    def look(logits: Tensor, rows: Tensor) -> None:
        if not best or best[0].shape != (len(rows), logits.shape[1]):
            best[:] = [logits.new_full((len(rows), logits.shape[1]), -torch.inf, dtype=torch.float32)]
        best[0][rows] = logits.amax(dim=-1).float()

    seen = None if attention_mask is None else _seen_keys(attention_mask)
    return CachedPredictor(model, rule, attention_mask, position_ids, grid, columns, look=look)


def cached_from_config(
    config: Mapping[str, Any], model: nn.Module, *, steps: int | None, **inputs: Any
) -> CachedPredictor:
    """{"name": "prefix_cache" | "dual_cache" | "block_cache" | "image_cache", **settings} -> the predictor.

    `inputs`: those of `full`; `steps`: of the run, for image_cache. Raises InputError for an unknown name or setting.
    """
    settings = dict(config)
    name = settings.pop("name", None)
    made: dict[str, Callable[..., CachedPredictor]] = {
        "prefix_cache": prefix_cache, "dual_cache": dual_cache, "block_cache": block_cache, "image_cache": image_cache,
    }
    if name not in made:
        raise InputError(f"cache is {name!r}, expected one of {', '.join(made)}.")
    allowed = set(inspect.signature(made[name]).parameters) - {"model", "steps", *inputs}
    unknown = sorted(settings.keys() - allowed)
    if unknown:
        raise InputError(f"{name} has no setting {unknown[0]!r}, expected one of {', '.join(sorted(allowed))}.")
    if name == "image_cache":
        if steps is None:
            raise InputError("image_cache needs the number of steps, which this policy finds out by itself, expected "
                             "steps: give them, or take another cache.")
        settings["steps"] = steps
    return made[name](model, **settings, **inputs)


def _keep_outside(region_of: Callable[[Tensor], Tensor], refresh_interval: int | None) -> Rule:
    """All but the region that the places asked at the last refresh make up is kept."""
    if refresh_interval is not None and refresh_interval < 1:
        raise InputError(
            f"refresh_interval is {refresh_interval}, expected 1 or more: leave it out to refresh at each block"
        )
    reach: Tensor | None = None  # [B, L] the places asked at the row's refresh
    age: Tensor | None = None  # [B] passes since then

    def rule(now: Pass) -> list[Tensor]:
        nonlocal reach, age
        if reach is None or age is None or reach.shape != now.asked.shape:
            reach, age = torch.zeros_like(now.asked), now.ids.new_zeros(len(now.ids))
        refresh = ((now.asked & ~reach) | (now.stale & ~region_of(reach))).any(dim=1)
        age = age + 1
        if refresh_interval is not None:
            refresh = refresh | (age >= refresh_interval)
        age = age.masked_fill(refresh, 0)
        reach = torch.where(refresh.unsqueeze(1), now.asked, reach)
        return [region_of(reach) | refresh.unsqueeze(1)]

    return rule


def _keep_finished(apart: bool) -> Rule:
    """Every block before the present one is kept from the pass in which none of its ids, nor of those before, was to
    change any more."""

    def rule(now: Pass) -> list[Tensor]:
        blocks = now.blocks
        assert blocks is not None
        present = blocks.masked_fill(~now.asked, 0).amax(dim=1, keepdim=True)
        missing = unfinished(blocks, now.stale, present) & now.asked.any(dim=1, keepdim=True)
        if apart and bool(missing.any()):
            return [missing, blocks == present]
        return [missing | (blocks == present)]

    return rule


def _seen_keys(attention_mask: Tensor) -> Tensor:
    """Which places anybody sees, bool [B, L]."""
    seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > torch.finfo(torch.float32).min / 2
    return seen[:, 0].any(dim=1)

"""A model with a cache of its own: what the four predictors of `mmdlm.sampling.caches` have in common.

Before each pass a rule says which places to compute; the rest of a canvas is as it was left.

Shape letters: B rows, L positions, W asked places, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm.attention import block_causal
from mmdlm.errors import InputError
from mmdlm.models.folding import Folding, fold_plan, folding
from mmdlm.models.slot_cache import SlotCache, check_cacheable


class Pass(NamedTuple):
    """What a rule may look at before a pass, [B, L] each."""

    ids: Tensor
    asked: Tensor  # bool: the places whose logits the loop wants; a row without one is done
    stale: Tensor  # bool: the id is another than when the place was last computed, or it never was
    blocks: Tensor | None  # the index of each position's block, where the cache is by blocks


# Pass -> the places to compute, bool [B, L], in one forward or in several one after the other.
Rule = Callable[[Pass], list[Tensor]]


class CachedPredictor:
    """A model and what its earlier passes left: (ids [B, L], where [B, W]) -> logits [B, W, V]; see `caches`.

    `where` is as `denoise` gives it, the asked places rising and then any others. Places outside the computed ones get
    the logits of the pass that last computed them; rows that are done get zeros.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        grid: Tensor | None,
        columns: tuple[int, int] | None,
        *,
        block: int | Tensor | None = None,
        look: Callable[[Tensor, Tensor], None] | None = None,
    ):
        self.model, self.rule, self.columns, self.look = model, rule, columns, look
        self.inputs = {"attention_mask": attention_mask, "position_ids": position_ids, "grid": grid}
        config: Any = model.config
        check_cacheable(config.trunk_config())
        self.mask_id = config.shared_vocabulary.mask_id
        self.offset, self.fold = config.prediction_offset, config.image_fold
        self.block = block
        self.cache: SlotCache | None = None
        self.blocks: Tensor | None = None  # [B, L], with `block`
        self.folding: Folding | None = None  # of the whole canvas
        self.seen: Tensor | None = None  # [B, L] the ids with which each place was last computed
        self._before: tuple[Tensor, Tensor] | None = None  # the ids and the asked places of the last call
        self._counts = dict.fromkeys(("forwards", "hits", "refreshes", "tokens", "computed", "places"), 0)

    def report(self) -> dict[str, float]:
        """What was done so far: `forwards` of the model; `hits` and `refreshes`, passes of a row that kept some places
        or computed all; `tokens_per_forward`, tokens written per pass of a row, if the last pass wrote all that it was
        asked for, as a run's last does; `computed_share`, places computed out of those of uncached passes.
        """
        counts, passes = self._counts, self._counts["hits"] + self._counts["refreshes"]
        tokens = counts["tokens"] + (int(self._open(*self._before).sum()) if self._before else 0)
        return {
            **{name: counts[name] for name in ("forwards", "hits", "refreshes")},
            "tokens_per_forward": tokens / max(passes, 1),
            "computed_share": counts["computed"] / max(counts["places"], 1),
        }

    def __call__(self, ids: Tensor, where: Tensor) -> Tensor:
        asked = _asked(ids, where, self.mask_id)
        self._begin(ids)
        if self._before is not None and self._before[0].shape == ids.shape:
            self._counts["tokens"] += int((self._open(*self._before) & (ids != self.mask_id)).sum())
        self._before = ids, asked
        return self._pass(ids, asked, where)

    def store(self, ids: Tensor) -> None:
        """`block_cache`: computes the finished blocks of ids [B, L], those before the first mask, that it lacks.

        For a canvas that goes on, such as a conversation's next turn behind this one. ValueError for another cache.
        """
        self._begin(ids)
        if self.blocks is None:
            raise ValueError("store is for block_cache: the other caches keep no finished blocks")
        beyond = int(self.blocks.max()) + 1
        present = self.blocks.masked_fill(ids != self.mask_id, beyond).amin(dim=1, keepdim=True)
        missing = unfinished(self.blocks, self._stale(ids), present)
        if bool(missing.any()):
            self._forward(ids, missing, missing.any(dim=1), ids.new_zeros(len(ids), 1))

    def _begin(self, ids: Tensor) -> None:
        """A canvas of another shape than the last: nothing that is kept serves any more."""
        if self.seen is not None and self.seen.shape == ids.shape:
            return
        # a rule without blocks always computes what is asked, which is then all that anybody reads
        reads_computed = self.block is None and self.look is None and not self.offset
        self.cache = SlotCache(len(ids), keep_hidden=not reads_computed)
        self.seen = torch.full_like(ids, -2)  # no id, nor an absent place's -1
        if isinstance(self.block, int):
            self.blocks = (torch.arange(ids.shape[1], device=ids.device) // self.block).expand_as(ids)
        elif self.block is not None:
            if self.block.shape != ids.shape:
                raise ValueError(
                    f"block is {tuple(self.block.shape)} for ids {tuple(ids.shape)}: pass an index per position"
                )
            self.blocks = self.block
        grid = self.inputs["grid"]
        self.folding = folding(grid.expand(*ids.shape, 2), self.fold) if self.fold > 1 and grid is not None else None
        if self.blocks is not None:
            _check_whole_squares(self.blocks, self.inputs["grid"], self.fold)

    def _stale(self, ids: Tensor) -> Tensor:
        assert self.seen is not None
        return self.seen != ids

    def _open(self, ids: Tensor, asked: Tensor) -> Tensor:
        return asked & (ids == self.mask_id)

    def _pass(self, ids: Tensor, asked: Tensor, where: Tensor) -> Tensor:
        active = asked.any(dim=1)
        logits: Tensor | None = None
        for computed in self.rule(Pass(ids, asked, self._stale(ids), self.blocks)):
            computed = computed & active.unsqueeze(1)
            if self.offset and self.block is None:
                # a place is read off the one before it; block_cache keeps that one's state, which is exact
                computed = computed | F.pad(computed[:, 1:], (0, 1))
            whole = computed.all(dim=1)
            self._counts["hits"] += int((active & ~whole).sum())
            self._counts["refreshes"] += int(whole.sum())
            # rows that refresh in a forward of their own: the others would be computed whole with them
            groups = (active & whole, active & ~whole) if self.block is None else (computed.any(dim=1),)
            for rows in groups:
                if bool(rows.any()):
                    part = self._forward(ids, computed, rows, where)
                    logits = part.new_zeros(*where.shape, part.shape[-1]) if logits is None else logits
                    logits[rows] = part
        if logits is None:
            raise ValueError("no place is asked in any row: call the predictor while there are masks")
        return logits

    def _forward(self, ids: Tensor, computed: Tensor, rows: Tensor, where: Tensor) -> Tensor:
        """One call of the model for the rows [B] bool: their logits at `where`."""
        assert self.cache is not None and self.seen is not None
        batch, end = ids.shape
        everyone = bool(rows.all())
        inputs = {name: None if tensor is None else tensor.expand(batch, *tensor.shape[1:])
                  for name, tensor in self.inputs.items()}
        if self.blocks is not None:
            end = int(computed.any(dim=0).nonzero().max()) + 1  # later blocks do not exist for this pass
            inputs["attention_mask"] = self._block_mask(computed, rows, end, inputs["attention_mask"])
            inputs = {name: tensor if tensor is None or name == "attention_mask" else tensor[:, :end]
                      for name, tensor in inputs.items()}
        if not everyone:
            inputs = {name: None if tensor is None else tensor[rows] for name, tensor in inputs.items()}
        self.cache.rows = None if everyone else rows.nonzero().squeeze(1)
        places = where[rows].clamp(max=end - 1)  # what fills a row up may lie in a later block: nobody reads it
        if self.look is not None:
            places = torch.arange(end, device=ids.device).expand(len(places), -1)
        plan = self.folding if end == ids.shape[1] else None
        plan = plan if plan is None or everyone else plan.rows(rows)
        mine = computed[rows, :end]
        self._counts["forwards"] += 1
        self._counts["computed"] += int(mine.sum())
        self._counts["places"] += int(rows.sum()) * ids.shape[1]
        with torch.no_grad():
            logits = self.model(
                ids[rows, :end], **inputs, where=places, columns=self.columns, cache=self.cache, computed=mine,
                folding=plan,
            ).logits
        self.seen = torch.where(computed & rows.unsqueeze(1), ids, self.seen)
        if self.look is None:
            return logits
        self.look(logits, rows)
        return logits.gather(1, where[rows].unsqueeze(-1).expand(-1, -1, logits.shape[-1]))

    def _block_mask(self, computed: Tensor, rows: Tensor, end: int, hidden: Tensor | None) -> Tensor | None:
        """The block-causal mask [B, 1, end, end]; None where all rows compute the last block of what they see."""
        assert self.blocks is not None
        blocks = self.blocks[:, :end]
        first = blocks.masked_fill(~computed[:, :end], int(blocks.max()) + 1).amin(dim=1, keepdim=True)
        if hidden is None and bool((blocks <= first)[rows].all()):
            return None
        mask = block_causal(blocks)
        if hidden is None:
            return mask
        if hidden.dtype != torch.bool:
            raise InputError(f"attention_mask is {hidden.dtype}, expected bool for block_cache: pass True where seen")
        return mask & (hidden[..., :end] if hidden.shape[2] == 1 else hidden[:, :, :end, :end])


def unfinished(blocks: Tensor, stale: Tensor, present: Tensor) -> Tensor:
    """Places before the block `present` [B, 1] that are to be computed again, bool [B, L].

    A block has seen those before it: from the first stale one on all are.
    """
    stale_from = blocks.masked_fill(~stale, int(blocks.max()) + 1).amin(dim=1, keepdim=True)
    return (blocks >= stale_from) & (blocks < present)


def _asked(ids: Tensor, where: Tensor, mask_id: int) -> Tensor:
    """The places of `where` that are asked, bool [B, L]: they rise, what fills the row up starts again from the left.

    A row that begins at position 0 may be filling from its start, or go on from asked places to filling without a fall:
    there only masks count as asked.
    """
    rising = F.pad(where[:, 1:] > where[:, :-1], (1, 0), value=True).long().cumprod(dim=1).bool()
    mine = rising & ((where[:, :1] > 0) | (ids.gather(1, where) == mask_id))
    return torch.zeros_like(ids).scatter_add(1, where, mine.long()) > 0


def _check_whole_squares(blocks: Tensor, grid: Tensor | None, side: int) -> None:
    """InputError where a block ends inside a square of folded image tokens, which are one place of the trunk."""
    if side == 1 or grid is None:
        return
    group = fold_plan(grid, side)[2]
    low = torch.zeros_like(blocks).scatter_reduce(1, group, blocks, "amin", include_self=False)
    high = torch.zeros_like(blocks).scatter_reduce(1, group, blocks, "amax", include_self=False)
    if bool((low != high).any()):
        raise InputError(
            f"a block ends inside a square of {side} x {side} folded image tokens, expected whole squares: let the "
            "picture be one block"
        )

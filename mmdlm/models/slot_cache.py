"""Keys and values kept from pass to pass, one slot for every place of the trunk.

transformers' caches append, because an autoregressive model only ever adds places at its end. A mask predictor writes
anywhere, so here a pass overwrites the slots of the places it computes and reads all the others as they were left.
Keys are stored rotated: a place's position never changes, and rotating it again in every pass would give the same bits.

Shape letters: B rows of the canvas, b rows of a pass, M slots, Q computed slots, H heads, d their width, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mmdlm.errors import InputError


class SlotCache(Cache):
    """A transformers cache with a slot for every place, for `MaskPredictor.forward(cache=...)`.

    Args:
        batch: rows of the canvas.
        keep_hidden: False where every pass reads places that it computes, and those only: the last layer may then leave
            out the others, and `hidden` stays empty.

    `rows`: the rows of the next pass, int64 [b], or None for all of them. `hidden`: the trunk's output at every slot,
    [B, M, D]. Slots that were never computed hold zeros: hide them, or compute them first.
    """

    def __init__(self, batch: int, *, keep_hidden: bool = True):
        super().__init__(layers=[])
        self.batch, self.keep_hidden = batch, keep_hidden
        self.rows: Tensor | None = None
        self.hidden: Tensor | None = None
        self.length = 0  # slots that this pass sees
        self._slots: Tensor | None = None
        self._rank: Tensor | None = None
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def open(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, computed: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Begins a pass over a canvas, which may have grown: its inputs for all slots -> for the computed ones.

        hidden [b, M, D], attention_mask [b, 1, 1 or M, M] and position_ids [b, M] or None; `computed` bool [b, M], at
        least one True per row, or None for all. Rows with fewer than the widest repeat their first one: it is computed
        twice alike, and so a row does not depend on its neighbours. The keys of the mask stay all slots.
        """
        batch, self.length, width = hidden.shape
        self._slots = self._rank = None
        if computed is None or bool(computed.all()):
            return hidden, attention_mask, position_ids
        count = computed.sum(dim=1, keepdim=True)
        order = (~computed).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(count.max())]
        real = torch.arange(order.shape[1], device=order.device) < count
        slots = self._slots = torch.where(real, order, order[:, :1])
        self._rank = (computed.long().cumsum(dim=1) - 1).clamp_min(0)
        if position_ids is None:
            position_ids = torch.arange(self.length, device=hidden.device)
        if attention_mask is not None and attention_mask.shape[2] > 1:
            rows = slots[:, None, :, None].expand(-1, attention_mask.shape[1], -1, self.length)
            attention_mask = attention_mask.expand(batch, -1, -1, -1).gather(2, rows)
        hidden = hidden.gather(1, slots.unsqueeze(-1).expand(-1, -1, width))
        return hidden, attention_mask, position_ids.expand(batch, self.length).gather(1, slots)

    def among_computed(self, read: Tensor) -> Tensor:
        """Where the slots `read` int [b, W] stand among the computed ones; slots that are not, anywhere."""
        return read if self._rank is None else self._rank.gather(1, read)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores [b, H, Q, d] of the computed slots; returns those of all slots the pass sees, [b, H, length, d]."""
        kept = []
        for store, fresh in ((self._keys, key_states), (self._values, value_states)):
            if layer_idx == len(store):
                store.append(fresh.new_zeros(0))
            store[layer_idx], seen = self._write(store[layer_idx], fresh, 2)
            kept.append(seen)
        return kept[0], kept[1]

    def close(self, fresh: Tensor) -> Tensor:
        """Ends the pass: the trunk's output [b, Q, D] at the computed slots -> at all of them, [b, length, D]."""
        self.hidden, seen = self._write(fresh.new_zeros(0) if self.hidden is None else self.hidden, fresh, 1)
        return seen.clone()  # the next pass overwrites the store

    def _write(self, store: Tensor, fresh: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """`fresh` over the slots of `store`, along dimension `at`: the store, and what the pass sees of it."""
        known = store.shape[at] if store.numel() else 0
        if self._slots is None and self.rows is None and known <= self.length:
            return fresh, fresh
        if known < self.length:  # the canvas has grown: slots are added behind the old ones
            grown = fresh.new_zeros(self.batch, *fresh.shape[1:at], self.length, *fresh.shape[at + 1 :])
            if known:
                grown.narrow(at, 0, known).copy_(store)
            store = grown
        # layers may lie on other devices than the embedding, whose slots and rows these are
        rows = None if self.rows is None else self.rows.to(fresh.device)
        part = store if rows is None else store[rows]
        seen = part.narrow(at, 0, self.length)
        if self._slots is None:
            seen.copy_(fresh)
        else:
            shape = [len(fresh), *[1] * (at - 1), -1, *[1] * (fresh.dim() - at - 1)]
            seen.scatter_(at, self._slots.to(fresh.device).view(shape).expand(fresh.shape), fresh)
        if rows is not None:
            store[rows] = part
        return store, seen

    # What transformers asks in order to make its own mask, where none is given: every slot may be seen.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.length, 0


def check_cacheable(trunk: Any) -> None:
    """InputError for a decoder whose layers are not all plain attention over all places; `trunk` is its config."""
    window = "sliding_attention" if getattr(trunk, "sliding_window", None) else "full_attention"
    kinds = set(getattr(trunk, "layer_types", None) or [window])
    if kinds != {"full_attention"}:
        raise InputError(
            f"a {trunk.model_type} trunk has layers of the kinds {', '.join(sorted(kinds))}, expected full_attention "
            "only: its keys cannot be cached by place, use full() instead of a cache"
        )

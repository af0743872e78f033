"""Products of one input as one product: q, k, v of an attention, gate and up of an MLP.

`fuse_projections(model)` lays the weights of such a group side by side in memory and leaves each a view of its part, so
that state dict, `save_pretrained` and loading into the model are what they were. The first module of a group then
computes the product for all, and the others take their part of it. `unfuse_projections(model)` undoes it.

It acts without gradients only, and while the weights lie as they were laid: a model that was moved or cast since
computes one by one, which is the slow twin. The two are equal but for rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # in the order in which a layer calls them


def fuse_projections(model: nn.Module) -> int:
    """Fuses every group of `model` that consists of plain linear layers alike; returns how many.

    Left as they are: groups with an adapter, a quantised weight, hooks, or a weight that other modules share.
    """
    unfuse_projections(model)
    found = []
    for module in model.modules():
        for names in GROUPS:
            parts: list[Any] = [getattr(module, name, None) for name in names]
            if all(type(part) is nn.Linear for part in parts) and _alike(parts):
                found.append(parts)
    for parts in found:
        fused = _Fused(parts)
        for index, part in enumerate(parts):
            part.forward = partial(fused.product, index)
    return len(found)


def unfuse_projections(model: nn.Module) -> None:
    """Every projection by itself again, its weights in memory of their own."""
    for module in model.modules():
        if _is_fused(module):
            del module.forward
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def by_itself(projection: nn.Module, x: Tensor) -> Tensor:
    """`projection(x)`, for callers that do not give the same x to the rest of its group."""
    if _is_fused(projection):
        return F.linear(x, cast(Any, projection).weight, cast(Any, projection).bias)
    return cast(Tensor, projection(x))


def _is_fused(module: nn.Module) -> bool:
    return isinstance(getattr(getattr(vars(module).get("forward"), "func", None), "__self__", None), _Fused)


class _Fused:
    """One group: its weights in one piece, and the products that the later parts have not fetched yet."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts, self.sizes = parts, [part.out_features for part in parts]
        self.weight = torch.cat([part.weight.data for part in parts])
        self.bias = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])
        for part, weight in zip(parts, self.weight.split(self.sizes), strict=True):
            part.weight.data = weight
        if self.bias is not None:
            for part, bias in zip(parts, self.bias.split(self.sizes), strict=True):
                part.bias.data = bias
        # the input and its products, in one attribute: threads that share a model see both of one pass or of another
        self.waiting: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def product(self, index: int, x: Tensor) -> Tensor:
        """Part `index` of x [..., D] times all weights."""
        if not torch.is_grad_enabled():
            waiting = self.waiting
            if index == 0 and self._laid():
                waiting = self.waiting = x, F.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
            if waiting is not None and waiting[0] is x:
                if index == len(self.parts) - 1:
                    self.waiting = None
                return waiting[1][index]
        part = self.parts[index]
        return F.linear(x, part.weight, part.bias)

    def _laid(self) -> bool:
        """Whether every weight still is its part of the whole."""
        weights = [(part.weight, whole) for part, whole in zip(self.parts, self.weight.split(self.sizes), strict=True)]
        if self.bias is not None:
            weights += [(part.bias, whole) for part, whole in zip(self.parts, self.bias.split(self.sizes), strict=True)]
        return all(w.data_ptr() == whole.data_ptr() and w.dtype == whole.dtype for w, whole in weights)


def _alike(parts: list[Any]) -> bool:
    first = parts[0]
    if any(part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part) for part in parts):
        return False
    storages = {part.weight.untyped_storage().data_ptr() for part in parts}
    same = all(
        (part.weight.dtype, part.weight.device, part.in_features, part.bias is None, type(part.weight))
        == (first.weight.dtype, first.weight.device, first.in_features, first.bias is None, nn.Parameter)
        for part in parts
    )
    return same and first.weight.device.type != "meta" and len(storages) == len(parts)

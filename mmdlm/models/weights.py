"""Whether weights are still what they were: asked before anything that was computed from them once is used again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor, nn


class WeightsState:
    """What some weights were when this was made. It keeps none of them alive.

    Writing through `.data` goes unseen, as to all of torch; inference tensors count no writes at all, see `countable`.
    A pickled one holds for nothing.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._were = [(weakref.ref(weight), _written(weight)) for weight in weights]

    def __reduce__(self) -> tuple[type[WeightsState], tuple[tuple[()]]]:
        return WeightsState, ((),)

    def holds(self, weights: Iterable[Tensor]) -> bool:
        """True where these are the same tensors, in the same place and type, and nobody has written into them."""
        now = list(weights)
        return len(now) == len(self._were) and all(
            ref() is weight and was == _written(weight) for (ref, was), weight in zip(self._were, now, strict=True)
        )


def countable(weights: Iterable[Tensor]) -> bool:
    """Whether writes into all of them are counted."""
    return not any(weight.is_inference() for weight in weights)


def weights_that_decide(model: nn.Module) -> list[Tensor] | None:
    """All parameters and buffers; None for a model whose answers change by more than their weights, or whose writes
    are not counted: one in training, and one with adapters, which are switched on and off."""
    weights = [*model.parameters(), *model.buffers()]
    if model.training or hasattr(model, "peft_config") or not countable(weights):
        return None
    return weights


def _written(weight: Tensor) -> tuple[object, ...]:
    return weight._version, weight.data_ptr(), weight.dtype, weight.device

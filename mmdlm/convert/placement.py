"""Where the modules of a model go: one device, several by hand, or spread over all accelerators there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor

DeviceMap = str | torch.device | Mapping[str, Any]
SPARE = 0.9  # share of an accelerator's free memory that weights may take; the rest is for what is computed


def device_map_of(model: MaskPredictor, wanted: DeviceMap | None, dtype: torch.dtype | None) -> dict[str, torch.device]:
    """{module: device}, "" being the whole model. Embedding and head share a device; layers may lie elsewhere.

    Raises InputError for a device that is not there, a map that leaves a module out or offloads one, and a model that
    does not fit.
    """
    if isinstance(wanted, Mapping):
        return _by_hand(model, wanted)
    if wanted is None or str(wanted) != "auto":
        return {"": _device(wanted or "cpu")}
    count = torch.accelerator.device_count()
    if not count:
        return {"": torch.device("cpu")}
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    devices = [torch.device(kind.type, number) for number in range(count)]
    width = (dtype or torch.float32).itemsize
    free = torch.get_device_module(kind).mem_get_info
    room = [int(free(device)[0] * SPARE) for device in devices]
    return spread(model, dict(zip(devices, room, strict=True)), width)


def spread(model: MaskPredictor, room: Mapping[torch.device, int], width: int) -> dict[str, torch.device]:
    """Layers over devices in order, each filled up to its `room` in bytes at `width` bytes per number; the embedding,
    the last norm and the head on the first. InputError where the model does not fit."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        sizes[_module(name)] = sizes.get(_module(name), 0) + parameter.numel() * width
    layers = [name for name in sizes if name.startswith("trunk.layers.")]
    devices, left = list(room), dict(room)
    found = {name: devices[0] for name in sizes if name not in layers} | {"trunk.rotary_emb": devices[0]}
    left[devices[0]] -= sum(sizes[name] for name in found if name in sizes)
    at = 0
    for name in layers:
        while at < len(devices) and left[devices[at]] < sizes[name]:
            at += 1
        if at == len(devices) or left[devices[0]] < 0:
            raise InputError(
                f"The model takes {sum(sizes.values()) / 2**30:.1f} GiB, the devices have "
                f"{sum(room.values()) / 2**30:.1f} GiB to spare: load it in a smaller dtype, or with quantize='8bit' "
                "or '4bit'."
            )
        found[name] = devices[at]
        left[devices[at]] -= sizes[name]
    return {"": devices[0]} if set(found.values()) == {devices[0]} else found


def device_for(name: str, placed: Mapping[str, torch.device]) -> torch.device:
    """The device of the tensor `name`: that of the longest module name in the map that it lies in."""
    while name and name not in placed:
        name = name.rpartition(".")[0]
    return placed[name]


def _module(name: str) -> str:
    """The part of the model that is never split: a layer, or what stands beside the layers."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else ".".join(parts[:2]) if parts[0] == "trunk" else parts[0]


def _by_hand(model: MaskPredictor, wanted: Mapping[str, Any]) -> dict[str, torch.device]:
    found = {name: _device(device) for name, device in wanted.items()}
    for name, _ in model.named_parameters():
        try:
            device_for(name, found)
        except KeyError:
            raise InputError(
                f"The device map has no place for {name}: name its module, or '' for all others."
            ) from None
    if len({device.type for device in found.values()}) > 1:
        raise InputError(
            f"The device map names {', '.join(sorted({str(device) for device in found.values()}))}, expected devices "
            "of one kind: parts cannot be computed on another; use quantize, or 'auto'."
        )
    if device_for("head.weight", found) != device_for("trunk.embed_tokens.weight", found):
        raise InputError("The device map parts 'head' from 'trunk.embed_tokens', expected both on one device.")
    return found


def _device(name: Any) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(
            f"The device {name!r} cannot be used here ({str(error).splitlines()[0]}): name one that is there, such as "
            "'cpu' or 'cuda', or 'auto'."
        ) from error
    return device

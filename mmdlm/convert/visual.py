"""Loading a published visual tokenizer: which family a directory is, its weights checked, ours filled.

One module per family maps its configuration (`configuration`) and names its tensors (`pieces`); the tokenizer is the
library's own `LFQTokenizer` in another layout, or a `VQTokenizer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from accelerate import init_empty_weights
from torch import Tensor

from mmdlm.convert import key_map, lumina_vq, magvitv2, open_magvit2
from mmdlm.convert.families import OWN, family_module
from mmdlm.convert.key_map import Piece
from mmdlm.convert.weights import find_directory, read_json, read_tensors, weight_files
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.models.vq_tokenizer import VQTokenizer

Tokenizer = LFQTokenizer | VQTokenizer
_OWN: dict[str, type[Tokenizer]] = {"LFQTokenizer": LFQTokenizer, "VQTokenizer": VQTokenizer}
# _class_name of a config.json -> family, a module of this package; Open-MAGVIT2's has no such key.
_CLASSES = {magvitv2.FAMILY: "magvitv2", lumina_vq.FAMILY: "lumina_vq"}
_FAMILIES = (*_CLASSES.values(), "open_magvit2")
# Where a tokenizer lies in the directory of a whole model: ours, Lumina-DiMOO's.
_PLACES = ("visual_tokenizer", "vqvae")


def load_visual_tokenizer(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    averaged: bool | None = None,
) -> Tokenizer:
    """The visual tokenizer in a published directory, in a repository of the Hub, or in an mmdlm directory.

    Args:
        source: the directory with the tokenizer's config.json (for Open-MAGVIT2 its YAML will do) and weights, the
            directory of a whole model that holds it in a folder, or owner/name.
        dtype: default the one that the weights are stored in.
        device: default the CPU.
        averaged: Open-MAGVIT2 only: the moving average of the weights (True) or the last ones (False). Default what the
            configuration's `use_ema` says, as its authors measure.

    Returns a module in evaluation mode with encode(pixels [B, 3, H, W] in [-1, 1]) -> codes int64 [B, h, w],
    decode(codes) -> pixels, codebook_size and downsample. Raises InputError for an unknown format, a missing or broken
    file, weights that disagree with the configuration, and a device that is not there.
    """
    place = _there(device or "cpu")
    directory = _directory(find_directory(source))
    config = read_configuration(directory)
    family = recognise_visual_tokenizer(config, str(directory))
    options = {}
    if family == "open_magvit2":
        options["averaged"] = open_magvit2.uses_average(config) if averaged is None else averaged
    elif averaged is not None:
        raise InputError(f"averaged is {averaged}, but the weights in {directory} are kept only once: leave it out.")
    state: dict[str, Tensor] = {}
    for path in weight_files(directory):
        state.update(read_tensors(path))
    try:
        if family == OWN:
            model = _own(config)
            shapes = shapes_of(model)
            ours = key_map.to_mmdlm(state, [Piece(name, shape, name) for name, shape in shapes.items()], shapes)
        else:
            module = family_module(family)
            model = empty_tokenizer(module, config)
            ours = module.to_mmdlm(state, shapes_of(model), **options)
    except InputError as error:
        raise InputError(f"{directory}: {error}") from error
    # A tensor may share the file's memory: it is copied.
    filled = {name: value.to(place, dtype or value.dtype, copy=True) for name, value in ours.items()}
    model.load_state_dict(filled, assign=True)
    torch.nn.Module.to(model, place)  # a small table that is no weight; torch's own, as in the pipelines
    return model.eval()


def from_mmdlm(tokenizer: Tokenizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tokenizer of a published layout -> the published state dict, of the same dtype, and its config.json.

    The way back of `load_visual_tokenizer`. Raises InputError for a layout of our own.
    """
    family = "lumina_vq" if isinstance(tokenizer, VQTokenizer) else str(tokenizer.config["layout"])
    if family not in _FAMILIES:
        raise InputError(
            f"The tokenizer's layout is {family!r}, which nobody else has published: save it with save_pretrained."
        )
    module = family_module(family)
    return module.from_mmdlm(tokenizer.state_dict()), module.published_configuration(tokenizer.config)


def recognise_visual_tokenizer(config: Mapping[str, Any], where: str = "The config.json") -> str:
    """The family of a visual tokenizer's configuration: a name of this package's modules, or "mmdlm" for our own.

    Raises InputError for an unknown one; `where` begins its sentence.
    """
    name, model = config.get("_class_name"), config.get("model")
    if name in _OWN:
        return OWN
    if name in _CLASSES:
        return _CLASSES[name]
    if isinstance(model, Mapping) and "ddconfig" in (model.get("init_args") or {}):
        return "open_magvit2"
    raise InputError(
        f"{where} is no visual tokenizer that is known, its _class_name is {name!r}, expected {', '.join(_CLASSES)}, "
        f"{', '.join(_OWN)}, or Open-MAGVIT2's model.init_args.ddconfig: it cannot be loaded."
    )


def read_configuration(directory: Path) -> dict[str, Any]:
    """config.json of `directory`, or the one YAML beside an Open-MAGVIT2 checkpoint. InputError where there is none."""
    if (directory / "config.json").is_file():
        return read_json(directory / "config.json")
    tables = sorted([*directory.glob("*.yaml"), *directory.glob("*.yml")])
    if len(tables) != 1:
        raise InputError(
            f"{directory} has no config.json and {len(tables)} YAML files, expected the one that describes the "
            "tokenizer: copy it beside the weights."
        )
    try:
        content = yaml.safe_load(tables[0].read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(
            f"{tables[0]} cannot be read as YAML ({str(error).splitlines()[0]}): copy it again."
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{tables[0]} holds a {type(content).__name__}, expected a table: copy it again.")
    return content


def empty_tokenizer(family: ModuleType, config: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a published configuration with its weights on the meta device."""
    try:
        with torch.device("meta"):
            model: Tokenizer = family.build(config)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"The configuration describes no tokenizer ({error}): copy or download it again.") from error
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _directory(directory: Path) -> Path:
    """The directory itself, or the folder of a whole model's directory that holds its visual tokenizer."""
    for place in _PLACES:
        if (directory / place / "config.json").is_file():
            return directory / place
    return directory


def _there(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"The device {str(device)!r} cannot be used here ({str(error).splitlines()[0]}): name one that is there, "
            "such as 'cpu' or 'cuda'."
        ) from error
    return found


def _own(config: Mapping[str, Any]) -> Tokenizer:
    """One of our own from its config.json, the weights on the meta device, small tables where they are computed."""
    try:
        with init_empty_weights(include_buffers=False):
            model: Tokenizer = _OWN[str(config["_class_name"])].from_config(dict(config))
    except (ValueError, TypeError) as error:
        raise InputError(f"The config.json describes no tokenizer ({error}): save it again.") from error
    return model

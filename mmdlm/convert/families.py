"""Which family a directory belongs to, and a family's configuration and tensors in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor

from mmdlm.convert import key_map
from mmdlm.convert.key_map import Piece, Shapes
from mmdlm.convert.weights import read_json
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig

# model_type of a config.json -> family; a family is a module of this package
FAMILIES = {
    "llada": "llada",
    "mmada": "mmada",
    "sdar": "sdar",
    "sdar_moe": "sdar",
    "Fast_dLLM_Qwen": "fast_dllm",
    "Dream": "dream",
    "llava_llada": "llada_v",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
}
# Some families share a model_type with others: their architecture decides.
_ARCHITECTURES = {
    "LLaDAForMultiModalGeneration": "lumina",
    "LlavaLLaDAModelLM": "llada_v",
    "MMadaModelLM": "mmada",
    "MMadaConfig": "mmada",
}
OWN = "mmdlm"


def recognise(directory: Path) -> str:
    """The family of the language model in `directory`: a name of this package's modules, or "mmdlm" for our own.

    Raises InputError for a directory without config.json and for an unknown format.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} is no model directory, it has no config.json: give the one that holds it.")
    return family_of(read_json(path), str(directory))


def family_of(config: Mapping[str, Any], where: str = "The config.json") -> str:
    """The family that a config.json belongs to. Raises InputError for an unknown one; `where` begins its sentence."""
    kind = config.get("model_type")
    if kind == MaskPredictorConfig.model_type:
        return OWN
    for name in config.get("architectures") or ():
        if name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    if kind not in FAMILIES:
        raise InputError(
            f"{where} is of an unknown format, model_type {kind!r} and architectures {config.get('architectures')!r}, "
            f"expected model_type {', '.join(FAMILIES)} or {MaskPredictorConfig.model_type}: it cannot be loaded."
        )
    return FAMILIES[kind]


def family_module(family: str) -> ModuleType:
    return import_module(f"mmdlm.convert.{family}")


def configuration(
    config: Mapping[str, Any],
    *,
    text_length: int | None = None,
    vocabulary: Mapping[str, int] | None = None,
    where: str = "The config.json",
) -> MaskPredictorConfig:
    """A published config.json -> ours; `text_length` is its tokenizer's, `vocabulary` overrides single ids.

    Raises InputError for an unknown family and for what cannot be mapped.
    """
    family = family_of(config, where)
    found: MaskPredictorConfig
    if family == OWN:
        found = MaskPredictorConfig.from_dict(dict(config))
        found.vocabulary = {**(found.vocabulary or {}), **(vocabulary or {})}
    else:
        found = family_module(family).configuration(config, text_length=text_length, vocabulary=vocabulary)
    return found


def empty_model(config: MaskPredictorConfig) -> MaskPredictor:
    """The model of `config` with its parameters on the meta device, its small tables where they are computed."""
    with init_empty_weights(include_buffers=False):
        return MaskPredictor(config)


def shapes_of(model: MaskPredictor) -> dict[str, tuple[int, ...]]:
    """Names and shapes of our tensors; a tied head is no tensor of its own."""
    tied = model.config.tie_word_embeddings
    return {
        name: tuple(value.shape) for name, value in model.state_dict().items() if not (tied and name == "head.weight")
    }


def pieces_of(config: MaskPredictorConfig, shapes: Shapes) -> list[Piece]:
    """The pieces of the published format that `config` came from. InputError for a model that was never published."""
    if not config.published:
        raise InputError(
            "This model was not made from a published one, so there is no published format to write it in: "
            "save it with save_pretrained."
        )
    found: list[Piece] = family_module(config.published["family"]).pieces(config, shapes)
    return found


def to_mmdlm(
    state: Mapping[str, Tensor], config: Mapping[str, Any], **ids: Any
) -> tuple[dict[str, Tensor], MaskPredictorConfig]:
    """A published state dict and its config.json -> ours, of the same dtype.

    Keywords are those of `configuration`. Raises InputError for missing, unknown or misshapen tensors.
    """
    ours = configuration(config, **ids)
    shapes = shapes_of(empty_model(ours))
    return key_map.to_mmdlm(state, pieces_of(ours, shapes), shapes), ours


def from_mmdlm(state: Mapping[str, Tensor], config: MaskPredictorConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our state dict and configuration -> the published format the model came from, its config.json included.

    `from_mmdlm(*to_mmdlm(state, config))` is `(state, config)`, bit for bit. Raises InputError for a model that came
    from no published one.
    """
    pieces = pieces_of(config, shapes_of(empty_model(config)))
    assert config.published is not None
    return key_map.from_mmdlm(state, pieces), dict(config.published["config"])

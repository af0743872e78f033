"""mmdlm: one Transformer that fills in masked tokens, text and image alike.

The names below are imported when they are first asked for (PEP 562), so that ``import mmdlm`` and ``mmdlm --help``
cost nothing: torch, transformers and diffusers are loaded by the modules that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Canvas": "mmdlm.sequence",
    "Fill": "mmdlm.pipelines",
    "ImageToText": "mmdlm.pipelines",
    "InputError": "mmdlm.errors",
    "LFQTokenizer": "mmdlm.models.visual_tokenizer",
    "MMDLMProcessor": "mmdlm.processing",
    "MaskPredictor": "mmdlm.models.mask_predictor",
    "MaskPredictorConfig": "mmdlm.models.mask_predictor",
    "TextToImage": "mmdlm.pipelines",
    "Vocabulary": "mmdlm.vocabulary",
    "denoise": "mmdlm.sampling.denoise",
}

if TYPE_CHECKING:
    from mmdlm.errors import InputError
    from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
    from mmdlm.models.visual_tokenizer import LFQTokenizer
    from mmdlm.pipelines import Fill, ImageToText, TextToImage
    from mmdlm.processing import MMDLMProcessor
    from mmdlm.sampling.denoise import denoise
    from mmdlm.sequence import Canvas
    from mmdlm.vocabulary import Vocabulary

__all__ = [
    "Canvas",
    "Fill",
    "ImageToText",
    "InputError",
    "LFQTokenizer",
    "MMDLMProcessor",
    "MaskPredictor",
    "MaskPredictorConfig",
    "TextToImage",
    "Vocabulary",
    "__version__",
    "denoise",
]


def __getattr__(name: str) -> object:
    """Import a public name's home module on first use, and keep the value. AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmdlm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

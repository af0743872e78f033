"""lmms_eval knows our models through the entry point `lmms_eval.models`: `python -m lmms_eval --model mmdlm ...`.

    python -m lmms_eval --model mmdlm --model_args pretrained=MODEL,steps=8 --tasks mine --include_path TASKS

The model itself is in `mmdlm.cli.lmms_model`: lmms_eval loads this file while it is being imported itself, so
that this one imports nothing of it but its form of an announcement.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The ModelManifest that announces the model mmdlm."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmdlm", simple_class_path="mmdlm.cli.lmms_model.MMDLM")

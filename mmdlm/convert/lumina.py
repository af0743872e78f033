"""Lumina-DiMOO (arXiv:2510.06308): LLaDA's layout, its own special words, image codes from id 126,356 on.

Its ids and MMaDA's clash: 126,084 ends a line of image codes here and begins a picture there. A picture of any size is
written line by line, each line followed by that id; the ids of answers are not part of a vocabulary (see the prompts).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert import llada
from mmdlm.convert.ids import shared_vocabulary
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "Lumina-DiMOO"
PUBLISHED_IMAGE_START = 126356
PUBLISHED_IDS = llada.PUBLISHED_IDS | {
    "boi_id": 126349,
    "eoi_id": 126350,
    "image_start": PUBLISHED_IMAGE_START,
    "image_size": 8192,
}

pieces = llada.pieces


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """Lumina-DiMOO's config.json -> ours. Raises InputError as `llada.configuration`, and where the image codes' start
    is unknown."""
    rows = llada.table_rows(config)
    published = PUBLISHED_IDS if rows >= PUBLISHED_IMAGE_START + PUBLISHED_IDS["image_size"] else {}
    known = {
        **published,
        **llada.ids_from_config(config),
        "text_size": text_length or (PUBLISHED_IMAGE_START if published else None),
    }
    return llada.predictor_config(config, shared_vocabulary(rows, known, vocabulary or {}, FAMILY), "lumina")

"""LLaDA-V (arXiv:2505.16933): its language trunk only, LLaDA's weights in transformers' names, no shift.

The vision tower and the projector that feed it are not converted: their tensors are passed over, and said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary
from mmdlm.convert.llada import PUBLISHED_IDS, PUBLISHED_ROWS, PUBLISHED_TEXT_SIZE, ids_from_config
from mmdlm.convert.qwen3 import decoder_config, decoder_rows
from mmdlm.convert.qwen3 import pieces as pieces
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "LLaDA-V"
# prefixes of tensors that are no part of the language trunk
PASSED_OVER = ("model.vision_tower.", "model.mm_projector.", "model.vision_resampler.", "model.image_newline")


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """LLaDA-V's config.json -> ours, the language trunk. Raises InputError as `qwen3.configuration`."""
    rows = decoder_rows(config)
    published = PUBLISHED_IDS if rows == PUBLISHED_ROWS else {}
    known = {
        **published,
        **ids_from_config(config),
        "text_size": text_length or (PUBLISHED_TEXT_SIZE if published else None),
    }
    return decoder_config(config, text_vocabulary(rows, known, vocabulary or {}, FAMILY), "llada_v", trunk_type="llama")

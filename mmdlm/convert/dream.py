"""Dream (arXiv:2508.15487): a Qwen2.5 that sees everything, with the shift it was born with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary
from mmdlm.convert.llada import ids_from_config
from mmdlm.convert.qwen3 import decoder_config, decoder_rows
from mmdlm.convert.qwen3 import pieces as pieces
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "Dream"


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """Dream's config.json -> ours. Raises InputError as `qwen3.configuration`."""
    rows = decoder_rows(config)
    known = {**ids_from_config(config), "text_size": text_length}
    return decoder_config(
        config,
        text_vocabulary(rows, known, vocabulary or {}, FAMILY),
        "dream",
        trunk_type="qwen2",
        prediction_offset=1,
    )

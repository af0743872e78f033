"""SDAR (arXiv:2510.06303): a Qwen3 trained block by block; a block sees itself and all earlier ones, no shift."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary
from mmdlm.convert.llada import ids_from_config
from mmdlm.convert.qwen3 import decoder_config, decoder_rows, expert_count
from mmdlm.convert.qwen3 import pieces as pieces
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "SDAR"
PUBLISHED_ROWS = 151936
PUBLISHED_IDS = {"mask_id": 151669, "eos_id": 151643, "pad_id": 151643}
PUBLISHED_BLOCK = 4


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """SDAR's config.json -> ours, `block_length` from its `block_size`. Raises InputError as `qwen3.configuration`."""
    rows = decoder_rows(config)
    published = PUBLISHED_IDS if rows == PUBLISHED_ROWS else {}
    known = {**published, **ids_from_config(config), "text_size": text_length}
    return decoder_config(
        config,
        text_vocabulary(rows, known, vocabulary or {}, FAMILY),
        "sdar",
        trunk_type="qwen3_moe" if expert_count(config) else "qwen3",
        block_length=int(config.get("block_size") or PUBLISHED_BLOCK),
    )

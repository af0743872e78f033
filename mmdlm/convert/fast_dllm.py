"""Fast-dLLM v2 (arXiv:2509.26328): a Qwen2.5 trained block by block, with the shift it was born with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert.ids import text_vocabulary
from mmdlm.convert.llada import ids_from_config
from mmdlm.convert.qwen3 import decoder_config, decoder_rows
from mmdlm.convert.qwen3 import pieces as pieces
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "Fast-dLLM v2"
# The mask is an unused word of Qwen2.5's tokenizer and stands in no config.json; both published tables have it.
PUBLISHED_ROWS = (151936, 152064)
PUBLISHED_IDS = {"mask_id": 151665}
PUBLISHED_BLOCK = 32


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """Fast-dLLM v2's config.json -> ours, `block_length` from its `bd_size`. Raises InputError as
    `qwen3.configuration`."""
    rows = decoder_rows(config)
    published = PUBLISHED_IDS if rows in PUBLISHED_ROWS else {}
    known = {**published, **ids_from_config(config), "text_size": text_length}
    return decoder_config(
        config,
        text_vocabulary(rows, known, vocabulary or {}, FAMILY),
        "fast_dllm",
        trunk_type="qwen2",
        prediction_offset=1,
        block_length=int(config.get("bd_size") or PUBLISHED_BLOCK),
    )

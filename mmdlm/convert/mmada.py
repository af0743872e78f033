"""MMaDA (arXiv:2505.15809): LLaDA's layout with 8,192 image codes behind the text.

The image codes start at the length of the text tokenizer (126,349 as published), not at `llm_vocab_size`, which is the
padded table of LLaDA before it was widened; the rows behind the last code are never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdlm.convert import llada
from mmdlm.convert.ids import shared_vocabulary
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictorConfig

FAMILY = "MMaDA"
PUBLISHED_ROWS = 134656
# <|soi|>, <|eoi|>, <|t2i|> and <|mmu|>: one task word for captions and for questions
PUBLISHED_IDS = llada.PUBLISHED_IDS | {
    "boi_id": 126084,
    "eoi_id": 126085,
    "draw_id": 126088,
    "describe_id": 126089,
    "ask_id": 126089,
    "image_size": 8192,
}
# What decides the shapes of MMaDA-8B, as `llada.PUBLISHED_CONFIG` does for LLaDA-8B.
PUBLISHED_CONFIG: dict[str, Any] = llada.PUBLISHED_CONFIG | {
    "model_type": "mmada",
    "architectures": ["MMadaModelLM"],
    "codebook_size": 8192,
    "embedding_size": PUBLISHED_ROWS,
    "llm_vocab_size": llada.PUBLISHED_ROWS,
    "new_vocab_size": PUBLISHED_ROWS,
    "num_vq_tokens": 1024,
    "vocab_size": PUBLISHED_ROWS,
}

pieces = llada.pieces


def configuration(
    config: Mapping[str, Any], *, text_length: int | None = None, vocabulary: Mapping[str, int] | None = None
) -> MaskPredictorConfig:
    """MMaDA's config.json -> ours. Raises InputError as `llada.configuration`, and where the image codes' start is
    unknown."""
    rows, given = llada.table_rows(config), vocabulary or {}
    published = PUBLISHED_IDS if rows == PUBLISHED_ROWS else {}
    if published and text_length not in (None, llada.PUBLISHED_TEXT_SIZE) and "text_size" not in given:
        raise InputError(
            f"The tokenizer has {text_length} entries, MMaDA's has {llada.PUBLISHED_TEXT_SIZE} and the image codes "
            "start behind its last: it is another model's; copy or download MMaDA's own."
        )
    known = {
        **published,
        **llada.ids_from_config(config),
        **({"image_size": config["codebook_size"]} if config.get("codebook_size") else {}),
        "text_size": text_length or (llada.PUBLISHED_TEXT_SIZE if published else None),
    }
    return llada.predictor_config(config, shared_vocabulary(rows, known, given, FAMILY), "mmada")

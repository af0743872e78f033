"""A tiny model of random weights, saved and reloaded as any model is: what the processor, the pipelines and the command
line are tested with. Real parts, small ones; nothing is mocked."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network is a bug

from pathlib import Path

import pytest

IMAGE_SIZE, CODEBOOK_BITS, POSITIONS = 16, 6, 64
TEXTS = ["a red apple", "a blue car on a green background", "two yellow stars", "what colour is it?", "how many?"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory: 16 x 16 pictures as 4 x 4 codes of 6 bits, 64 positions, a few thousand random weights."""
    import torch

    from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
    from mmdlm.models.visual_tokenizer import LFQTokenizer
    from mmdlm.pipelines import TextToImage
    from mmdlm.processing import MMDLMProcessor
    from mmdlm.text_tokenizer import train_text_tokenizer
    from mmdlm.vocabulary import Vocabulary

    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(TEXTS, 300)
    text_size = len(tokenizer)
    special = ["pad", "mask", "bos", "eos", "boi", "eoi", "draw", "describe", "ask"]
    vocabulary = Vocabulary(
        text_size=text_size,
        image_start=text_size,
        image_size=2**CODEBOOK_BITS,
        **{f"{name}_id": number for number, name in enumerate(special)},
    )
    visual_tokenizer = LFQTokenizer(
        sample_size=IMAGE_SIZE,
        codebook_bits=CODEBOOK_BITS,
        encoder_widths=(8, 16),
        decoder_widths=(8, 16),
        encoder_blocks=1,
        decoder_blocks=1,
        stem_patch=2,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny"
    trunk = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": POSITIONS,
    }
    config = MaskPredictorConfig(
        trunk=trunk,
        vocabulary=vocabulary.to_dict(),
        code_bits=CODEBOOK_BITS,
        image_side=4,
        image_fold=2,
        max_positions=POSITIONS,
    )
    model = MaskPredictor(config)
    TextToImage(model, visual_tokenizer, MMDLMProcessor(tokenizer, vocabulary, IMAGE_SIZE)).save_pretrained(directory)
    return directory

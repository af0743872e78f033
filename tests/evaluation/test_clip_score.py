"""CLIPScore through a tiny CLIP of random weights, saved and loaded as any is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.evaluation.clip_score import clip_score, load_clip


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    words = ["<s>", "</s>", "a", "red", "blue", "apple", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**shared, "vocab_size": len(words), "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**shared, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    directory = tmp_path_factory.mktemp("clip")
    model.save_pretrained(directory)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, fast).save_pretrained(directory)
    return directory


def test_the_angle_between_picture_and_prompt(tiny_clip):
    clip = load_clip(tiny_clip)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "green")]
    prompts = ["a red apple", "a blue apple", "a red " * 8]
    scores = clip_score(clip, pictures, prompts, ["0", "1", "2"], batch_size=2)
    model, processor = clip
    for row, picture, prompt in zip(scores.rows, pictures, prompts, strict=True):
        inputs = processor(images=picture, text=prompt, return_tensors="pt", truncation=True, max_length=8)
        out = model(**inputs)
        cosine = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
        assert row["score"] == pytest.approx(2.5 * max(float(cosine), 0), abs=1e-5)
    assert scores.summary["cut_prompts"] == 1 and scores.summary["pictures"] == 3
    mean = sum(row["score"] for row in scores.rows) / 3
    assert scores.summary["clip_score"] == pytest.approx(mean)
    with pytest.raises(InputError, match="one for each"):
        clip_score(clip, pictures, prompts[:2], ["0", "1", "2"])


def test_a_directory_that_is_no_clip(tmp_path):
    with pytest.raises(InputError, match="no CLIP"):
        load_clip(tmp_path)

"""CLIPScore: how well a picture fits its prompt, by CLIP's own angle between them (arXiv:2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmdlm.errors import InputError
from mmdlm.evaluation.vqa import Scores
from mmdlm.processing import Picture, load_image

WEIGHT = 2.5  # of the paper's equation 1


def load_clip(directory: Path, device: str = "cpu") -> tuple[Any, Any]:
    """(model, processor) of a CLIP in transformers' format. Raises InputError where `directory` is none.

    The directory is one with config.json, model.safetensors, the tokenizer and the preprocessor: see
    `mmdlm.evaluation.fetched_weights.clip_directory` for one of the Hub. Nothing is fetched here.
    """
    from transformers import CLIPModel, CLIPProcessor

    try:
        # The safe format only; a missing weight would otherwise be made up at random.
        model, report = CLIPModel.from_pretrained(
            str(directory), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        processor = CLIPProcessor.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".:")
        raise InputError(
            f"{directory} is no CLIP that transformers can load ({reason}): give a directory like that of "
            "openai/clip-vit-base-patch32, saved with save_pretrained."
        ) from error
    if report["missing_keys"]:
        raise InputError(f"{directory} lacks {len(report['missing_keys'])} of CLIP's weights: copy all of it again.")
    return model.eval().requires_grad_(False).to(device), processor


@torch.no_grad()
def clip_score(
    clip: tuple[Any, Any],
    pictures: Sequence[Picture],
    prompts: Sequence[str],
    names: Sequence[Any],
    *,
    batch_size: int = 32,
) -> Scores:
    """CLIPScore of each picture (or its file) with its own prompt, 2.5 * max(cos, 0); `mean_cosine` is without either.

    Prompts longer than CLIP's context are cut, as everybody does, and counted as `cut_prompts`. Raises InputError
    unless there are as many prompts and names as pictures, at least one.
    """
    if not len(pictures) == len(prompts) == len(names) or not pictures:
        raise InputError(f"CLIPScore got {len(pictures)} pictures and {len(prompts)} prompts, expected one for each.")
    model, processor = clip
    rows: list[dict[str, Any]] = []
    longest, cut = model.config.text_config.max_position_embeddings, 0
    for start in range(0, len(pictures), batch_size):
        part = slice(start, start + batch_size)
        words = processor.tokenizer(list(prompts[part]))["input_ids"]
        cut += sum(len(ids) > longest for ids in words)
        inputs = processor(
            images=[load_image(picture) for picture in pictures[part]],
            text=list(prompts[part]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
        ).to(model.device)
        out = model(**inputs)  # its embeddings have length 1
        cosines = (out.image_embeds.float() * out.text_embeds.float()).sum(1)
        for name, prompt, cosine in zip(names[part], prompts[part], cosines.tolist(), strict=True):
            rows.append({"id": name, "prompt": prompt, "cosine": cosine, "score": WEIGHT * max(cosine, 0.0)})
    mean = {key: sum(row[name] for row in rows) / len(rows) for key, name in _MEANS}
    return Scores(mean | {"cut_prompts": cut, "pictures": len(rows)}, rows)


_MEANS = (("clip_score", "score"), ("mean_cosine", "cosine"))

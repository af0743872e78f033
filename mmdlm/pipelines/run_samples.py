"""What a training run shows of itself: the model on disk, a sheet of drawings, captions beside held-out pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmdlm import __version__
from mmdlm.picture_files import png, write_whole
from mmdlm.pipelines.describing import ImageToText
from mmdlm.pipelines.drawing import TextToImage
from mmdlm.training.rows import Coded


def set_lengths(pipeline: TextToImage, caption_length: int, answer_length: int, *, guided: bool) -> None:
    """Presets of a new model: how long its captions and answers are, and whether guidance has what it subtracts.

    guided: rows without a prompt were trained on. Without them the pipelines refuse a guidance scale other than 1.
    """
    pipeline.presets["describe"]["answer_length"] = caption_length
    pipeline.presets["ask"]["answer_length"] = answer_length
    if not guided:
        pipeline.presets["draw"] |= {"guidance_scale": 1.0, "unprompted": False}


def draw_sheet(pipeline: TextToImage, prompts: Sequence[str]) -> Image.Image:
    """One drawing of every prompt, eight a row, seed 0."""
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    images = pipeline(list(prompts), generator=generators).images
    side = pipeline.processor.image_size * 2
    canvas = Image.new("RGB", (side * min(len(images), 8), side * -(-len(images) // 8)), "white")
    for index, image in enumerate(images):
        canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (index % 8 * side, index // 8 * side))
    return canvas


def words_table(pipeline: TextToImage, codes: Tensor, references: Sequence[str], presets: dict[str, Any]) -> str:
    """Pictures, as codes int [B, h, w], with their own and the model's caption: a piece of HTML for the report."""
    describes = ImageToText(
        model=pipeline.model, visual_tokenizer=pipeline.visual_tokenizer, processor=pipeline.processor
    )
    describes.presets = presets
    describes.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = pipeline.processor.images(pipeline.visual_tokenizer.decode(codes.to(pipeline.model.device)))
    lines = []
    for image, reference, made in zip(images, references, describes(images).texts, strict=True):
        content = io.BytesIO()
        image.save(content, "PNG")
        data = base64.b64encode(content.getvalue()).decode()
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in (reference, made))
        lines.append(f"<tr><td><img src='data:image/png;base64,{data}' alt=''></td>{cells}</tr>")
    head = "<tr><th>held out</th><th>its caption</th><th>the model's</th></tr>"
    return f"<h2>Captions</h2><table class=words>{head}{''.join(lines)}</table>"


def save_samples(
    pipeline: TextToImage,
    out: Path,
    step: int,
    prompts: Sequence[str],
    held_out: Coded | None,
) -> None:
    """Writes `drawings-<step>.png` of the prompts, and `described.html` of the first six held-out pictures, where these
    have captions, into a run's directory."""
    facts = {"prompts": "; ".join(prompts), "step": step, "mmdlm_version": __version__}
    write_whole(out / f"drawings-{step}.png", png(draw_sheet(pipeline, prompts), facts))
    captions = held_out.captions[:6] if held_out is not None else []
    if held_out is not None and any(captions):
        references = [texts[0] if texts else "" for texts in captions]
        table = words_table(pipeline, held_out.codes[:6].long(), references, pipeline.presets)
        write_whole(out / "described.html", table.encode())

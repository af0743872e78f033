"""All exact levers together on the shipped model: the tokens of the plain loop, in float32 at temperature 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.models.fused import fuse_projections, unfuse_projections
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.pipelines.pipeline import editable_places
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.policies import maskgit, top_k
from mmdlm.sampling.predictors import other_canvas
from mmdlm.sequence import batch, draw_canvas

PROMPTS = ["a red apple", "two yellow stars on a blue background"]
GREEDY = {"name": "greedy"}


@pytest.fixture(scope="module")
def drawing() -> Iterator[TextToImage]:
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    unfuse_projections(pipe.model)


def plain(pipe: Any, canvas: Any, mask: Tensor | None, ids: Tensor, where: Tensor, columns: tuple[int, int]) -> Tensor:
    """The loop as it is published: every place, every id, then what is needed of it."""
    with torch.no_grad():
        logits = pipe.model(ids, attention_mask=mask, position_ids=canvas.positions, grid=canvas.grid).logits
    return logits.gather(1, where.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))[..., slice(*columns)]


def test_pictures_with_guidance_are_those_of_the_plain_loop(drawing: TextToImage):
    drawing.presets["draw"] |= {"draw": GREEDY, "policy": {"name": "maskgit"}}
    vocabulary, scale, steps = drawing.processor.vocabulary, 3.0, 6
    canvas = drawing.prepare(PROMPTS, 1, 1.0)[0]
    bare, _ = batch([draw_canvas([], None, drawing.grid, vocabulary)] * 2, pad_id=vocabulary.pad_id)
    other = other_canvas(bare.ids, editable_places(canvas), editable_places(bare))
    mask = (canvas.ids != vocabulary.pad_id)[:, None, None]

    def predict(ids: Tensor, where: Tensor) -> Tensor:
        with_prompt = plain(drawing, canvas, mask, ids, where, vocabulary.image_columns)
        without = plain(drawing, bare, None, *other(ids, where), vocabulary.image_columns)
        return without + scale * (with_prompt - without)

    last = list(denoise(predict, canvas.ids, maskgit(), editable=canvas.editable, mask_id=vocabulary.mask_id,
                        steps=steps, first_id=vocabulary.image_start))[-1]
    expected = vocabulary.image_codes(last.x[canvas.editable]).view(2, *drawing.grid)
    for _ in range(2):  # the second time with what the first one kept
        out = drawing(PROMPTS, num_inference_steps=steps, guidance_scale=scale)
        assert torch.equal(out.codes, expected)
    assert drawing._first_pass
    assert fuse_projections(drawing.model) == 2 * drawing.model.trunk.config.num_hidden_layers
    fused = drawing(PROMPTS, num_inference_steps=steps, guidance_scale=scale)
    assert torch.equal(fused.codes, expected)
    torch.testing.assert_close(fused.confidence, out.confidence, rtol=1e-3, atol=1e-4)


def test_words_are_those_of_the_plain_loop(drawing: TextToImage):
    telling = ImageToText(**drawing.components)
    telling.set_progress_bar_config(disable=True)
    telling.presets = drawing.presets
    vocabulary = drawing.processor.vocabulary
    pictures = drawing(PROMPTS, num_inference_steps=4, guidance_scale=1.0).images
    canvas = telling.prepare(pictures, None, 24)[0]
    last = list(denoise(lambda ids, where: plain(telling, canvas, None, ids, where, vocabulary.text_columns),
                        canvas.ids, top_k(), editable=canvas.editable, mask_id=vocabulary.mask_id, steps=12,
                        first_id=vocabulary.text_columns[0]))[-1]
    out = telling(pictures, num_inference_steps=12)
    assert torch.equal(out.ids, last.x[canvas.editable].view(2, -1))


def test_a_block_length_that_does_not_divide_is_one_sentence(drawing: TextToImage):
    before = dict(drawing.presets["draw"])
    try:
        for length in (3, 0, 2.0):
            drawing.presets["draw"]["block_length"] = length
            with pytest.raises(InputError, match=r"block_length is .*, expected a number that divides the 256 places"):
                drawing(PROMPTS[0])
        drawing.presets["draw"]["block_length"] = 128
        assert drawing(PROMPTS[0], num_inference_steps=2, guidance_scale=1.0).codes.shape == (1, 16, 16)
    finally:
        drawing.presets["draw"] = before

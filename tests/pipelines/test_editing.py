"""A picture changed as words say: the edit layout through TextToImage and `mmdlm generate --source`, random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.errors import InputError
from mmdlm.pipelines import TextToImage
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.policies import maskgit
from mmdlm.sampling.predictors import full
from mmdlm.sequence import batch, edit_canvas

PROMPTS = ["a red apple", "a blue car on a green background"]
GREEDY = {"name": "greedy"}


@pytest.fixture(scope="module")
def draw(tiny_model: Path) -> TextToImage:
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe.model.head.weight.mul_(30)  # a fresh model is sure of nothing: what it sees should matter
    pipe.presets["draw"] |= {"draw": GREEDY, "policy": {"name": "maskgit"}, "num_inference_steps": 3}
    return pipe


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_the_canvas_is_the_one_that_is_trained(draw):
    words = draw.processor.vocabulary
    with torch.no_grad():
        codes = draw.visual_tokenizer.encode(draw.processor.pixels([noise(0), noise(1)]))
    rows = [edit_canvas(one, draw.processor.text_ids(prompt), None, draw.grid, words)
            for one, prompt in zip(codes, PROMPTS, strict=True)]
    canvas, valid = batch(rows, pad_id=words.pad_id)
    predict = full(draw.model, attention_mask=valid[:, None, None], position_ids=canvas.positions, grid=canvas.grid,
                   columns=words.image_columns)
    last = list(denoise(predict, canvas.ids, maskgit(), editable=canvas.editable, mask_id=words.mask_id, steps=3,
                        first_id=words.image_start))[-1]
    expected = words.image_codes(last.x[canvas.editable]).view(2, *draw.grid)
    out = draw(PROMPTS, source=[noise(0), noise(1)], guidance_scale=1.0)
    assert torch.equal(out.codes, expected)
    assert not torch.equal(out.codes, draw(PROMPTS, guidance_scale=1.0).codes)
    # a row does not depend on its neighbours
    for row, prompt in enumerate(PROMPTS):
        alone = draw(prompt, source=noise(row), guidance_scale=1.0)
        assert torch.equal(alone.codes[0], expected[row])


def test_guidance_drops_the_words_and_keeps_the_picture(draw):
    forgot = [draw(prompt, source=noise(0), guidance_scale=0.0).confidence for prompt in PROMPTS]
    other = draw(PROMPTS[0], source=noise(1), guidance_scale=0.0).confidence
    torch.testing.assert_close(*forgot)
    assert not torch.allclose(forgot[0], other)
    one_for_all = draw(PROMPTS, source=noise(0), num_images_per_prompt=2, guidance_scale=2.0).codes
    assert torch.equal(one_for_all[3], draw(PROMPTS[1], source=noise(0), guidance_scale=2.0).codes[0])


def test_bad_sources_are_one_sentence(draw):
    with pytest.raises(InputError, match="Got 3 pictures to change for 2 prompts"):
        draw(PROMPTS, source=[noise(0)] * 3)
    with pytest.raises(InputError, match="The prompt with the picture to change is too long by"):
        draw("word " * 10, source=noise(0))


def test_the_command(tiny_model, tmp_path):
    noise(0).save(tmp_path / "before.png")
    said = ("generate", "a red apple", "--model", tiny_model, "--device", "cpu", "--steps", 2, "--seed", 0)
    for name, more in (("plain", ()), ("changed", ("--source", tmp_path / "before.png"))):
        result = CliRunner().invoke(app, [*map(str, (*said, *more, "-o", tmp_path / f"{name}.png"))])
        assert result.exit_code == 0, (result.output, result.exception)
    plain, changed = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "changed"))
    assert plain != changed
    with Image.open(tmp_path / "changed.png") as picture:
        assert picture.text["source"] == "before.png"
    for more, words in (
        (("--source", tmp_path / "gone.png"), "There is no picture at"),
        (("--guidance", 1, "--negative", "a dog"), "--negative needs guidance"),
        (("--guidance", 1, "--guidance-interval", "0,0.5"), "--guidance-interval needs guidance"),
    ):
        result = CliRunner().invoke(app, [*map(str, (*said, *more, "-o", tmp_path / "x.png"))])
        assert result.exit_code == 2 and words in result.output and not (tmp_path / "x.png").exists()

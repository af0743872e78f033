"""A run without prompt dropout says so in its model, so that guidance is refused and not made up."""

from __future__ import annotations

import pytest

from mmdlm.errors import InputError
from mmdlm.pipelines import TextToImage
from mmdlm.pipelines.run_samples import set_lengths


def test_a_model_never_trained_without_prompts_takes_no_guidance(tiny_model, tmp_path):
    pipe = TextToImage.from_pretrained(tiny_model)
    set_lengths(pipe, 7, 5, guided=False)
    assert (pipe.presets["describe"]["answer_length"], pipe.presets["ask"]["answer_length"]) == (7, 5)
    pipe.save_pretrained(tmp_path / "pipeline")
    saved = TextToImage.from_pretrained(tmp_path / "pipeline")
    saved.set_progress_bar_config(disable=True)
    assert len(saved("a cat", num_inference_steps=2).images) == 1
    with pytest.raises(InputError, match="never trained without prompts"):
        saved("a cat", guidance_scale=2.0)
    set_lengths(pipe, 7, 5, guided=True)
    pipe.presets["draw"].pop("unprompted")
    assert len(pipe("a cat", num_inference_steps=2, guidance_scale=2.0).images) == 1

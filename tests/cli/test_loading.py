"""What the commands share: a quantised model, and published models where only mmdlm's own layouts are known."""

from __future__ import annotations

import importlib.util

import pytest

from mmdlm.cli.loading import load_pipeline
from mmdlm.errors import InputError
from mmdlm.pipelines import ImageToText
from mmdlm.serving.jobs import Studio


def test_an_unknown_quantisation_is_named_with_those_there_are():
    with pytest.raises(InputError, match="quantize is '3bit', expected one of 8bit, 4bit"):
        load_pipeline("TextToImage", None, "cpu", True, "3bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_without_bitsandbytes_the_package_is_named():
    with pytest.raises(InputError, match="needs the package bitsandbytes"):
        load_pipeline("TextToImage", None, "cpu", True, "8bit")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_a_quantised_model_draws():
    pipe = load_pipeline("TextToImage", None, "cpu", True, "8bit")
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (64, 64)


@pytest.mark.parametrize("family", ["mmada", "llada"])
def test_a_published_model_is_neither_served_nor_scored_in_our_layouts(family, monkeypatch):
    pipe = ImageToText.from_pretrained()
    pipe.model.config.published = {"family": family}
    if family == "llada":  # has no words for tasks
        words = vars(pipe.processor.vocabulary) | {"draw_id": -1, "describe_id": -1}
        pipe.processor.vocabulary = type(pipe.processor.vocabulary)(**words)
    with pytest.raises(InputError, match=f"family {family}, for which there is no layout for serving"):
        Studio(pipe)
    monkeypatch.setattr(ImageToText, "from_pretrained", classmethod(lambda cls, directory: pipe))
    with pytest.raises(InputError, match="no layout for scoring"):
        load_pipeline("ImageToText", None, "cpu", True, own="scoring")

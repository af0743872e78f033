"""mmdlm tune's choice: the only candidate that keeps the quality is the one picked, however fast the others are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.evaluation.tuning import Candidate, Cases, Tried, candidates_of, equal_tokens, fastest, run, try_candidates
from mmdlm.pipelines import ImageToText, TextToImage


@pytest.fixture(scope="module")
def draw(tiny_model: Path) -> TextToImage:
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tried(name: str, ratio: float, quality: float) -> Tried:
    return Tried(Candidate(name, {"num_inference_steps": 1} if name != "preset" else {}), [1.0], [ratio], quality, 0.0)


def test_the_fastest_of_those_that_are_good_enough():
    found = [tried("preset", 1.0, 1.0), tried("fast", 9.0, 0.5), tried("fine", 2.0, 0.99), tried("best", 3.0, 0.98)]
    assert fastest(found, 0.98).candidate.name == "best"
    assert fastest(found, 0.985).candidate.name == "fine"
    assert fastest(found, 1.0).candidate.name == "preset"
    assert fastest([found[0], tried("slow", 0.5, 1.0)], 0.9).candidate.name == "preset"


def test_equal_tokens_are_counted_up_to_the_later_end():
    ids = torch.tensor([[5, 6, 3, 9, 9], [5, 7, 3, 3, 3], [1, 2, 4, 5, 6]])
    truth = torch.tensor([[5, 6, 3, 3, 3], [5, 6, 8, 3, 9], [1, 2, 4, 5, 7]])
    assert equal_tokens(ids, truth, end=3).tolist() == [1.0, 0.5, 0.8]


def test_our_own_candidates():
    drawn = candidates_of("draw", {"num_inference_steps": 16, "guidance_scale": 1.5})
    assert [candidate.name for candidate in drawn][:6] == [
        "12 steps", "8 steps", "6 steps", "4 steps", "2 steps", "16 steps, image_cache",
    ]  # fmt: skip
    assert drawn[-1].changes == {"num_inference_steps": 4, "guidance_scale": 1.0}
    alone = candidates_of("draw", {"num_inference_steps": 1, "guidance_scale": 1.0})
    assert [candidate.name for candidate in alone] == ["1 steps, image_cache"]
    said = candidates_of("describe", {"num_inference_steps": 2, "answer_length": 24})
    assert [candidate.name for candidate in said][:3] == ["1 steps", "threshold 0.95", "threshold 0.95, dual_cache"]
    assert said[1].changes == {"num_inference_steps": 24, "policy": {"name": "threshold", "tau": 0.95}}


def test_drawing_is_measured_by_its_prompts_or_its_codes(draw: TextToImage):
    cases = Cases("draw", ["a red apple", "two yellow stars"], seed=3)
    same, other = Candidate("the same", {"num_inference_steps": 16}), Candidate("one step", {"num_inference_steps": 1})
    before = dict(draw.presets["draw"])
    found = try_candidates(draw, cases, [same, other], measure="prompt", pairs=1)
    assert draw.presets["draw"] == before
    assert [one.candidate.name for one in found] == ["the preset as it is", "the same", "one step"]
    assert found[0].quality == found[1].quality == 1.0 and found[1].psnr == 99.0
    assert found[2].quality != 1.0 and found[2].psnr is not None and found[2].psnr < 99
    codes = try_candidates(draw, cases, [same, other], measure="codes", pairs=1)
    assert codes[1].quality == 1.0 and codes[2].quality < 1 and len(codes[2].ratios) == 1
    assert fastest(codes, 0.999).candidate.name in ("the preset as it is", "the same")
    with pytest.raises(InputError, match="expected prompt or codes"):
        try_candidates(draw, cases, [same], measure="tokens", pairs=1)


def test_captions_and_answers(draw: TextToImage):
    read = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    read.set_progress_bar_config(disable=True)
    pictures = draw(["a red apple"] * 3, num_inference_steps=1).images
    steps = Candidate("one step", {"num_inference_steps": 1})
    for question in (None, "what colour is it?"):
        task = "describe" if question is None else "ask"
        read.presets[task] |= {"answer_length": 8, "num_inference_steps": 8}
        found = try_candidates(read, Cases(task, pictures, question), [steps], measure="tokens", pairs=1)
        assert found[0].quality == 1.0 and 0 <= found[1].quality <= 1
        ids = [torch.cat([output.ids for output in run(read, Cases(task, pictures, question), changes)])
               for changes in ({}, steps.changes)]
        share = equal_tokens(ids[1], ids[0], read.processor.vocabulary.eos_id).mean()
        assert found[1].quality == pytest.approx(float(share))

"""What a call may set beside the presets: guidance on part of the steps, a negative prompt, caches."""

from __future__ import annotations

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.sampling.guidance_interval import within
from mmdlm.sampling.predictors import full
from mmdlm.sampling.shadows import shadowed

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def drawing() -> TextToImage:
    pipe = TextToImage.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def describing(drawing: TextToImage) -> ImageToText:
    pipe = ImageToText(drawing.model, drawing.visual_tokenizer, drawing.processor)
    pipe.presets = drawing.presets
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: TextToImage, **settings):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe([PROMPT, "a cat on a blue background"], num_inference_steps=6, generator=generators, **settings)


def test_guidance_within_an_interval(drawing):
    always, never = draw(drawing, guidance_scale=3.0).codes, draw(drawing, guidance_scale=1.0).codes
    assert torch.equal(draw(drawing, guidance_scale=3.0, guidance_interval=(0, 1)).codes, always)
    part = draw(drawing, guidance_scale=3.0, guidance_interval=(0.5, 1)).codes
    assert not torch.equal(part, always) and not torch.equal(part, never)
    alone = drawing(PROMPT, num_inference_steps=6, guidance_scale=3.0, guidance_interval=(0.5, 1),
                    generator=torch.Generator().manual_seed(0)).codes
    # one prompt takes its seed from its generator otherwise than a list does: give it the list's
    alone = drawing([PROMPT], num_inference_steps=6, guidance_scale=3.0, guidance_interval=(0.5, 1),
                    generator=[torch.Generator().manual_seed(0)]).codes
    assert torch.equal(alone[0], part[0])


def test_outside_the_interval_the_second_branch_is_not_asked():
    asked = []

    def predictor(name):
        def predict(ids, where):
            asked.append(name)
            return torch.full((*where.shape, 3), float(len(name)))
        return predict

    editable = torch.tensor([[True, True, True, True], [True, True, True, True]])
    predict = within(predictor("guided"), predictor("plain"), (0.25, 0.75), editable=editable, mask_id=9)
    where = torch.zeros(2, 1, dtype=torch.long)
    first = predict(torch.tensor([[9, 9, 9, 9], [9, 9, 9, 9]]), where)
    assert asked == ["plain"] and first.eq(5).all()
    mixed = predict(torch.tensor([[9, 9, 0, 0], [9, 9, 9, 9]]), where)
    assert mixed[0].eq(6).all() and mixed[1].eq(5).all()
    del asked[:]
    done = predict(torch.tensor([[9, 9, 9, 0], [0, 0, 0, 0]]), where)
    assert asked == ["guided"] and done[0].eq(6).all()


def test_a_negative_prompt_guides_elsewhere(drawing):
    plain = draw(drawing, guidance_scale=2.0)
    assert torch.equal(draw(drawing, guidance_scale=2.0, negative_prompt="").codes, plain.codes)
    assert not torch.equal(draw(drawing, guidance_scale=2.0, negative_prompt="a dog").codes, plain.codes)
    assert torch.equal(draw(drawing, guidance_scale=1.0, negative_prompt="a dog").codes,
                       draw(drawing, guidance_scale=1.0).codes)


def test_caches_report_and_in_their_exact_setting_change_nothing(drawing, describing):
    plain = draw(drawing)
    cached = draw(drawing, cache={"name": "image_cache", "refresh_interval": 1})
    assert torch.equal(cached.codes, plain.codes) and plain.cache is None
    # six passes of two rows in each of guidance's two branches
    assert cached.cache["refreshes"] == 24 and cached.cache["hits"] == 0 and cached.forwards == 6
    assert plain.tokens_per_forward == cached.tokens_per_forward == 256 / 6
    pictures = plain.images
    words = describing(pictures)
    exact = describing(pictures, cache={"name": "dual_cache", "refresh_interval": 1})
    kept = describing(pictures, cache={"name": "dual_cache"})
    assert exact.texts == words.texts and exact.cache["hits"] == 0
    # all is asked at once, so the first pass alone computes what lies outside
    assert kept.cache["hits"] == 2 * 23 and kept.cache["refreshes"] == 2 and kept.forwards == words.forwards == 24
    fast = describing(pictures, policy={"name": "threshold", "tau": 0.9})
    assert fast.forwards < 24 and fast.tokens_per_forward == 24 / fast.forwards and fast.cache is None


def test_revoke_asks_about_written_words_without_showing_them(drawing, describing):
    canvas, _ = describing.prepare([draw(drawing).images[0]], None, 24)
    words = drawing.processor.vocabulary
    policy, settings = {"name": "revoke"}, {**describing.presets["describe"], "policy": {"name": "revoke"}}
    predict = describing._predictor(canvas, None, words.text_columns, settings)
    by_hand = shadowed(describing.model, mask_id=words.mask_id, editable=canvas.editable, position_ids=canvas.positions,
                       grid=canvas.grid, columns=words.text_columns)
    ids = canvas.ids.masked_fill(canvas.editable, words.mask_id)
    where = canvas.editable.nonzero()[None, :, 1]
    ids[0, where[0, 0]] = 50  # one word is written
    shown = full(describing.model, position_ids=canvas.positions, grid=canvas.grid, columns=words.text_columns)
    assert torch.equal(predict(ids, where), by_hand(ids, where))
    torch.testing.assert_close(predict(ids, where)[:, 1:], shown(ids, where)[:, 1:], atol=1e-3, rtol=1e-3)
    assert not torch.allclose(predict(ids, where)[:, 0], shown(ids, where)[:, 0], atol=0.1)
    picture = draw(drawing).images[0]
    assert describing(picture, policy=policy).texts[0]
    with pytest.raises(InputError, match="takes no cache"):
        describing(picture, policy=policy, cache={"name": "dual_cache"})


@pytest.mark.parametrize(("settings", "words"), [
    ({"policy": {"name": "revoke"}}, "folds image tokens"),
    ({"policy": {"name": "with_edits", "policy": {"name": "maskgit"}}}, "folds image tokens"),
    ({"guidance_interval": (0.5, 0.5)}, "LOW < HIGH"),
    ({"cache": {"name": "magic"}}, "expected one of prefix_cache"),
    ({"cache": {"name": "image_cache", "steps": 3}}, "image_cache has no setting 'steps'"),
    ({"cache": {"name": "image_cache", "cache_ratio": 2.0}}, "cache_ratio is 2.0"),
])
def test_what_cannot_be_set_is_one_sentence(drawing, settings, words):
    with pytest.raises(InputError, match=words):
        draw(drawing, **settings)

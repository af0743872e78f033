"""Caches on the shipped model: folded pictures, captions, guidance. In the exact setting they change nothing."""

import pytest
import torch

from mmdlm.assets import shipped_model
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.caches import dual_cache, image_cache, prefix_cache
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.policies import maskgit, threshold, top_k
from mmdlm.sampling.predictors import full, guided, other_canvas
from mmdlm.sequence import batch, describe_canvas, draw_canvas

SIDE = 8  # a quarter of the shipped size, for speed


@pytest.fixture(scope="module")
def model():
    return MaskPredictor.from_pretrained(shipped_model() / "model", dtype=torch.float32).eval()


def run(predict, canvas, model, policy, **options):
    *_, last = denoise(predict, canvas.ids, policy, editable=canvas.editable, mask_id=model.vocabulary.mask_id,
                       **{"steps": None, **options})
    return last.x


def inputs_of(canvas, mask):
    return {"attention_mask": mask, "position_ids": canvas.positions, "grid": canvas.grid}


def captions(model):
    vocabulary = model.vocabulary
    codes = torch.randint(vocabulary.image_size, (2, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    rows = [describe_canvas(code, (SIDE, SIDE), None, 8, vocabulary) for code in codes]
    return batch(rows, pad_id=vocabulary.pad_id)


def drawings(model):
    vocabulary = model.vocabulary
    rows = [draw_canvas(ids, None, (SIDE, SIDE), vocabulary) for ids in ([40, 41, 42], [50, 51], [], [])]
    return batch(rows[:2], pad_id=vocabulary.pad_id), batch(rows[2:], pad_id=vocabulary.pad_id)


@pytest.mark.parametrize("make", [prefix_cache, dual_cache])
def test_captions(model, make):
    canvas, valid = captions(model)
    inputs = inputs_of(canvas, valid[:, None, None])
    want = run(full(model, **inputs), canvas, model, top_k(), block=4)
    exact = make(model, refresh_interval=1, **inputs)
    assert torch.equal(run(exact, canvas, model, top_k(), block=4), want)
    assert exact.report()["hits"] == 0 and exact.report()["tokens_per_forward"] == 1
    cached = make(model, **inputs)
    got = run(cached, canvas, model, threshold(0.9), block=4)
    assert cached.report()["hits"] > 0 and cached.report()["computed_share"] < 0.9
    assert torch.equal(got[~canvas.editable], canvas.ids[~canvas.editable])
    assert not bool((got == model.vocabulary.mask_id).any())


def test_guided_pictures(model):
    (canvas, valid), (bare, bare_valid) = drawings(model)
    columns = model.vocabulary.image_columns
    places, bare_places = (c.editable.nonzero()[:, 1].view(2, -1) for c in (canvas, bare))
    inputs, bare_inputs = inputs_of(canvas, valid[:, None, None]), inputs_of(bare, bare_valid[:, None, None])
    other = other_canvas(bare.ids, places, bare_places)
    options = {"steps": 4, "first_id": columns[0]}

    def picture(make):
        branches = make(inputs), make(bare_inputs)
        return run(guided(*branches, 2.0, other=other), canvas, model, maskgit(), **options), branches

    want, _ = picture(lambda i: full(model, columns=columns, **i))
    for settings in ({"refresh_interval": 1}, {"cache_ratio": 0.0, "refresh_interval": 99, "warmup_ratio": 0.0}):
        got, _ = picture(lambda i, s=settings: image_cache(model, steps=4, columns=columns, **i, **s))
        assert torch.equal(got, want)
    got, branches = picture(lambda i: image_cache(model, steps=4, columns=columns, cache_ratio=0.9, warmup_ratio=0.0,
                                                  refresh_interval=9, **i))
    assert all(branch.report()["hits"] == 6 and branch.report()["refreshes"] == 2 for branch in branches)
    assert torch.equal(got[~canvas.editable], canvas.ids[~canvas.editable])
    assert not bool((got == model.vocabulary.mask_id).any())

"""For every policy with every predictor: a row alone is the row in any batch behind any padding, what is given stays,
no mask remains, and the same seed gives the same tokens; and a cache in its exact setting is no cache. On random
weights and on the shipped model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm import attention, sequence
from mmdlm.assets import shipped_model
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.sampling.caches import cached_from_config
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import categorical, greedy
from mmdlm.sampling.policies import REVISING, policy_from_config
from mmdlm.sampling.predictors import full, guided, masked_prompt, restricted
from mmdlm.sampling.shadows import shadowed

POLICIES = [
    {"name": "maskgit", "choice_temperature": 1.0},
    {"name": "top_k"},
    {"name": "top_k", "confidence": "random"},
    {"name": "top_k", "confidence": "margin"},
    {"name": "threshold", "tau": 0.02},
    {"name": "factor", "f": 1.5},
    {"name": "entropy_bound", "gamma": 5.0},
    {"name": "ancestral"},
    {"name": "remdm", "eta": 0.3},
    {"name": "remdm", "rule": "loop", "eta": 0.5},
    {"name": "with_edits", "policy": {"name": "threshold", "tau": 0.02}, "tau": 0.01},
    {"name": "revoke", "draft": 0.01, "verify": 0.02},
]
ANSWERS, STEPS = (5, 9, 7), 6
EXACT = {"prefix_cache": {"refresh_interval": 1}, "dual_cache": {"refresh_interval": 1},
         "image_cache": {"refresh_interval": 1}}


@pytest.fixture(scope="module", params=["random", "shipped"])
def model(tiny_model: Path, request: pytest.FixtureRequest) -> MaskPredictor:
    directory = tiny_model if request.param == "random" else shipped_model()
    loaded = MaskPredictor.from_pretrained(directory / "model", dtype=torch.float32).eval()
    if request.param == "random":
        with torch.no_grad():
            loaded.head.weight.mul_(30)  # a fresh model is sure of nothing; here some places are
    return loaded


def rows(model: MaskPredictor) -> list[sequence.Canvas]:
    """Questions and answers of unlike lengths about unlike pictures."""
    codes = torch.arange(3 * 16).view(3, 4, 4)
    return [sequence.ask_canvas(codes[i], (4, 4), [20 + i] * (2 + 3 * i), None, ANSWERS[i], model.vocabulary)
            for i in range(3)]


def predictor(model: MaskPredictor, kind: str, canvas: sequence.Canvas, valid: torch.Tensor):
    words, mask = model.vocabulary, attention.full(valid)
    seen = {"attention_mask": mask, "position_ids": canvas.positions, "grid": canvas.grid}
    if kind == "full":
        return full(model, columns=words.text_columns, **seen)
    if kind == "restricted":
        return restricted(full(model, **seen), canvas.modality, [words.text_columns, words.image_columns])
    if kind == "guided":
        plain = full(model, columns=words.text_columns, **seen)
        hidden = valid & ~canvas.editable & (canvas.modality == sequence.TEXT)
        return guided(plain, plain, 1.5, other=masked_prompt(hidden, words.mask_id))
    if kind in EXACT:
        config = {"name": kind, **EXACT[kind]}
        return cached_from_config(config, model, steps=STEPS, columns=words.text_columns, **seen)
    return shadowed(model, mask_id=words.mask_id, editable=canvas.editable, columns=words.text_columns, **seen)


def answers(model, kind, config, chosen, side, draw):
    canvas, valid = sequence.batch([rows(model)[i] for i in chosen], pad_id=model.vocabulary.pad_id, side=side)
    *_, last = denoise(
        predictor(model, kind, canvas, valid), canvas.ids, policy_from_config(config), editable=canvas.editable,
        mask_id=model.vocabulary.mask_id, steps=STEPS, draw=draw, revise=config["name"] in REVISING,
        generator=[torch.Generator().manual_seed(i) for i in chosen],
    )
    assert torch.equal(last.x[~canvas.editable], canvas.ids[~canvas.editable])
    assert not bool((last.x == model.vocabulary.mask_id).any())
    return [last.x[row][canvas.editable[row]].tolist() for row in range(len(chosen))]


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("config", POLICIES, ids=lambda config: "-".join(str(value) for value in config.values())[:40])
def test_a_cache_in_its_exact_setting_is_no_cache(model, config, kind):
    assert answers(model, kind, config, (0, 1, 2), "left", greedy) == answers(
        model, "full", config, (0, 1, 2), "left", greedy)


@pytest.mark.parametrize("kind", ["full", "restricted", "guided", "shadowed"])
@pytest.mark.parametrize("config", POLICIES, ids=lambda config: "-".join(str(value) for value in config.values())[:40])
def test_a_row_is_what_it_is_alone(model, config, kind):
    for draw in (greedy, categorical()):
        together = answers(model, kind, config, (0, 1, 2), "left", draw)
        assert answers(model, kind, config, (2, 0, 1), "right", draw) == [together[i] for i in (2, 0, 1)]
        assert answers(model, kind, config, (0,), "right", draw) == together[:1]

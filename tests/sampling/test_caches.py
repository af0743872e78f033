"""Cached predictors against the uncached one: where they are exact, where they hit, and that rows stay independent."""

import pytest
import torch

from mmdlm.attention import block_causal
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.sampling import policies
from mmdlm.sampling.caches import block_cache, dual_cache, image_cache, prefix_cache
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.predictors import full, guided, masked_prompt
from mmdlm.vocabulary import Vocabulary

MASK = 1


def make_model(kind="llama", layers=2, offset=0, fold=1, block_length=0, attention="sdpa"):
    torch.manual_seed(0)
    vocabulary = Vocabulary(text_size=24, image_start=24, image_size=8, mask_id=MASK, bos_id=2, eos_id=3, pad_id=0,
                            boi_id=4, eoi_id=5, draw_id=6, describe_id=7, ask_id=8)
    trunk = {"model_type": kind, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "initializer_range": 0.4}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), image_side=4 if fold > 1 else 0,
                                 image_fold=fold, prediction_offset=offset, max_positions=64, block_length=block_length)
    config._attn_implementation = attention
    model = MaskPredictor(config).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.25)
    return model


def text_canvas(prompts=(5, 3), answer=8, left=True):
    """Rows of prompts of these lengths, padded to one length, and masks: ids, keywords of `full`, editable."""
    longest = max(prompts)
    length = longest + answer
    ids = torch.zeros(len(prompts), length, dtype=torch.long)
    seen, editable = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for b, n in enumerate(prompts):
        start = longest - n if left else 0
        ids[b, start : start + n] = torch.arange(n) + 9 + b
        ids[b, start + n : start + n + answer] = MASK
        seen[b, start : start + n + answer] = True
        editable[b, start + n : start + n + answer] = True
    positions = (seen.long().cumsum(1) - 1).clamp(min=0)
    return ids, {"attention_mask": seen[:, None, None], "position_ids": positions}, editable


def picture_canvas():
    """Two rows: three words, a 4 x 4 picture of masks, two words to be filled in."""
    ids = torch.tensor([[2, 9, 4] + [MASK] * 16 + [5, MASK, MASK], [2, 10, 4] + [MASK] * 16 + [5, MASK, MASK]])
    grid = torch.full((2, 22, 2), -1)
    grid[:, 3:19] = torch.tensor([[k // 4, k % 4] for k in range(16)])
    return ids, {"grid": grid}, ids == MASK


def compared(cached, plain, log):
    """A predictor that asks both and notes the largest difference of their logits at places that are masked."""
    def predict(ids, where):
        a, b = cached(ids, where), plain(ids, where)
        asked = (ids.gather(1, where) == MASK).unsqueeze(-1)
        log.append(float(((a - b) * asked).abs().max()))
        return a
    return predict


def run(predict, ids, editable, policy=None, **options):
    *_, last = denoise(predict, ids, policy or policies.top_k(), editable=editable, mask_id=MASK,
                       **{"steps": None, **options})
    return last


EXACT = [
    pytest.param(lambda m, **i: prefix_cache(m, refresh_interval=1, **i), id="prefix"),
    pytest.param(lambda m, **i: dual_cache(m, refresh_interval=1, **i), id="dual"),
    pytest.param(lambda m, **i: image_cache(m, steps=8, columns=(0, 32), refresh_interval=1, **i), id="image interval"),
    pytest.param(lambda m, **i: image_cache(m, steps=8, columns=(0, 32), cache_ratio=0.0, warmup_ratio=0.0,
                                            refresh_interval=99, **i), id="image ratio"),
]


@pytest.mark.parametrize("make", EXACT)
@pytest.mark.parametrize("settings", [{}, {"kind": "qwen3"}, {"kind": "qwen2", "offset": 1},
                                      {"attention": "eager"}, {"fold": 2}], ids=str)
def test_the_exact_setting_is_the_uncached_loop(make, settings):
    model = make_model(**settings)
    ids, inputs, editable = picture_canvas() if "fold" in settings else text_canvas()
    log = []
    cached = make(model, **inputs)
    got = run(compared(cached, full(model, **inputs), log), ids, editable, policies.threshold(0.5), block=4)
    assert max(log) < 1e-9
    assert torch.equal(got.x, run(full(model, **inputs), ids, editable, policies.threshold(0.5), block=4).x)
    assert not bool((got.x[editable] == MASK).any()) and torch.equal(got.x[~editable], ids[~editable])


@pytest.mark.parametrize("make", [prefix_cache, dual_cache])
@pytest.mark.parametrize("left", [True, False])
def test_one_layer_is_exact_because_its_keys_know_nothing_of_other_places(make, left):
    model = make_model(layers=1)
    ids, inputs, editable = text_canvas(prompts=(5, 3, 4), left=left)
    cached, log = make(model, **inputs), []
    run(compared(cached, full(model, **inputs), log), ids, editable, policies.threshold(0.5), block=4)
    report = cached.report()
    assert max(log) < 1e-9
    assert report["refreshes"] == 3 * 2 and report["hits"] > 3 and report["computed_share"] < 1


@pytest.mark.parametrize("make", [
    prefix_cache, dual_cache, lambda m, **i: dual_cache(m, refresh_interval=3, **i), lambda m, **i: image_cache(
        m, steps=8, columns=(0, 24), cache_ratio=0.5, warmup_ratio=0.2, refresh_interval=3, **i)])
@pytest.mark.parametrize("settings", [{}, {"offset": 1}], ids=str)
def test_a_row_does_not_depend_on_its_batch_nor_on_padding(make, settings):
    model = make_model(**settings)
    policy = policies.threshold(0.5)
    alone = []
    for n, row in ((5, 0), (3, 1), (4, 2)):
        ids, inputs, editable = text_canvas(prompts=(n,))
        ids[0, :n] += row
        alone.append(run(make(model, **inputs), ids, editable, policy, block=4).x[0])
    for left in (True, False):
        ids, inputs, editable = text_canvas(prompts=(5, 3, 4), left=left)
        got = run(make(model, **inputs), ids, editable, policy, block=4).x
        for b, row in enumerate(alone):
            assert got[b][inputs["attention_mask"][b, 0, 0]].tolist() == row.tolist()


@pytest.mark.parametrize("make", [prefix_cache, dual_cache])
def test_folded_pictures_and_text_share_a_cache(make):
    model = make_model(layers=1, fold=2)
    ids, inputs, editable = picture_canvas()
    block = torch.zeros_like(ids)
    block[:, 20:] = 1  # the picture, then the words
    cached, log = make(model, **inputs), []
    run(compared(cached, full(model, **inputs), log), ids, editable, block=block)
    assert max(log) < 1e-9
    assert cached.report()["hits"] == 2 * (18 - 2)


def test_guidance_takes_a_cache_for_each_canvas():
    model = make_model(layers=1)
    ids, inputs, editable = text_canvas()
    other = masked_prompt(~editable & inputs["attention_mask"][:, 0, 0], MASK)
    caches = [dual_cache(model, **inputs) for _ in range(2)]
    got = run(guided(*caches, 2.0, other=other), ids, editable, block=4)
    plain = full(model, **inputs)
    assert torch.equal(got.x, run(guided(plain, plain, 2.0, other=other), ids, editable, block=4).x)
    assert caches[0].report() == caches[1].report() and caches[0].report()["hits"] > 0


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("settings", [{"kind": "qwen3", "block_length": 4},
                                      {"kind": "qwen2", "block_length": 4, "offset": 1}], ids=str)
def test_block_cache_is_the_model_under_a_block_causal_mask(apart, settings):
    model = make_model(**settings)
    ids, _, editable = text_canvas(prompts=(6, 6, 6), answer=10)
    ids[1, :6] += 5
    ids[2, 9], editable[2, 9] = 11, False  # a given word, amid masks
    blocks = (torch.arange(16) // 4).expand(3, 16)
    plain, cached, log = full(model, attention_mask=block_causal(blocks)), block_cache(model, apart=apart), []
    got = run(compared(cached, plain, log), ids, editable, policies.threshold(0.5), block=blocks)
    assert max(log) < 1e-9
    assert torch.equal(got.x, run(plain, ids, editable, policies.threshold(0.5), block=blocks).x)
    report = cached.report()
    assert report["computed_share"] < 0.5
    assert report["forwards"] == got.forwards if not apart else report["forwards"] > got.forwards


def test_block_cache_with_padding_and_blocks_of_each_rows_own():
    model = make_model(kind="qwen3", block_length=4)
    alone = []
    for n, row in ((6, 0), (3, 1)):
        ids, inputs, editable = text_canvas(prompts=(n,), answer=9)
        ids[0, :n] += row
        alone.append(run(block_cache(model), ids, editable, block=(torch.arange(n + 9) // 4)[None]).x[0])
    ids, inputs, editable = text_canvas(prompts=(6, 3), answer=9)
    blocks = inputs["position_ids"] // 4
    mask = inputs["attention_mask"] | torch.eye(15, dtype=torch.bool)  # padding sees itself, not nothing
    cached = block_cache(model, block=blocks, attention_mask=mask, position_ids=inputs["position_ids"])
    got = run(cached, ids, editable, block=blocks).x
    for b, row in enumerate(alone):
        assert got[b][inputs["attention_mask"][b, 0, 0]].tolist() == row.tolist()


def test_a_stored_conversation_goes_on_without_its_prompt_being_computed_again():
    model = make_model(kind="qwen3", block_length=4)
    ids = torch.tensor([[9, 10, 11, 12, 13, 14, 15, 16, MASK, MASK, MASK, MASK]])
    cached = block_cache(model)
    cached.store(ids)
    assert cached.report()["forwards"] == 1
    cached.store(ids)
    got = cached(ids, torch.tensor([[8, 9, 10, 11]]))
    assert cached.report()["forwards"] == 2 and cached.report()["computed_share"] == pytest.approx(12 / 24)
    want = full(model, attention_mask=block_causal((torch.arange(12) // 4)[None]))(ids, torch.tensor([[8, 9, 10, 11]]))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_keys_are_kept_rotated_and_that_is_the_same_as_rotating_all_of_them_in_each_pass():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model = make_model()
    ids, inputs, _ = text_canvas(prompts=(5,))
    cached = dual_cache(model, **inputs)
    unrotated = {}
    layer = model.trunk.layers[1].self_attn
    layer.k_proj.register_forward_hook(lambda module, args, out: unrotated.update(last=out))
    where = torch.arange(5, 13)[None]
    cached(ids, where)
    keys = unrotated["last"]
    ids = ids.clone()
    ids[0, 6] = 20
    cached(ids, torch.tensor([[5, 7, 8, 9, 10, 11, 12]]))
    keys = keys.index_copy(1, where[0], unrotated["last"]).view(1, 13, 2, 8).transpose(1, 2)
    cos, sin = model.trunk.rotary_emb(keys, position_ids=torch.arange(13)[None])
    assert torch.equal(apply_rotary_pos_emb(keys, keys, cos, sin)[1], cached.cache._keys[1])


def test_what_changes_outside_the_region_is_noticed():
    model = make_model()
    ids, inputs, _ = text_canvas(prompts=(5,))
    cached, where = dual_cache(model, **inputs), torch.arange(5, 13)[None]
    cached(ids, where)
    other = ids.clone()
    other[0, 2] = 20
    torch.testing.assert_close(cached(other, where), full(model, **inputs)(other, where), rtol=1e-9, atol=1e-9)
    longer = torch.cat([other, torch.full((1, 2), MASK)], 1)
    cached = dual_cache(model)
    cached(other, where)
    torch.testing.assert_close(cached(longer, where), full(model)(longer, where), rtol=1e-9, atol=1e-9)


def test_image_cache_computes_the_unsure_share_between_refreshes():
    model = make_model()
    ids, inputs, editable = text_canvas(prompts=(5, 3), answer=8)
    cached = image_cache(model, steps=8, columns=(0, 24), cache_ratio=0.75, refresh_interval=3, warmup_ratio=0.125,
                         **inputs)
    got = run(cached, ids, editable, steps=8)
    report = cached.report()
    # passes 0 and 1 are warm, then every third from 1 on: 4 and 7
    assert report["refreshes"] == 2 * 4 and report["hits"] == 2 * 4 and report["forwards"] == 8
    assert report["tokens_per_forward"] == 1 and not bool((got.x[editable] == MASK).any())
    # of 13 and 11 places those up to the quantile 1/4, which lies at the 4th, and between the 3rd and the 4th
    assert report["computed_share"] == pytest.approx((4 * 26 + 4 * (4 + 3)) / (8 * 26))


def test_reports_count_what_was_done():
    model = make_model()
    ids, inputs, editable = text_canvas(prompts=(5,), answer=8)
    cached = dual_cache(model, **inputs)
    got = run(cached, ids, editable, steps=4, block=4)
    assert got.forwards == 4
    assert cached.report() == {"forwards": 4, "hits": 2, "refreshes": 2, "tokens_per_forward": 2.0,
                               "computed_share": (2 * 13 + 2 * 4) / (4 * 13)}


@pytest.mark.parametrize("make, words", [
    (lambda m: prefix_cache(m, refresh_interval=0), "refresh_interval is 0"),
    (lambda m: block_cache(m), "no later blocks"),
    (lambda m: block_cache(m, block=torch.tensor([[1, 0]])), "fall"),
    (lambda m: image_cache(m, steps=0, columns=(24, 32)), "steps is 0"),
    (lambda m: image_cache(m, steps=4, columns=(24, 32), cache_ratio=1.5), "cache_ratio is 1.5"),
    (lambda m: image_cache(m, steps=4, columns=(24, 24)), "no"),
])
def test_bad_settings_are_named(make, words):
    with pytest.raises(InputError, match=words):
        make(make_model())


def test_what_cannot_be_cached_says_so():
    model = make_model(kind="qwen2")
    model.config.trunk = {**model.config.trunk, "layer_types": ["full_attention", "sliding_attention"]}
    with pytest.raises(InputError, match="sliding_attention"):
        dual_cache(model)
    model = make_model(fold=2)
    ids, inputs, _ = picture_canvas()
    with pytest.raises(InputError, match="whole squares"):
        block_cache(model, block=6, **inputs)(ids, torch.tensor([[3], [3]]))

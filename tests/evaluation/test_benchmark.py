"""The benchmark on models of a few thousand weights: exact levers give the plain loop's tokens, and are told if not.

Nothing here depends on how fast anything is.
"""

from __future__ import annotations

import pytest
import torch

from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.evaluation import bench_shapes, benchmark
from mmdlm.evaluation.bench_shapes import Shape
from mmdlm.evaluation.bench_workloads import Workload, describe_workload, shape_workload, text_workload
from mmdlm.evaluation.benchmark import Row, Setting
from mmdlm.evaluation.plain_loops import plain
from mmdlm.evaluation.sampling_settings import PLAIN, Levers, Sampling, sampled, states
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig


@pytest.fixture(scope="module")
def shape() -> Shape:
    """The small shape, smaller still."""
    small = bench_shapes.named_shape("small").config
    trunk = {**small.trunk, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    words = {**(small.vocabulary or {}), "text_size": 100, "image_start": 100, "image_size": 32}
    config = MaskPredictorConfig(trunk=trunk, vocabulary=words, max_positions=128)
    return Shape("tiny", config, (4, 4), 8, (2, 5), (6, 10), 16, 4, 16, 6, 3.0)


@pytest.fixture(scope="module")
def model(shape: Shape) -> MaskPredictor:
    return bench_shapes.random_model(shape, device="cpu", dtype=torch.float32, seed=0)


@pytest.mark.parametrize(("task", "rows"), [("t2i", 1), ("t2i", 3), ("text", 1), ("text", 3)])
def test_exact_settings_give_the_plain_loops_tokens(task: str, rows: int, shape: Shape, model: MaskPredictor):
    work = shape_workload(shape, task, rows, 1, "cpu")
    settings = benchmark.settings_of(work, trained=True)
    found = benchmark.measure(model, work, settings, pairs=1)
    assert benchmark.unequal(found) == []
    exact = [row for row in found if row.exact]
    assert exact[-1].name == "+ projections fused"  # on a CPU they do not pay: not among all
    [every] = [row for row in exact if benchmark.LAST_EXACT in row.name]
    assert {row.forwards for row in exact} == {work.steps}
    # a picture's padding is not computed, and its first unprompted pass neither
    least = 1.0 if task == "text" else 0.8
    assert every.places is not None and every.places <= least
    names = {row.name for row in found if not row.exact}
    assert ("image_cache" if task == "t2i" else "threshold 0.9, dual_cache") in names
    assert all(len(row.seconds) >= 1 and len(row.ratios) == len(row.seconds) for row in found)
    page = benchmark.table(found, work, float32=True)
    assert page.count("\n") == 1 + len(found) and "SHOULD BE" not in page


def test_the_plain_loop_fills_every_place_by_its_schedule(shape: Shape, model: MaskPredictor):
    work = shape_workload(shape, "text", 2, 0, "cpu")
    passes = list(plain(model, work))
    left = [(ids == work.mask_id).sum(dim=1).tolist() for ids in passes]
    assert left == [[15 - step] * 2 for step in range(16)]  # a token a pass
    picture = shape_workload(shape, "t2i", 2, 0, "cpu")
    left = [(ids == picture.mask_id).sum(dim=1).tolist() for ids in plain(model, picture)]
    assert left == [[15, 15], [13, 13], [11, 11], [8, 8], [4, 4], [0, 0]]  # floor(16 cos(pi/2 (k + 1) / 6)), then none


def test_a_setting_that_is_not_exact_is_found_out(shape: Shape, model: MaskPredictor):
    work = shape_workload(shape, "t2i", 2, 0, "cpu")
    wrong = Setting("an exact one, it says", True, Sampling(steps=2))
    found = benchmark.measure(model, work, [wrong], pairs=1)
    assert benchmark.unequal(found) == [wrong.name] and found[1].agreement < 1
    assert "SHOULD BE EQUAL" in benchmark.table(found, work, float32=True)
    assert "half precision" in benchmark.table(found, work, float32=False)


def test_guidance_in_part_of_the_steps(shape: Shape, model: MaskPredictor):
    work = shape_workload(shape, "t2i", 1, 0, "cpu")
    always, none, half = (
        list(sampled(model, work, sampling))[-1]
        for sampling in (Sampling(), Sampling(scale=1.0), Sampling(guidance=(0.7, 1.0)))
    )
    assert torch.equal(always, list(sampled(model, work, Sampling(guidance=(0.0, 1.0))))[-1])
    assert not torch.equal(always, none) and not torch.equal(half, none)


def test_a_cache_in_its_exact_setting_is_no_cache(shape: Shape, model: MaskPredictor):
    text = shape_workload(shape, "text", 2, 0, "cpu")
    uncached = list(sampled(model, text, Sampling()))[-1]
    for name in ("prefix_cache", "dual_cache"):
        ids = list(sampled(model, text, Sampling(cache={"name": name, "refresh_interval": 1})))[-1]
        assert torch.equal(ids, uncached)
    with pytest.raises(InputError, match="expected one of prefix_cache, dual_cache"):
        next(states(model, text, Sampling(cache={"name": "fast"})))


def test_shapes_have_the_8bs_proportions():
    small, large = bench_shapes.named_shape("small"), bench_shapes.named_shape("8b")
    assert bench_shapes.head_over_trunk(small.config) == bench_shapes.head_over_trunk(large.config)
    assert round(bench_shapes.head_over_trunk(large.config), 4) == 0.0790
    words = small.config.shared_vocabulary, large.config.shared_vocabulary
    assert [round(each.image_size / each.table_rows, 4) for each in words] == [0.0608, 0.0608]
    assert [shape.grid[0] * shape.grid[1] // shape.room for shape in (small, large)] == [2, 2]
    with pytest.raises(InputError, match="expected small"):
        bench_shapes.named_shape("9b")


def test_a_model_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(bench_shapes, "_free_memory", lambda: 2.0**30)
    with pytest.raises(InputError, match=r"1\.0 GiB are free: take --shape small"):
        bench_shapes.random_model(bench_shapes.named_shape("8b"), device="cpu", dtype=torch.bfloat16, seed=0)


def test_the_widened_model_predicts_what_the_small_one_does():
    small = MaskPredictor.from_pretrained(shipped_model() / "model", dtype=torch.float32).eval()
    trunk = {**small.config.trunk, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 7,
             "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    rows = {**small.vocabulary.to_dict(), "rows": 3200}
    wide = bench_shapes.widened(small, MaskPredictorConfig(trunk=trunk, vocabulary=rows))
    assert wide.head.weight.shape == (3200, 256) and len(wide.trunk.layers) == 7
    codes = torch.randint(1024, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    work = describe_workload(codes, (16, 16), small.vocabulary, answer=6, steps=3)
    ids, positions, grid = work.rows.canvas.ids, work.rows.canvas.positions, work.rows.canvas.grid
    with torch.no_grad():
        one, other = (each(ids, position_ids=positions, grid=grid).logits for each in (small, wide))
    assert torch.allclose(one, other[..., : one.shape[-1]], atol=2e-4)
    assert torch.equal(*(list(plain(each, work))[-1] for each in (small, wide)))
    with pytest.raises(InputError, match="expected a smaller Llama"):
        bench_shapes.widened(wide, small.config)


def test_workloads_of_predictors_of_any_size(shape: Shape, model: MaskPredictor):
    own = bench_shapes.shape_of(shape.config)
    assert own.grid == (8, 8) and own.answer == 32 and own.given[1] + own.answer <= 128
    for task in ("t2i", "text"):
        work = shape_workload(own, task, 1, 0, "cpu")
        assert work.padded.canvas.ids.shape[1] <= 128
    with pytest.raises(InputError, match="needs a trained model"):
        shape_workload(own, "describe", 1, 0, "cpu")


def test_rows_of_other_lengths_share_the_plain_loop(shape: Shape, model: MaskPredictor):
    words = shape.config.shared_vocabulary
    prompts = [[20, 21, 22], [30], [40, 41]]
    work = text_workload(prompts, words, answer=8, steps=8, block=4)
    assert work.rows.mask is not None
    alone = [text_workload([prompt], words, answer=8, steps=8, block=4) for prompt in prompts]
    whole = list(plain(model, work))[-1]
    assert torch.equal(whole, torch.cat([list(plain(model, each))[-1] for each in alone]))


def test_one_of_the_first_serves_two(shape: Shape):
    order: list[str] = []
    clock = iter(range(100))

    def timed(name: str):
        return lambda: order.append(name) or float(next(clock))

    first, others = benchmark.in_turn(timed("P"), [timed("A"), timed("B"), timed("C")], 1)  # type: ignore[arg-type]
    assert order == ["P", "A", "B", "P", "C"]
    assert first == [0.0, 3.0] and others == [[(0.0, 1.0)], [(3.0, 2.0)], [(3.0, 4.0)]]


def test_settings_by_words(shape: Shape):
    settings = benchmark.settings_of(shape_workload(shape, "text", 1, 0, "cpu"), trained=False)
    assert "threshold 0.9" not in {setting.name for setting in settings}  # a random model is never sure
    assert [setting.name for setting in benchmark.chosen(settings, "prefix, dual_cache")][:2] == [
        "prefix_cache", "dual_cache",
    ]  # fmt: skip
    with pytest.raises(InputError, match="No setting is called 'magic'"):
        benchmark.chosen(settings, "magic")


def test_levers_are_named_once():
    assert PLAIN._fields == Levers._fields and not any(PLAIN)
    assert Row._fields[:2] == ("name", "exact") and Workload._fields[0] == "task"

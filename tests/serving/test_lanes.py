"""Lanes and adapters: how a step is shared out, and that neither changes what comes of a request."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from mmdlm.models.adapters import load_adapter
from mmdlm.pipelines import TextToImage
from mmdlm.serving.engine import Engine, Pass
from mmdlm.serving.jobs import Job, Studio
from mmdlm.serving.lanes import Lanes, fair_share


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, adapters: dict[str, Path]) -> TextToImage:
    """A pipeline whose model holds two adapters."""
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    for name, place in adapters.items():
        load_adapter(pipe.model, place, name=name)
    return pipe


def test_a_lane_takes_its_share_in_the_order_of_waiting():
    def take(free: list[int], taken: list[int], lanes: int) -> list[int]:
        return fair_share(free, taken, lambda item: item, lanes)

    assert take([9], [], 2) == [9]
    assert take([4, 4, 4, 4], [], 2) == [4, 4]
    assert take([4, 4], [4, 4], 2) == [4, 4]  # the other lane has its half
    assert take([4, 4, 4], [4], 2) == [4, 4]  # one is left to it
    assert take([1, 99], [], 2) == [1]
    assert take([99, 1], [], 2) == [99]
    assert take([1, 2, 3], [50], 1) == [1, 2, 3]


def test_lanes_share_the_weights(adapted):
    lanes = Lanes(adapted.model, 2)
    first, second = lanes.models
    assert first is not second
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_lanes_make_steps_of_their_own(adapted, picture):
    """Two lanes are in a step at once; one of them is held there, and the other goes on without it."""
    studio, together, held = Studio(adapted), threading.Barrier(2, timeout=30), threading.Event()
    made = Counter[int]()

    def watch(seen: Pass) -> None:
        lane = threading.get_ident()
        made[lane] += 1
        if made[lane] == 1:
            together.wait()  # broken unless both are there at once
            if seen.rows == 2:
                assert held.wait(30)

    engine = Engine(adapted.model, adapted.processor.vocabulary.mask_id, lanes=2, watch=watch)
    slow = studio.drawing("a red apple", seed=0, num_inference_steps=9, guidance_scale=2.0)
    quick = studio.describing(picture(0), seed=0, num_inference_steps=9)
    waits, goes = engine.submit_all([slow, quick])
    assert goes.future.result(60).done.all() and not waits.future.done()
    late = engine.submit(studio.describing(picture(1), seed=0, num_inference_steps=3)).future.result(60)
    assert late.done.all() and not waits.future.done()
    held.set()
    assert waits.future.result(60).done.all()
    assert engine.stop(60) and min(made.values()) >= 1


def test_lanes_and_adapters_change_no_result(adapted, adapters, picture):
    """Rows of two adapters and of none, of all tasks: together in two lanes and in one as alone in one."""
    studio, passes = Studio(adapted), list[Pass]()
    names = [None, *adapters]

    def jobs() -> list[Job]:
        made = []
        for i in range(9):
            if i % 3 == 0:
                made.append(studio.drawing("two yellow stars", seed=i, num_inference_steps=4, guidance_scale=2.0))
            elif i % 3 == 1:
                made.append(studio.describing(picture(i), seed=i, temperature=0.0, num_inference_steps=5))
            else:
                made.append(studio.asking(picture(i), "how many?", seed=i, temperature=0.7))
            made[-1].adapter = names[i // 3]
        return made

    results = {}
    for how, lanes in (("alone", 1), ("together", 1), ("in lanes", 2)):
        engine = Engine(adapted.model, adapted.processor.vocabulary.mask_id, lanes=lanes, watch=passes.append)
        if how == "alone":
            states = [engine.submit(job).future.result(60) for job in jobs()]
        else:
            states = [ticket.future.result(60) for ticket in engine.submit_all(jobs())]
        assert engine.stop(60)
        results[how] = [state.x for state in states]
    assert max(seen.jobs for seen in passes) == 9
    for how in ("together", "in lanes"):
        assert all(torch.equal(a, b) for a, b in zip(results["alone"], results[how], strict=True)), how
    # and the adapters do something: the same requests of the model itself come out differently
    plain = Engine(adapted.model, adapted.processor.vocabulary.mask_id, lanes=1)
    others = jobs()
    for job in others:
        job.adapter = None
    base = [plain.submit(job).future.result(60).x for job in others]
    plain.stop(60)
    assert [torch.equal(a, b) for a, b in zip(base, results["alone"], strict=True)][:3] == [True] * 3
    assert not all(torch.equal(a, b) for a, b in zip(base[3:], results["alone"][3:], strict=True))


def test_what_breaks_in_one_lane_stays_in_it(adapted, picture):
    engine = Engine(adapted.model, adapted.processor.vocabulary.mask_id, lanes=2)
    studio = Studio(adapted)
    good, poison = studio.describing(picture(0), seed=0), studio.drawing("a red apple", seed=1)
    poison.canvas.ids[0, 0] = 10**6  # no id of the table
    fine, bad = engine.submit_all([good, poison])
    assert fine.future.result(60).done.all()
    with pytest.raises(IndexError):
        bad.future.result(60)
    assert engine.stop(60)

"""The engine on a tiny model: whoever shares forwards gets what he gets alone; order, room, cancelling, failing."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmdlm.errors import InputError
from mmdlm.pipelines import ImageToText, TextToImage
from mmdlm.serving.engine import Busy, Engine, Late, Pass
from mmdlm.serving.forward import shared_forward
from mmdlm.serving.jobs import Studio

PROMPTS = ["a red apple", "a blue car on a green background", "two yellow stars"]


def noise(seed: int, side: int = 16) -> bytes:
    buffer = io.BytesIO()
    levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(levels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def draw(tiny_model: Path) -> TextToImage:
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def tell(draw: TextToImage) -> ImageToText:
    pipe = ImageToText(draw.model, draw.visual_tokenizer, draw.processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def studio(draw: TextToImage) -> Studio:
    return Studio(draw)


@pytest.fixture
def started(draw: TextToImage):
    """A function that starts engines of one lane, whose steps can be counted; all of them stopped at the end."""
    engines: list[Engine] = []

    def start(**settings: object) -> Engine:
        engines.append(Engine(draw.model, draw.processor.vocabulary.mask_id, **{"lanes": 1, **settings}))
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop(0)


class Gate:
    """A watcher that holds the engine's thread after each forward until it is let go on, and keeps what it saw."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.go = threading.Semaphore(0)
        self.made = threading.Semaphore(0)

    def __call__(self, seen: Pass) -> None:
        self.passes.append(seen)
        self.made.release()
        assert self.go.acquire(timeout=30)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.go.release()
            assert self.made.acquire(timeout=30)

    def open(self) -> None:
        for _ in range(10_000):
            self.go.release()


def some_jobs(studio: Studio) -> list:
    return [
        studio.drawing(PROMPTS[0], seed=1, num_inference_steps=5, guidance_scale=2.0),
        studio.describing(noise(0), seed=2, num_inference_steps=7, max_tokens=9),
        studio.drawing(PROMPTS[1], seed=3, num_inference_steps=3, guidance_scale=1.0, temperature=0),
        studio.asking(noise(1), "how many?", seed=4, temperature=0),
        studio.drawing(PROMPTS[2], seed=5, num_inference_steps=4, guidance_scale=1.0, temperature=0.7, top_p=0.9),
        studio.asking(noise(2, side=30), "what colour is it?", seed=6, num_inference_steps=2, temperature=1.0),
    ]


def test_a_shared_forward_gives_each_row_its_own_logits(studio, draw):
    jobs, questions = some_jobs(studio), []
    for job in jobs:
        job.start(draw.processor.vocabulary.mask_id)
        questions += job.questions(job.first)
    together = shared_forward(draw.model, questions)
    for question, logits in zip(questions, together, strict=True):
        assert logits.shape == (len(question.where), question.columns[1] - question.columns[0])
        whole = draw.model(question.ids[None], position_ids=question.positions[None], grid=question.grid[None]).logits
        alone = whole[0, question.where, slice(*question.columns)]
        assert torch.allclose(logits, alone, atol=1e-5)


def test_every_request_of_a_mixed_batch_comes_out_as_it_does_alone(studio, started):
    """Rows of all tasks, lengths, steps and draws; the order of arrival is turned around the second time."""
    passes: list[Pass] = []
    engine = started(watch=passes.append)
    alone = [engine.submit(job).future.result(30) for job in some_jobs(studio)]
    assert max(seen.jobs for seen in passes) == 1
    passes.clear()
    for turn in (1, -1):
        tickets = engine.submit_all(some_jobs(studio)[::turn])
        for ticket, state in zip(tickets, alone[::turn], strict=True):
            assert torch.equal(ticket.future.result(30).x, state.x)
            assert torch.allclose(ticket.future.result().confidence, state.confidence, atol=1e-5)
    assert max(seen.jobs for seen in passes) == 6 and max(seen.rows for seen in passes) == 7
    assert len(passes) < 2 * 16 + 2  # the slowest has 16 steps


def test_the_engine_gives_what_the_pipelines_give(studio, started, draw, tell):
    engine, vocabulary = started(), draw.processor.vocabulary
    for scale in (1.0, 2.5):
        drawn = draw(PROMPTS[0], generator=[torch.Generator().manual_seed(3)], guidance_scale=scale).codes
        state = engine.submit(studio.drawing(PROMPTS[0], seed=3, guidance_scale=scale)).future.result(30)
        assert torch.equal(vocabulary.image_codes(state.x[:, -17:-1]).view(1, 4, 4), drawn)
    for job, expected in [
        (studio.describing(noise(0), seed=0), tell(noise(0))),
        (studio.asking(noise(0), "how many?", seed=0), tell(noise(0), "how many?")),
    ]:
        state = engine.submit(job).future.result(30)
        assert draw.processor.text(state.x[job.canvas.editable]) == expected.texts[0]


def test_a_new_one_joins_at_the_next_step_and_a_finished_one_leaves_at_once(studio, started):
    gate = Gate()
    engine = started(watch=gate)
    first = engine.submit(studio.drawing(PROMPTS[0], seed=0, num_inference_steps=4, guidance_scale=1.0))
    assert gate.made.acquire(timeout=30)
    second = engine.submit(studio.drawing(PROMPTS[1], seed=0, num_inference_steps=6, guidance_scale=1.0))
    gate.step(6)
    assert first.future.done() and not any(seen.waiting for seen in gate.passes[1:])
    assert [seen.jobs for seen in gate.passes] == [1, 2, 2, 2, 1, 1, 1]
    assert second.future.done()
    gate.open()


def test_the_budget_bounds_a_forward_and_nobody_overtakes(studio, started):
    """Two short rows are let in one after the other; the long one that does not fit keeps its turn before a short."""
    gate = Gate()
    short = [studio.drawing("a", seed=i, num_inference_steps=n, guidance_scale=1.0) for i, n in enumerate((2, 3, 1))]
    guided = studio.drawing(PROMPTS[1], seed=9, num_inference_steps=1, guidance_scale=2.0)
    engine = started(watch=gate, budget=2 * guided.length)
    tickets = [engine.submit(job) for job in short[:2]]
    assert gate.made.acquire(timeout=30)
    tickets += [engine.submit(guided), engine.submit(short[2])]
    gate.step(4)
    assert all(seen.rows * seen.length <= engine.budget for seen in gate.passes)
    assert tickets[2].future.done()
    gate.open()
    tickets[3].future.result(30)
    assert engine.stop(30)  # the last pass is reported after its row has its result
    order = [(seen.jobs, seen.rows) for seen in gate.passes]
    guided_at = order.index((1, 2))
    assert guided_at == len(order) - 2 and order[-1] == (1, 1), order


def test_a_client_with_many_requests_does_not_keep_another_waiting(studio, started):
    gate = Gate()
    jobs = [studio.drawing("a", seed=i, num_inference_steps=2, guidance_scale=1.0) for i in range(9)]
    engine = started(watch=gate, budget=2 * jobs[0].length)
    many = [engine.submit(job, client="many") for job in jobs[:8]]
    assert gate.made.acquire(timeout=30)
    one = engine.submit(jobs[8], client="one")
    gate.step(4)
    assert one.future.done() and sum(ticket.future.done() for ticket in many) <= 3
    gate.open()
    finished = [ticket.future.result(30) for ticket in many]
    assert len(finished) == 8


def test_a_cancelled_one_leaves_the_batch_and_touches_no_other(studio, started):
    gate = Gate()
    engine = started(watch=gate)
    alone = studio.drawing(PROMPTS[0], seed=4, num_inference_steps=6)
    stays = engine.submit(alone)
    leaves = engine.submit(studio.drawing(PROMPTS[1], seed=0, num_inference_steps=500))
    assert gate.made.acquire(timeout=30)
    gate.step(2)
    assert leaves.future.cancel()
    gate.step(1)
    gate.open()
    x = stays.future.result(30).x
    assert leaves.future.cancelled() and gate.passes[-1].jobs == 1
    assert torch.equal(engine.submit(alone).future.result(30).x, x)


def test_a_deadline_passes_while_waiting_or_running(studio, started):
    engine = started(watch=lambda seen: time.sleep(0.02))
    slow = studio.drawing(PROMPTS[0], seed=0, num_inference_steps=500, guidance_scale=1.0)
    running = engine.submit(slow, seconds=0.1)
    with pytest.raises(Late, match="deadline"):
        running.future.result(30)
    assert engine.submit(studio.drawing("a", seed=0)).future.result(30).done.all()


def test_a_full_queue_says_when_to_come_again_and_takes_all_of_a_request_or_nothing(studio, started):
    gate = Gate()
    jobs = [studio.drawing("a", seed=i, num_inference_steps=1, guidance_scale=1.0) for i in range(5)]
    engine = started(watch=gate, budget=jobs[0].length, queue=2)
    engine.submit(jobs[0])
    assert gate.made.acquire(timeout=30)
    engine.submit(jobs[1])
    with pytest.raises(Busy, match=r"queue is full .1 of 2 waiting") as raised:
        engine.submit_all(jobs[2:4])
    assert raised.value.retry_after >= 1 and engine.waiting == 1
    engine.submit(jobs[4])
    gate.open()


def test_what_was_accepted_is_finished_before_it_stops(studio, started):
    engine = started()
    tickets = engine.submit_all([studio.drawing("a", seed=i) for i in range(4)])
    assert engine.stop(60) and engine.closed
    assert all(ticket.future.result(0).done.all() for ticket in tickets)
    with pytest.raises(Busy, match="shutting down"):
        engine.submit(studio.drawing("a", seed=0))


def test_stopping_in_a_hurry_leaves_nobody_hanging(studio, started):
    engine = started(watch=lambda seen: time.sleep(0.02))
    ticket = engine.submit(studio.drawing("a", seed=0, num_inference_steps=900))
    waits = engine.submit(studio.drawing("a", seed=0, num_inference_steps=900))
    assert not engine.stop(0.05)
    for one in (ticket, waits):
        with pytest.raises(Busy, match="was stopped"):
            one.future.result(5)


def test_what_goes_wrong_in_one_row_stays_in_it(studio, started, caplog):
    """A listener that raises, and a canvas that breaks the forward it shares, for real: an id out of the table."""
    engine = started()
    good = studio.drawing(PROMPTS[0], seed=4)
    expected = engine.submit(good).future.result(30).x

    def broken(state):
        raise RuntimeError("this listener is broken")

    poison = studio.drawing(PROMPTS[1], seed=1)
    poison.canvas.ids[0, 0] = 10**6
    jobs = [poison, good, studio.drawing(PROMPTS[2], seed=0)]
    bad, fine, deaf = engine.submit_all(jobs, on_states=[None, None, broken])
    assert torch.equal(fine.future.result(30).x, expected)
    with pytest.raises(RuntimeError, match="listener is broken"):
        deaf.future.result(30)
    with pytest.raises(IndexError):
        bad.future.result(30)
    assert "tried alone" in caplog.text


def test_states_are_told_as_they_come(studio, started):
    seen: list[int] = []
    job = studio.drawing("a", seed=0, num_inference_steps=5)
    started().submit(job, on_state=lambda state: seen.append(int(state.written.sum()))).future.result(30)
    assert len(seen) == 5 and sum(seen) == 16


def test_a_picture_is_encoded_once(studio):
    first = studio.codes(noise(3))
    assert studio.codes(noise(3)) is first and studio.codes(noise(4)) is not first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: s.drawing(" ", seed=0), "The prompt is empty"),
        (lambda s: s.drawing("x" * 200, seed=0), "too long by .* tokens, the model has 64 positions"),
        (lambda s: s.drawing("x", seed=0, guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda s: s.drawing("x", seed=0, num_inference_steps=0), "num_inference_steps is 0"),
        (lambda s: s.drawing("x", seed=0, num_inference_steps=10**6), "num_inference_steps is 1000000"),
        (lambda s: s.drawing("x", seed=0, temperature=-1.0), "temperature is -1.0"),
        (lambda s: s.drawing("x", seed=0, top_p=1.5), "top_p is 1.5"),
        (lambda s: s.describing(b"no picture", seed=0), "no picture that can be read"),
        (lambda s: s.describing(noise(0), seed=0, max_tokens=0), "max_tokens is 0"),
        (lambda s: s.asking(noise(0), "", seed=0), "question is empty"),
    ],
)
def test_a_bad_request_is_one_sentence_before_it_meets_others(studio, make, words):
    with pytest.raises(InputError, match=words) as raised:
        make(studio)
    assert "\n" not in str(raised.value)


def test_a_request_that_can_never_fit_is_refused(studio, started):
    job = studio.drawing("a", seed=0, guidance_scale=2.0)
    with pytest.raises(InputError, match=r"takes 2 x .* tokens, this server's budget is 32"):
        started(budget=32).submit(job)
    with pytest.raises(InputError, match="budget is 0"):
        started(budget=0)

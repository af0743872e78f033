"""Forwards by length, and guidance before the head: equal to one forward for all and each row's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdlm.pipelines import TextToImage
from mmdlm.sampling.predictors import guide
from mmdlm.serving.forward import LAYOUTS, LENGTHS, Layouts, guided_forward, shared_forward
from mmdlm.serving.jobs import Job, Studio


@pytest.fixture(scope="module")
def pipe(tiny_model: Path) -> TextToImage:
    made = TextToImage.from_pretrained(tiny_model)
    made.set_progress_bar_config(disable=True)
    return made


def some_jobs(pipe: TextToImage, picture) -> list[Job]:
    """Of all tasks, four lengths, two places to be asked fewer of."""
    studio = Studio(pipe)
    jobs = [
        studio.drawing("a red apple", seed=1, guidance_scale=2.0),
        studio.describing(picture(0), seed=2, max_tokens=9),
        studio.drawing("a blue car on a green background", seed=3, guidance_scale=0.0),
        studio.asking(picture(1), "how many?", seed=4),
        studio.drawing("two yellow stars", seed=5, guidance_scale=1.0),
        studio.describing(picture(2), seed=6, max_tokens=9),
        studio.drawing("a red apple", seed=7, guidance_scale=3.5),
    ]
    for job in jobs:
        job.start(pipe.processor.vocabulary.mask_id)
    return jobs


@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_guidance_before_the_head_in_forwards_by_length_gives_the_same_logits(pipe, picture, monkeypatch, multiple):
    monkeypatch.setattr("mmdlm.serving.forward.LENGTHS", multiple)
    jobs, layouts = some_jobs(pipe, picture), Layouts()
    pairs = [job.questions(job.first) for job in jobs]
    own = iter(shared_forward(pipe.model, [question for pair in pairs for question in pair]))
    expected = []
    for pair, job in zip(pairs, jobs, strict=True):
        branches = [next(own).unsqueeze(0) for _ in pair]
        expected.append((branches[0] if len(pair) == 1 else guide(*branches, job.scale))[0])
    for _ in range(2):  # the second time with the layouts that were kept
        found = guided_forward(pipe.model, [(p, j.scale) for p, j in zip(pairs, jobs, strict=True)], layouts)
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, atol=1e-5, rtol=1e-5)


def test_what_a_row_is_padded_to_hangs_on_its_own_request(pipe, picture):
    """So its sums are made in one order, alone and beside others, and two rows of a guided job stand together."""
    jobs = some_jobs(pipe, picture)
    pairs = [(job.questions(job.first), job.scale) for job in jobs]

    def padded(asked: list) -> dict[int, int]:
        layouts = Layouts()
        guided_forward(pipe.model, asked, layouts)
        found = {}
        for layout in layouts.kept:
            assert layout.mask is not None  # with one or without, also where it hides nothing, is not the same sum
            found |= {id(grid): layout.grid.shape[1] for _, grid in layout.of}
        return found

    together = padded(pairs)
    assert len(together) == sum(map(len, (pair for pair, _ in pairs))) and len(set(together.values())) > 1
    for (pair, scale), job in zip(pairs, jobs, strict=True):
        alone = padded([(pair, scale)])
        assert set(alone.values()) == {-(-job.length // LENGTHS) * LENGTHS}
        assert all(together[grid] == length for grid, length in alone.items())


def test_a_layout_is_kept_for_the_same_canvases_in_the_same_order(pipe, picture):
    jobs, layouts = some_jobs(pipe, picture), Layouts()
    rows = [job.questions(job.first)[0] for job in jobs]
    captions, length = [rows[1], rows[5]], len(rows[1].ids)
    first = layouts.of(pipe.model, captions, length)
    again = [job.questions(job.first)[0] for job in (jobs[1], jobs[5])]  # other questions about the same canvases
    assert layouts.of(pipe.model, again, length) is first
    assert layouts.of(pipe.model, captions, length + 1) is not first
    assert layouts.of(pipe.model, captions[::-1], length) is not first
    assert layouts.of(pipe.model, captions[:1], length) is not first
    for more in range(LAYOUTS - 3):
        assert len(layouts.of(pipe.model, captions, length + 2 + more).grid[0]) == length + 2 + more
    assert layouts.of(pipe.model, captions, length) is not first and len(layouts.kept) == LAYOUTS  # it is forgotten

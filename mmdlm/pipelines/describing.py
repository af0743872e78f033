"""Words from pictures: captions and answers, by LLaDA's decoding (arXiv:2502.09992).

Shape letters: B rows, L positions, W places of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.pipelines import layouts
from mmdlm.pipelines.pipeline import Generators, MMDLMPipeline, StepCallback, cache_report
from mmdlm.processing import MMDLMProcessor, Picture
from mmdlm.sampling.denoise import Predictor
from mmdlm.sampling.formats import Formats, Span
from mmdlm.sampling.replay import Recording
from mmdlm.sequence import Canvas

Token = tuple[str, float]  # a token's text and the probability at which it was drawn; 1 where it was given


@dataclass
class TextsOutput(BaseOutput):
    """`texts`: B answers. `confidences`: the geometric mean of each answer's token probabilities, in [0, 1].

    `tokens`: every answer token by token, its end included; `ids`: int64 [B, W], the whole answer areas. `forwards`:
    passes of the loop; `tokens_per_forward`: places written in one, of one row; `cache`: what the cache reports.
    """

    texts: list[str]
    confidences: list[float]
    tokens: list[list[Token]]
    ids: Tensor
    forwards: int = 0
    tokens_per_forward: float = 0.0
    cache: dict[str, float] | None = None


class ImageToText(MMDLMPipeline):
    """A picture -> its caption, or the answer to a question about it."""

    @torch.no_grad()
    def __call__(
        self,
        images: Picture | Sequence[Picture],
        question: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        policy: Mapping[str, Any] | None = None,
        draw: Mapping[str, Any] | None = None,
        pattern: str | None = None,
        cache: Mapping[str, Any] | None = None,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
        replay: Recording | None = None,
    ) -> TextsOutput:
        """Describe every picture, or answer `question`: one for all pictures, or one for each.

        Pictures are Pillow pictures, paths or the bytes of files. What is None comes from the model's preset
        "describe", or "ask". `policy`, `draw`: {"name": ..., **settings}, see `policy_from_config`. `pattern`: a
        regular expression that every answer must match as a whole (`pattern_of_schema` makes one of a JSON schema).
        `cache`: {"name": "dual_cache", **settings}, see `cached_from_config`; {} for none.
        `callback_on_step_end(pipe, step, share still undecided, {"ids": best guess [B, W]})`. `replay`: records every
        step, or plays the steps it holds.

        Raises InputError for a bad picture (see `load_image`), an empty question, one longer than the model's
        positions, and a pattern that nothing of the answer's length matches.
        """
        task = "describe" if question is None else "ask"
        settings = self._settings(task, num_inference_steps=num_inference_steps, policy=policy, draw=draw,
                                  cache=cache)
        canvas, predict = self.prepare(images, question, settings["answer_length"], settings)
        model = predict
        rows, vocabulary = len(canvas.ids), self.processor.vocabulary
        first_id = vocabulary.text_columns[0]
        chosen = None
        if pattern is not None:
            machine = self._automaton(pattern, ends=True)
            spans = [Span(row, places.nonzero()[:, 0], machine) for row, places in enumerate(canvas.editable.cpu())]
            formats = Formats(spans, mask_id=vocabulary.mask_id, first_id=first_id)
            predict, chosen = formats.predict(predict), formats.draw_from_config(settings["draw"])
        states = self._run(canvas, predict, settings, first_id=first_id, generator=generator, draw=chosen,
                           replay=replay)
        for step, state in enumerate(states):
            if callback_on_step_end is not None:
                undecided = (state.x == vocabulary.mask_id)[canvas.editable].float().mean()
                tensors = {"ids": state.x0[canvas.editable].view(rows, -1)}
                callback_on_step_end(self, step, float(undecided), tensors)
        answers = state.x[canvas.editable].view(rows, -1)
        sure = state.confidence[canvas.editable].view(rows, -1)
        return TextsOutput(
            texts=[self.processor.text(answer) for answer in answers],
            confidences=_geometric_means(sure, answers == vocabulary.eos_id),
            tokens=[told_apart(self.processor, *row) for row in zip(answers, sure, strict=True)],
            ids=answers,
            forwards=state.forwards,
            tokens_per_forward=answers.shape[1] / max(state.forwards, 1),
            cache=cache_report(model),
        )

    def prepare(
        self,
        images: Picture | Sequence[Picture],
        question: str | Sequence[str] | None,
        answer_length: int,
        settings: Mapping[str, Any] | None = None,
    ) -> tuple[Canvas, Predictor]:
        """The canvas [B, L] whose places for the answer are masked, and the predictor that fills them.

        `settings`: whose cache is used, if they have one.
        """
        pixels = self.processor.pixels(images).to(self._execution_device, self.visual_tokenizer.dtype)
        codes = self.visual_tokenizer.encode(pixels)
        questions = [question] * len(codes) if question is None or isinstance(question, str) else list(question)
        if len(questions) != len(codes):
            raise InputError(f"Got {len(questions)} questions about {len(codes)} pictures, expected 1 or as many.")
        if not all(asked is None or asked.strip() for asked in questions):
            raise InputError('The question is empty, expected for example "what colour is it?".')
        rows = [
            layouts.answer_canvas(row, asked, answer_length, self.grid, self.processor, self.family)
            for row, asked in zip(codes, questions, strict=True)
        ]
        canvas, mask = self._batch(rows, "question")
        return canvas, self._predictor(canvas, mask, self.processor.vocabulary.text_columns, settings)


def told_apart(processor: MMDLMProcessor, ids: Tensor, confidence: Tensor) -> list[Token]:
    """A text's tokens [W], up to and with its end, each with its confidence [W]."""
    listed = ids.tolist()
    end = listed.index(processor.vocabulary.eos_id) + 1 if processor.vocabulary.eos_id in listed else len(listed)
    words = (str(processor.tokenizer.decode([token])) for token in listed[:end])
    return list(zip(words, confidence[:end].tolist(), strict=True))


def _geometric_means(probabilities: Tensor, ends: Tensor) -> list[float]:
    """The geometric mean of each row of `probabilities` [B, W], up to and with the first of its `ends` [B, W]."""
    within = ends.cumsum(1) - ends.long() == 0
    logs = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() * within
    means: list[float] = (logs.sum(1) / within.sum(1)).exp().tolist()
    return means

"""Pictures from words: MaskGIT's parallel decoding (arXiv:2202.04200) with classifier-free guidance.

Shape letters: B rows, L positions, h x w the grid of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.pipelines import layouts
from mmdlm.pipelines.pipeline import Generators, MMDLMPipeline, StepCallback, cache_report, editable_places
from mmdlm.processing import Picture
from mmdlm.sampling.denoise import Predictor
from mmdlm.sampling.guidance_interval import check_interval, within
from mmdlm.sampling.predictors import guided, other_canvas
from mmdlm.sampling.replay import Recording
from mmdlm.sequence import Canvas


@dataclass
class PicturesOutput(BaseOutput):
    """`images`: B Pillow pictures, or [B, 3, H, W] in [-1, 1] for output_type="pt". `codes`: int64 [B, h, w].

    `confidence`: float [B, h, w], the probability at which each code was drawn, guidance included. `forwards`: passes
    of the loop; `tokens_per_forward`: codes written in one, of one row; `cache`: what the caches report.
    """

    images: list[Image.Image] | Tensor
    codes: Tensor
    confidence: Tensor
    forwards: int = 0
    tokens_per_forward: float = 0.0
    cache: dict[str, float] | None = None


class TextToImage(MMDLMPipeline):
    """A prompt -> a picture."""

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str | None = None,
        source: Picture | Sequence[Picture] | None = None,
        cache: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pil",
        replay: Recording | None = None,
    ) -> PicturesOutput:
        """Draw `num_images_per_prompt` pictures of every prompt, in the prompts' order.

        What is None comes from the model's preset "draw". guidance_scale: logits = without the prompt +
        scale * (with - without); 1 is no guidance. guidance_interval: the shares of masked codes between which it is
        used, (0, 1) is always, see `within`. negative_prompt: guide away from this instead of from no prompt. source: a
        picture to be changed as the prompt says, one for all prompts or one for each, for models that were trained on
        such pairs (`source_file_name`); guidance drops the words and keeps the picture. `cache`:
        {"name": "image_cache", **settings}, see `cached_from_config`. `policy`: {"name": ..., **settings}, see
        `policy_from_config`.
        `generator`: one for all pictures, or one for each; a picture with
        a generator of its own does not depend on the others. `callback_on_step_end(pipe, step, share still undecided,
        {"codes": best guess [B, h, w], "undecided": bool [B, h, w]})` runs after every step; what it returns is not
        used. output_type: "pil" or "pt". `replay`: records every step, or plays the steps it holds.

        Raises InputError for an empty prompt, one longer than the model's positions, and settings out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = self._settings("draw", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
                                  guidance_interval=guidance_interval, cache=cache, policy=policy)
        if output_type not in ("pil", "pt"):
            raise InputError(f"output_type is {output_type!r}, expected 'pil' or 'pt'.")
        canvas, predict, branches = self.prepare(prompts, num_images_per_prompt, settings["guidance_scale"],
                                                 negative_prompt=negative_prompt, settings=settings, source=source)
        shape = (len(canvas.ids), *self.grid)
        first_id = self.processor.vocabulary.image_start
        mask_id = self.processor.vocabulary.mask_id
        states = self._run(canvas, predict, settings, first_id=first_id, generator=generator, replay=replay)
        for step, state in enumerate(states):
            ids = state.x0[canvas.editable].view(shape)
            if callback_on_step_end is not None:
                undecided = (state.x == mask_id)[canvas.editable].view(shape)
                # With blocks, places that were not asked yet have no guess: any code, they are shown as undecided.
                codes = self.processor.vocabulary.image_codes(ids.masked_fill(ids == mask_id, first_id))
                tensors = {"codes": codes, "undecided": undecided}
                callback_on_step_end(self, step, float(undecided.float().mean()), tensors)
        codes = self.processor.vocabulary.image_codes(ids)
        pixels = self.visual_tokenizer.decode(codes)
        return PicturesOutput(
            images=self.processor.images(pixels) if output_type == "pil" else pixels,
            codes=codes,
            confidence=state.confidence[canvas.editable].view(shape),
            forwards=state.forwards,
            tokens_per_forward=shape[1] * shape[2] / max(state.forwards, 1),
            cache=cache_report(*branches),
        )

    def prepare(
        self,
        prompts: Sequence[str],
        copies: int,
        guidance_scale: float,
        *,
        negative_prompt: str | None = None,
        settings: Mapping[str, Any] | None = None,
        source: Picture | Sequence[Picture] | None = None,
    ) -> tuple[Canvas, Predictor, list[Predictor]]:
        """The canvas [B, L] whose places for codes are masked, the predictor that fills them, and its branches.

        `settings`: whose cache and guidance_interval are used, if they have them.
        """
        if not prompts or copies < 1:
            raise InputError(f"Got {len(prompts)} prompts, {copies} pictures each, expected at least one of both.")
        if not all(prompt.strip() for prompt in prompts):
            raise InputError("The prompt is empty, expected what to draw: for example \"a red apple\".")
        changed = self._changed(source, len(prompts))
        rows = [self._row(*pair) for pair in zip(prompts, changed, strict=True) for _ in range(copies)]
        canvas, mask = self._batch(rows, "prompt" if source is None else "prompt with the picture to change")
        columns, interval = self.processor.vocabulary.image_columns, (settings or {}).get("guidance_interval")
        predict = self._predictor(canvas, mask, columns, settings)
        if interval is not None:
            check_interval(interval)
        if guidance_scale == 1:
            return canvas, predict, [predict]
        unprompted = [self._row(negative_prompt or "", one) for one in changed for _ in range(copies)]
        # Without a prompt it is shorter than the prompted ones and has no padding: its forward costs that much less.
        empty, _ = self._batch(unprompted, "negative prompt")
        other = other_canvas(empty.ids, editable_places(canvas), editable_places(empty))
        unconditional = self._predictor(empty, None, columns, settings)
        both = guided(predict, unconditional, guidance_scale, other=other, kept=self._first_pass)
        if interval is not None:
            both = within(both, predict, interval, editable=canvas.editable,
                          mask_id=self.processor.vocabulary.mask_id)
        return canvas, both, [predict, unconditional]

    def _changed(self, source: Picture | Sequence[Picture] | None, prompts: int) -> list[Tensor | None]:
        """The codes [h, w] of the picture that each prompt changes."""
        if source is None:
            return [None] * prompts
        pixels = self.processor.pixels(source).to(self._execution_device, self.visual_tokenizer.dtype)
        codes = self.visual_tokenizer.encode(pixels).cpu()
        if len(codes) not in (1, prompts):
            raise InputError(f"Got {len(codes)} pictures to change for {prompts} prompts, expected 1 or one for each.")
        return list(codes.expand(prompts, -1, -1))

    def _row(self, prompt: str, changed: Tensor | None) -> Canvas:
        """The draw layout [L] of a prompt, or the edit layout of a prompt and the codes [h, w] of what it changes."""
        if changed is None:
            return layouts.draw_canvas(prompt, self.grid, self.processor, self.family)
        layouts.check_own(self.family, self.processor.vocabulary, "editing")
        ids = self.processor.text_ids(prompt)
        return sequence.edit_canvas(changed, ids, None, self.grid, self.processor.vocabulary)

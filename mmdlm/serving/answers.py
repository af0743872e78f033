"""From a row's State to what a client reads: text and how sure it is, a picture's PNG, drafts of both.

Shape letters: L positions, h x w the grid of codes.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import torch

from mmdlm import __version__
from mmdlm.picture_files import png
from mmdlm.pipelines import TextToImage
from mmdlm.pipelines.given import put_back
from mmdlm.sampling.denoise import State
from mmdlm.sequence import IMAGE
from mmdlm.serving.jobs import Job

MASK_SIGN = "\u2592"  # a place that is not written yet, in drafts


class Answers:
    """What the rows of one model mean. `fingerprint` of a row's adapter goes into every PNG."""

    def __init__(self, pipe: TextToImage, fingerprint: Callable[[str | None], str]) -> None:
        self.pipe, self.fingerprint = pipe, fingerprint
        self.vocabulary = pipe.processor.vocabulary

    # ------------------------------------------------------------------------------------------------ text

    def text(self, job: Job, state: State) -> dict[str, Any]:
        """A finished row's text, its confidence (the geometric mean of its tokens', as the pipelines give it), ..."""
        ids = state.x[job.canvas.editable]
        ends = (ids == self.vocabulary.eos_id).nonzero()
        tokens = int(ends[0]) if len(ends) else len(ids)
        sure = state.confidence[job.canvas.editable][: tokens + 1].clamp_min(torch.finfo(torch.float32).tiny)
        return {
            "text": self.pipe.processor.text(ids),
            "confidence": float(sure.log().mean().exp()),
            "tokens": tokens,
            "ended": bool(len(ends)),
        }

    def firm(self, job: Job, state: State) -> str:
        """The text before the first mask: what will not change any more. Half a character at its end is left out."""
        ids = state.x[job.canvas.editable].tolist()
        if self.vocabulary.mask_id in ids:
            ids = ids[: ids.index(self.vocabulary.mask_id)]
            return self.pipe.processor.text(ids).rstrip("\ufffd")
        return self.pipe.processor.text(ids)

    def text_draft(self, job: Job, state: State) -> dict[str, Any]:
        """How a text stands: with a sign for each masked place, and the best guess at all of it."""
        mask, eos, processor = self.vocabulary.mask_id, self.vocabulary.eos_id, self.pipe.processor
        shown, run = "", list[int]()
        for token in state.x[job.canvas.editable].tolist():
            if token == eos:
                break
            if token == mask:
                shown, run = shown + processor.tokenizer.decode(run) + MASK_SIGN, []
            else:
                run.append(token)
        shown += processor.tokenizer.decode(run)
        guess = state.x0[job.canvas.editable]
        return {
            "step": state.step,
            "undecided": self._undecided(job, state),
            "text": shown,
            "guess": processor.text(guess[guess != mask]),
        }

    # ------------------------------------------------------------------------------------------------ pictures

    @torch.no_grad()
    def picture(self, job: Job, state: State, prompt: str) -> str:
        """A finished row's PNG in base64, with where it came from as text inside."""
        pixels = self.pipe.visual_tokenizer.decode(self._codes(job, state))
        drawn = self.pipe.processor.images(pixels)[0]
        if job.given is not None:
            drawn = put_back(job.given, drawn, self.pipe.processor.picture_fit)
        facts = {
            "prompt": prompt,
            "seed": job.seed,
            "steps": job.settings["num_inference_steps"],
            "guidance_scale": float(job.scale),
            "model_hash": self.fingerprint(job.adapter),
            "mmdlm_version": __version__,
        }
        return base64.b64encode(png(drawn, facts)).decode()

    def preview(self, job: Job, state: State) -> str:
        """A PNG in base64 of how a picture stands, what is undecided faded to grey."""
        undecided = (state.x == self.vocabulary.mask_id)[_codes_of(job)].view(1, *self.pipe.grid)
        return base64.b64encode(png(self.pipe.preview(self._codes(job, state), undecided)[0], {})).decode()

    def picture_draft(self, job: Job, state: State) -> dict[str, Any]:
        """How a picture stands: the share undecided, and how sure each code is, row by row, in percent."""
        sure = (state.confidence[_codes_of(job)].view(self.pipe.grid) * 100).round().int().tolist()
        return {"step": state.step, "undecided": self._undecided(job, state), "confidence": sure}

    def _codes(self, job: Job, state: State) -> torch.Tensor:
        ids = state.x0[_codes_of(job)]
        # With blocks, places that were not asked yet have no guess: any code, they are shown as undecided.
        ids = ids.masked_fill(ids == self.vocabulary.mask_id, self.vocabulary.image_start)
        return self.vocabulary.image_codes(ids).view(1, *self.pipe.grid)

    def _undecided(self, job: Job, state: State) -> float:
        return round(float((state.x == self.vocabulary.mask_id)[job.canvas.editable].float().mean()), 4)


def _codes_of(job: Job) -> torch.Tensor:
    """The places of a picture's codes, given ones included: bool [1, L]."""
    return job.canvas.modality == IMAGE

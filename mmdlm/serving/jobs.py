"""What is to be done, as rows that can share a forward: a `Job` is one picture to draw or one text to write.

    studio = Studio(pipe)                        # any pipeline of a model directory: they have the same parts
    job = studio.drawing("a red apple", seed=7)
    job = studio.describing(content)             # the bytes of a picture file
    job = studio.asking(content, "what is it?")

A job knows its canvas and its settings and nothing of its neighbours: it is `mmdlm.sampling.denoise.passes` over one
row, with a generator of its own, so what comes of it does not depend on what it shares a forward with.

Shape letters: L positions, W asked places, V columns of the logits, h x w the grid of codes.
"""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.pipelines import MMDLMPipeline, layouts
from mmdlm.pipelines.given import Given, given_picture
from mmdlm.processing import FORMATS, LARGEST_PICTURE, load_image
from mmdlm.sampling.denoise import Asked, State, passes
from mmdlm.sampling.policies import draw_from_config, policy_from_config
from mmdlm.sampling.predictors import other_canvas
from mmdlm.sequence import Canvas

CACHED_PICTURES, CACHED_TEXTS = 256, 4096  # codes are some kB a picture, ids less
MOST_STEPS = 1024


class Question:
    """One row of a shared forward: where a canvas stands, and the places and columns whose logits are wanted."""

    __slots__ = ("adapter", "columns", "grid", "ids", "positions", "where")

    def __init__(
        self,
        ids: Tensor,
        where: Tensor,
        positions: Tensor,
        grid: Tensor,
        columns: tuple[int, int],
        adapter: str | None = None,
    ) -> None:
        self.ids, self.where = ids, where  # int64 [L], [W]
        self.positions, self.grid = positions, grid  # int64 [L], [L, 2]
        self.columns, self.adapter = columns, adapter


@dataclass(eq=False)
class Job:
    """One row to be denoised. `rows` and `length` say what it takes of a forward.

    Guidance asks twice, with the prompt and without: `unprompted` is the second canvas, and `scale` what weighs them.
    """

    canvas: Canvas  # one row, [1, L]
    columns: tuple[int, int]  # of the ids its places may become
    settings: Mapping[str, Any]  # as a preset has them
    seed: int
    unprompted: Canvas | None = None
    scale: float = 1.0
    given: Given | None = None  # the picture of which this is a part
    adapter: str | None = None  # of the model; None is the model as it is
    loop: Generator[Asked | State, Tensor, None] = field(init=False, repr=False)
    first: Asked | State | None = field(default=None, init=False, repr=False)  # what the loop asked when it started

    def __post_init__(self) -> None:
        if self.unprompted is not None:
            places = self.canvas.editable.nonzero()[:, 1][None], self.unprompted.editable.nonzero()[:, 1][None]
            self._other = other_canvas(self.unprompted.ids, *places)
        # the same tensors in every step: by that a layout is known again (`mmdlm.serving.forward.Layouts`)
        canvases = [self.canvas] if self.unprompted is None else [self.canvas, self.unprompted]
        self._layouts = [(canvas.positions[0], canvas.grid[0]) for canvas in canvases]

    @property
    def rows(self) -> int:
        return 1 if self.unprompted is None else 2

    @property
    def length(self) -> int:
        return self.canvas.ids.shape[1]  # the unprompted canvas is never longer

    def start(self, mask_id: int) -> None:
        """(Re)start its loop; the same seed gives the same row. InputError for settings that contradict each other."""
        self.loop = passes(
            self.canvas.ids,
            policy_from_config(self.settings["policy"]),
            editable=self.canvas.editable,
            mask_id=mask_id,
            steps=self.settings["num_inference_steps"],
            block=self.settings.get("block_length"),
            draw=draw_from_config(self.settings["draw"]),
            # On the CPU whatever the device: the same seed then draws the same noise everywhere.
            generator=[torch.Generator().manual_seed(self.seed)],
            first_id=self.columns[0],
        )
        self.first = next(self.loop)

    def questions(self, asked: Asked) -> list[Question]:
        """The forward's rows for what the loop asks: the canvas, and with guidance the unprompted one after it."""
        found = [(asked.x[0], asked.where[0])]
        if self.unprompted is not None:
            ids, where = self._other(asked.x, asked.where)
            found.append((ids[0], where[0]))
        layouts = zip(found, self._layouts, strict=True)
        return [Question(*row, *layout, self.columns, self.adapter) for row, layout in layouts]


class Studio:
    """Makes jobs from requests: prompts to ids, pictures to codes, both kept by their hash, and checks the settings.

    Several threads may use one studio. Everything that can be wrong with a request is found here, before the job
    meets others: InputError.
    """

    def __init__(self, pipe: MMDLMPipeline, *, largest_picture: int = LARGEST_PICTURE) -> None:
        # The canvases here are mmdlm's own: a published model would answer them with nonsense.
        layouts.check_own(pipe.family, pipe.processor.vocabulary, "serving")
        self.pipe, self.presets, self.largest_picture = pipe, pipe.presets, largest_picture
        self.vocabulary = pipe.processor.vocabulary
        self.device: torch.device = pipe.model.device
        self._text_ids = lru_cache(CACHED_TEXTS)(lambda text: tuple(pipe.processor.text_ids(text)))
        self._codes = _Kept(CACHED_PICTURES)

    def drawing(self, prompt: str, *, seed: int, guidance_scale: float | None = None, **asked: Any) -> Job:
        """A picture of `prompt`. `asked`: num_inference_steps, temperature, top_p; None is the preset's own."""
        opened = torch.ones(self.pipe.grid, dtype=torch.bool)
        return self._drawing(prompt, torch.zeros(self.pipe.grid, dtype=torch.long), opened, seed, guidance_scale, asked)

    def filling(
        self,
        prompt: str,
        picture: bytes,
        mask: bytes | None,
        *,
        seed: int,
        extend: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        **asked: Any,
    ) -> Job:
        """The part of a picture that its mask leaves open, drawn from `prompt`. `asked` as for `drawing`.

        A mask is transparent where the picture is to be filled, or white where it has no transparency at all; without
        a mask the picture's own transparency is it. `extend`: pixels to draw on its left, top, right and bottom, in
        place of a mask. Raises what `mmdlm.pipelines.given.given_picture` raises.
        """
        known = load_image(picture, largest=self.largest_picture)
        hole = None
        if extend is None or mask is not None:
            hole = transparency(picture if mask is None else mask, self.largest_picture)
        if hole is None and mask is None and extend is None:
            raise InputError("The picture is nowhere transparent and there is no mask: send a mask of its size.")
        if hole is None and mask is not None:
            hole = load_image(mask, largest=self.largest_picture)
        downsample = self.pipe.visual_tokenizer.downsample
        given = given_picture(known, hole, extend, processor=self.pipe.processor, cell=downsample)
        codes = self._encode(given.square)
        job = self._drawing(prompt, codes, given.cells, seed, guidance_scale, asked)
        job.given = given
        return job

    def describing(self, picture: bytes, *, seed: int, max_tokens: int | None = None, **asked: Any) -> Job:
        """A caption of at most `max_tokens` tokens for the bytes of a picture file."""
        settings = self.settings("describe", **asked)
        length = answer_length(settings, max_tokens)
        row = sequence.describe_canvas(self.codes(picture), self.pipe.grid, None, length, self.vocabulary)
        return Job(self._row(row), self.vocabulary.text_columns, settings, seed)

    def asking(
        self, picture: bytes, question: str, *, seed: int, max_tokens: int | None = None, **asked: Any
    ) -> Job:
        """An answer of at most `max_tokens` tokens to a question about a picture."""
        if not question.strip():
            raise InputError('The question is empty, expected for example "what colour is it?".')
        settings = self.settings("ask", **asked)
        length, words = answer_length(settings, max_tokens), self._text_ids(question)
        row = sequence.ask_canvas(self.codes(picture), self.pipe.grid, words, None, length, self.vocabulary)
        return Job(self._row(row), self.vocabulary.text_columns, settings, seed)

    def settings(
        self,
        task: str,
        *,
        num_inference_steps: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> dict[str, Any]:
        """The task's preset with what was asked for. A temperature replaces the preset's draw, 0 is greedy."""
        settings = dict(self.presets[task])
        if num_inference_steps is not None:
            settings["num_inference_steps"] = num_inference_steps
        steps = settings["num_inference_steps"]
        if not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
            raise InputError(f"num_inference_steps is {steps!r}, expected a whole number from 1 to {MOST_STEPS}.")
        if temperature is not None:
            settings["draw"] = {"name": "categorical", "temperature": float(temperature)}
        if top_p is not None:
            drawn = settings["draw"] if settings["draw"]["name"] == "categorical" else {"name": "categorical"}
            settings["draw"] = {**drawn, "top_p": float(top_p)}
        draw_from_config(settings["draw"])  # what is out of range is said now
        return settings

    def codes(self, picture: bytes) -> Tensor:
        """The codes [h, w] of a picture file's bytes. Raises what `load_image` raises."""
        key = hashlib.sha256(picture).hexdigest()
        return self._codes(key, lambda: self._encode(load_image(picture, largest=self.largest_picture)))

    @torch.no_grad()
    def _encode(self, picture: Image.Image) -> Tensor:
        tokenizer = self.pipe.visual_tokenizer
        codes: Tensor = tokenizer.encode(self.pipe.processor.pixels(picture).to(self.device, tokenizer.dtype))[0]
        return codes.cpu()

    def _drawing(
        self, prompt: str, codes: Tensor, opened: Tensor, seed: int, scale: float | None, asked: dict[str, Any]
    ) -> Job:
        """The codes [h, w] of a picture that are `opened`, bool [h, w], drawn from a prompt and the others."""
        if not prompt.strip():
            raise InputError('The prompt is empty, expected what to draw: for example "a red apple".')
        settings = self.settings("draw", **asked)
        scale = settings.get("guidance_scale", 1.0) if scale is None else scale
        if not 0 <= scale < float("inf"):
            raise InputError(f"guidance_scale is {scale!r}, expected a number from 0 on; 1 is no guidance.")

        def canvas(words: Sequence[int]) -> Canvas:
            row = sequence.draw_canvas(words, codes, self.pipe.grid, self.vocabulary)
            editable = row.editable.clone()
            editable[row.modality == sequence.IMAGE] = opened.flatten()
            return self._row(sequence.hide(row._replace(editable=editable), self.vocabulary.mask_id))

        unprompted = None if scale == 1 else canvas([])
        columns = self.vocabulary.image_columns
        return Job(canvas(self._text_ids(prompt)), columns, settings, seed, unprompted, scale)

    def _row(self, canvas: Canvas) -> Canvas:
        """[L] -> [1, L] on the model's device; InputError where the model has no such many positions."""
        longest = self.pipe.model.config.max_positions
        if len(canvas.ids) > longest:
            raise InputError(
                f"The text is too long by {len(canvas.ids) - longest} tokens, the model has {longest} positions for "
                "text and picture together: shorten it."
            )
        return Canvas(*(part.unsqueeze(0).to(self.device) for part in canvas))


def answer_length(settings: Mapping[str, Any], max_tokens: int | None) -> int:
    """Places for an answer: as many as the preset has, and no more than `max_tokens`, which is a bound and no wish."""
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}, expected 1 or more: leave it out for the model's own length.")
    length: int = settings["answer_length"]
    return length if max_tokens is None else min(length, max_tokens)


def transparency(picture: bytes, largest: int) -> Image.Image | None:
    """White where a picture file is transparent, black elsewhere; None where nothing of it is."""
    load_image(picture, largest=largest)  # all that can be wrong with it
    with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
        if not opened.has_transparency_data:
            return None
        alpha = ImageOps.exif_transpose(opened).convert("RGBA").getchannel("A")
    hole = alpha.point(lambda level: 0 if level >= 128 else 255)
    return None if hole.getbbox() is None else hole


class _Kept:
    """Values by key, the least recently used forgotten; for several threads, of which two may make one value twice."""

    def __init__(self, most: int) -> None:
        self._most, self._values, self._lock = most, OrderedDict[str, Tensor](), threading.Lock()

    def __call__(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            self._values[key] = value
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        return value

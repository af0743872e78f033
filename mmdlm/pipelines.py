"""Pictures from words and words from pictures, in diffusers' shape: prepare a canvas, denoise it, decode it.

    pipe = TextToImage.from_pretrained()                       # the shipped model, or a directory
    pipe("a red apple", generator=torch.Generator().manual_seed(0)).images[0].save("apple.png")

One model directory serves every pipeline here. Drawing is MaskGIT's parallel decoding (arXiv:2202.04200) with
classifier-free guidance, describing and asking are LLaDA's (arXiv:2502.09992): only which places are editable differs.
Shape letters: B rows, L positions, W asked positions, V ids, h x w the grid of codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mmdlm import attention, sequence
from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.model_directory import (
    check_model_directory,
    finish_model_directory,
    read_presets,
    weight_names,
    write_presets,
)
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.processing import MMDLMProcessor, Picture
from mmdlm.sampling.denoise import Predictor, State, denoise
from mmdlm.sampling.policies import draw_from_config, policy_from_config
from mmdlm.sampling.predictors import full, guided, other_canvas
from mmdlm.sequence import Canvas

Generators = torch.Generator | list[torch.Generator]
# (pipeline, step, share of places still undecided after it, {"ids": [B, L], ...}) after every step
StepCallback = Callable[[DiffusionPipeline, int, float, dict[str, Tensor]], Any]

# What a directory without generation_config.json, or with a shorter one, is sampled with.
DEFAULT_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "draw": {
        "num_inference_steps": 16,
        "guidance_scale": 1.0,
        "policy": {"name": "maskgit"},
        "draw": {"name": "categorical"},
    },
    "describe": {
        "num_inference_steps": 16,
        "answer_length": 32,
        "policy": {"name": "top_k"},
        "draw": {"name": "greedy"},
    },
    "ask": {
        "num_inference_steps": 8,
        "answer_length": 8,
        "policy": {"name": "top_k"},
        "draw": {"name": "greedy"},
    },
}


@dataclass
class PicturesOutput(BaseOutput):
    """`images`: B Pillow pictures, or [B, 3, H, W] in [-1, 1] for output_type="pt". `codes`: int64 [B, h, w]."""

    images: list[Image.Image] | Tensor
    codes: Tensor


@dataclass
class TextsOutput(BaseOutput):
    """`texts`: B answers. `confidences`: the geometric mean of each answer's token probabilities, in [0, 1]."""

    texts: list[str]
    confidences: list[float]


class MMDLMPipeline(DiffusionPipeline):
    """What all pipelines share: the three components, the presets, loading, saving, and the run over one canvas."""

    def __init__(self, model: MaskPredictor, visual_tokenizer: LFQTokenizer, processor: MMDLMProcessor) -> None:
        super().__init__()
        if model.vocabulary != processor.vocabulary:
            raise InputError(
                f"The model's vocabulary is {model.vocabulary}, the processor's {processor.vocabulary}, "
                "expected the same: take both from one model directory."
            )
        self.register_modules(model=model, visual_tokenizer=visual_tokenizer, processor=processor)
        self.presets = {task: dict(preset) for task, preset in DEFAULT_PRESETS.items()}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Any:
        """Load a model directory; None means the shipped one. Weights are computed with in `dtype`.

        Safetensors only, and only classes of this package: no code of the directory's is run. Raises InputError
        when it is no mmdlm model, incomplete, broken, or of another version.
        """
        directory = shipped_model() if pretrained_model_name_or_path is None else Path(pretrained_model_name_or_path)
        check_model_directory(directory)
        try:
            pipe = super().from_pretrained(str(directory), use_safetensors=True, **kwargs)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{directory} does not fit this version of mmdlm ({_first_line(error)}): "
                "update mmdlm, or save the model again with this version."
            ) from error
        for name in ("model", "visual_tokenizer"):
            _check_all_weights_used(getattr(pipe, name), directory / name)
            # torch's own: diffusers' `to` warns about modules it would rather keep in float32, of which there are none.
            torch.nn.Module.to(getattr(pipe, name), dtype)
        pipe.presets = read_presets(directory, DEFAULT_PRESETS)
        return pipe

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the model directory that `from_pretrained` reads: diffusers' layout, safetensors, and the presets."""
        super().save_pretrained(str(save_directory), safe_serialization=True, **kwargs)
        write_presets(Path(save_directory), self.presets)
        finish_model_directory(Path(save_directory))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of codes in a picture of the processor's size."""
        side = self.processor.image_size // self.visual_tokenizer.downsample
        return side, side

    def _settings(self, task: str, **asked: Any) -> dict[str, Any]:
        """The task's preset with what the caller asked for, checked."""
        settings = {**self.presets[task], **{name: value for name, value in asked.items() if value is not None}}
        steps = settings["num_inference_steps"]
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"num_inference_steps is {steps!r}, expected a whole number from 1 on.")
        scale = settings.get("guidance_scale", 1.0)
        if not 0 <= scale < float("inf"):
            raise InputError(f"guidance_scale is {scale!r}, expected a number from 0 on; 1 is no guidance.")
        return settings

    def _batch(self, canvases: Sequence[Canvas], what: str) -> tuple[Canvas, Tensor | None]:
        """Rows of any lengths -> one canvas [B, L] on the device and its attention mask, None where none is needed.

        Padding is on the left, so that the answer area ends every row in the same columns.
        """
        longest, limit = max(len(canvas.ids) for canvas in canvases), self.model.config.max_positions
        if longest > limit:
            raise InputError(
                f"The {what} is too long by {longest - limit} tokens, the model has {limit} positions: shorten it."
            )
        canvas, valid = sequence.batch(canvases, pad_id=self.processor.vocabulary.pad_id, side="left")
        mask = attention.full(valid)
        device = self._execution_device
        return Canvas(*(part.to(device) for part in canvas)), None if mask is None else mask.to(device)

    def _run(
        self,
        canvas: Canvas,
        predict: Predictor,
        settings: Mapping[str, Any],
        *,
        first_id: int,
        generator: Generators | None,
    ) -> Iterator[State]:
        """Denoise `canvas` and show the steps on the progress bar."""
        rows, steps = len(canvas.ids), settings["num_inference_steps"]
        if isinstance(generator, list) and len(generator) != rows:
            raise InputError(f"Got {len(generator)} generators for {rows} rows: pass one for all, or one for each.")
        states = denoise(
            predict,
            canvas.ids,
            policy_from_config(settings["policy"]),
            editable=canvas.editable,
            mask_id=self.processor.vocabulary.mask_id,
            steps=steps,
            block=settings.get("block_length"),
            draw=draw_from_config(settings["draw"]),
            generator=generator,
            first_id=first_id,
        )
        with self.progress_bar(total=steps) as bar:
            for state in states:
                bar.update()
                yield state


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
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
        output_type: str = "pil",
    ) -> PicturesOutput:
        """Draw `num_images_per_prompt` pictures of every prompt, in the prompts' order.

        What is None comes from the model's preset "draw". guidance_scale: logits = without the prompt +
        scale * (with - without); 1 is no guidance. `generator`: one for all pictures, or one for each; a picture with
        a generator of its own does not depend on the others. `callback_on_step_end(pipe, step, share still undecided,
        {"codes": best guess [B, h, w], "undecided": bool [B, h, w]})` runs after every step; what it returns is not
        used. output_type: "pil" or "pt".

        Raises InputError for an empty prompt, one longer than the model's positions, and settings out of range.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        settings = self._settings("draw", num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        if output_type not in ("pil", "pt"):
            raise InputError(f"output_type is {output_type!r}, expected 'pil' or 'pt'.")
        canvas, predict = self.prepare(prompts, num_images_per_prompt, settings["guidance_scale"])
        shape = (len(canvas.ids), *self.grid)
        first_id = self.processor.vocabulary.image_start
        mask_id = self.processor.vocabulary.mask_id
        for step, state in enumerate(self._run(canvas, predict, settings, first_id=first_id, generator=generator)):
            ids = state.x0[canvas.editable].view(shape)
            if callback_on_step_end is not None:
                undecided = (state.x == mask_id)[canvas.editable].view(shape)
                # With blocks, places that were not asked yet have no guess: any code, they are shown as undecided.
                codes = self.processor.vocabulary.image_codes(ids.masked_fill(ids == mask_id, first_id))
                tensors = {"codes": codes, "undecided": undecided}
                callback_on_step_end(self, step, float(undecided.float().mean()), tensors)
        codes = self.processor.vocabulary.image_codes(ids)
        pixels = self.visual_tokenizer.decode(codes)
        return PicturesOutput(images=self.processor.images(pixels) if output_type == "pil" else pixels, codes=codes)

    def prepare(self, prompts: Sequence[str], copies: int, guidance_scale: float) -> tuple[Canvas, Predictor]:
        """The canvas [B, L] whose places for codes are masked, and the predictor that fills them."""
        if not prompts or copies < 1:
            raise InputError(f"Got {len(prompts)} prompts, {copies} pictures each, expected at least one of both.")
        vocabulary = self.processor.vocabulary
        rows = []
        for prompt in prompts:
            if not prompt.strip():
                raise InputError("The prompt is empty, expected what to draw: for example \"a red apple\".")
            row = sequence.draw_canvas(self.processor.text_ids(prompt), None, self.grid, vocabulary)
            rows += [row] * copies
        canvas, mask = self._batch(rows, "prompt")
        predict = self._predictor(canvas, mask)
        if guidance_scale == 1:
            return canvas, predict
        unprompted = sequence.draw_canvas([], None, self.grid, vocabulary)
        # It is shorter than the prompted ones and has no padding: its forward costs that much less.
        empty, _ = self._batch([unprompted] * len(rows), "prompt")
        other = other_canvas(empty.ids, _editable_places(canvas), _editable_places(empty))
        return canvas, guided(predict, self._predictor(empty, None), guidance_scale, other=other)

    def _predictor(self, canvas: Canvas, mask: Tensor | None) -> Predictor:
        return full(
            self.model,
            attention_mask=mask,
            position_ids=canvas.positions,
            grid=canvas.grid,
            columns=self.processor.vocabulary.image_columns,
        )

    @torch.no_grad()
    def preview(self, codes: Tensor, undecided: Tensor) -> list[Image.Image]:
        """Pictures of the process, from what `callback_on_step_end` got: undecided cells are faded to grey."""
        faded = undecided.float().mul(-0.8).add(1.0).unsqueeze(1)
        factor = self.visual_tokenizer.downsample
        return self.processor.images(
            self.visual_tokenizer.decode(codes) * faded.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        )


class ImageToText(MMDLMPipeline):
    """A picture -> its caption, or the answer to a question about it."""

    @torch.no_grad()
    def __call__(
        self,
        images: Picture | Sequence[Picture],
        question: str | Sequence[str] | None = None,
        *,
        num_inference_steps: int | None = None,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
    ) -> TextsOutput:
        """Describe every picture, or answer `question`: one for all pictures, or one for each.

        Pictures are Pillow pictures, paths or the bytes of files. What is None comes from the model's preset
        "describe", or "ask". `callback_on_step_end(pipe, step, share still undecided, {"ids": best guess [B, W]})`.

        Raises InputError for a bad picture (see `load_image`), an empty question, and one longer than the model's
        positions.
        """
        task = "describe" if question is None else "ask"
        settings = self._settings(task, num_inference_steps=num_inference_steps)
        canvas, predict = self.prepare(images, question, settings["answer_length"])
        rows, vocabulary = len(canvas.ids), self.processor.vocabulary
        confidence = torch.zeros(canvas.ids.shape, device=canvas.ids.device)
        first_id = vocabulary.text_columns[0]
        for step, state in enumerate(self._run(canvas, predict, settings, first_id=first_id, generator=generator)):
            confidence = torch.where(state.written, state.confidence.float(), confidence)
            if callback_on_step_end is not None:
                undecided = (state.x == vocabulary.mask_id)[canvas.editable].float().mean()
                tensors = {"ids": state.x0[canvas.editable].view(rows, -1)}
                callback_on_step_end(self, step, float(undecided), tensors)
        answers = state.x[canvas.editable].view(rows, -1)
        sure = confidence[canvas.editable].view(rows, -1)
        return TextsOutput(
            texts=[self.processor.text(answer) for answer in answers],
            confidences=_geometric_means(sure, answers == vocabulary.eos_id),
        )

    def prepare(
        self, images: Picture | Sequence[Picture], question: str | Sequence[str] | None, answer_length: int
    ) -> tuple[Canvas, Predictor]:
        """The canvas [B, L] whose places for the answer are masked, and the predictor that fills them."""
        pixels = self.processor.pixels(images).to(self._execution_device, self.visual_tokenizer.dtype)
        codes = self.visual_tokenizer.encode(pixels)
        vocabulary = self.processor.vocabulary
        if question is None:
            rows = [sequence.describe_canvas(row, self.grid, None, answer_length, vocabulary) for row in codes]
        else:
            questions = [question] * len(codes) if isinstance(question, str) else list(question)
            if len(questions) != len(codes):
                raise InputError(f"Got {len(questions)} questions about {len(codes)} pictures, expected 1 or as many.")
            if not all(asked.strip() for asked in questions):
                raise InputError('The question is empty, expected for example "what colour is it?".')
            rows = [
                sequence.ask_canvas(row, self.grid, self.processor.text_ids(asked), None, answer_length, vocabulary)
                for row, asked in zip(codes, questions, strict=True)
            ]
        canvas, mask = self._batch(rows, "question")
        columns = vocabulary.text_columns
        return canvas, full(
            self.model, attention_mask=mask, position_ids=canvas.positions, grid=canvas.grid, columns=columns
        )


def _editable_places(canvas: Canvas) -> Tensor:
    """The positions [B, E] of the editable places of a canvas [B, L] whose rows have E each."""
    return canvas.editable.nonzero()[:, 1].view(len(canvas.ids), -1)


def _geometric_means(probabilities: Tensor, ends: Tensor) -> list[float]:
    """The geometric mean of each row of `probabilities` [B, W], up to and with the first of its `ends` [B, W]."""
    within = ends.cumsum(1) - ends.long() == 0
    logs = probabilities.clamp_min(torch.finfo(torch.float32).tiny).log() * within
    means: list[float] = (logs.sum(1) / within.sum(1)).exp().tolist()
    return means


def _check_all_weights_used(module: torch.nn.Module, directory: Path) -> None:
    """transformers and diffusers start missing weights at random, with a warning: here that is an error."""
    saved, expected = weight_names(directory), set(module.state_dict())
    tied = getattr(module, "_tied_weights_keys", None) if getattr(module.config, "tie_word_embeddings", False) else None
    missing = expected - saved - set(tied or ())
    unknown = saved - expected
    if missing or unknown:
        names = sorted(missing or unknown)
        raise InputError(
            f"{directory} was saved by another version: {len(names)} weights are "
            f"{'missing' if missing else 'unknown'}, {names[0]} for one: "
            "update mmdlm, or save the model again with this version."
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160].rstrip(".:")

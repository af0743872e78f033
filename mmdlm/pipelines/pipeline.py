"""What all pipelines share: the components, the presets, loading, saving, and the run over one canvas.

Shape letters: B rows, L positions, W asked positions, V ids, h x w the grid of codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from mmdlm import attention, sequence
from mmdlm.assets import shipped_model
from mmdlm.errors import InputError
from mmdlm.model_directory import (
    check_model_directory,
    finish_model_directory,
    model_hash,
    read_presets,
    weight_names,
    whole_directory,
    write_presets,
)
from mmdlm.models.adapters import adapter_directory, adapter_names, load_adapter
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.models.new_words import new_words, processor_with
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.models.vq_tokenizer import VQTokenizer
from mmdlm.pipelines import layouts
from mmdlm.processing import MMDLMProcessor
from mmdlm.sampling.cached_predictor import CachedPredictor
from mmdlm.sampling.caches import cached_from_config
from mmdlm.sampling.denoise import Policy, Predictor, State, denoise
from mmdlm.sampling.draws import Draw
from mmdlm.sampling.formats import Automaton, automaton_of_pattern, token_bytes
from mmdlm.sampling.guidance_interval import check_interval
from mmdlm.sampling.policies import ADAPTIVE, REVISING, SHADOWED, draw_from_config, policy_from_config
from mmdlm.sampling.predictors import full
from mmdlm.sampling.replay import Recording
from mmdlm.sampling.shadows import shadowed
from mmdlm.sequence import Canvas

Generators = torch.Generator | list[torch.Generator]
# (pipeline, step, share of places still undecided after it, {"ids": [B, L], ...}) after every step
StepCallback = Callable[[DiffusionPipeline, int, float, dict[str, Tensor]], Any]

# What transformers, diffusers and safetensors raise on files that are whole and say what nobody expects.
_UNLOADABLE = (
    ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip

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


class MMDLMPipeline(DiffusionPipeline):
    """What all pipelines share: the three components, the presets, loading, saving, and the run over one canvas."""

    def __init__(
        self, model: MaskPredictor, visual_tokenizer: LFQTokenizer | VQTokenizer, processor: MMDLMProcessor
    ) -> None:
        super().__init__()
        if model.vocabulary != processor.vocabulary:
            raise InputError(
                f"The model's vocabulary is {model.vocabulary}, the processor's {processor.vocabulary}, "
                "expected the same: take both from one model directory."
            )
        order = visual_tokenizer.config.get("bit_order", model.config.bit_order)
        if model.config.code_bits and order != model.config.bit_order:  # else it would draw something else in silence
            raise InputError(
                f"The visual tokenizer counts its bits in the order {order!r}, the model in "
                f"{model.config.bit_order!r}, expected the same: take both from one model directory."
            )
        self.register_modules(model=model, visual_tokenizer=visual_tokenizer, processor=processor)
        self.presets = {task: dict(preset) for task, preset in DEFAULT_PRESETS.items()}
        self._first_pass: dict[str, Any] = {}  # what guidance knows of a canvas without prompt or picture

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
        adapter: str | Path | None = None,
        device_map: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model directory; None means the shipped one. Weights are computed with in `dtype`.

        With `quantize`, "8bit" or "4bit", the mask predictor's matrices are held in so many bits (bitsandbytes) on
        `device_map`'s device, where it stays: `to` moves the other parts only.

        `adapter`: a run of `mmdlm finetune`, or an adapter's directory, of this very model.

        Safetensors only, and only classes of this package: no code of the directory's is run. Raises InputError
        when it is no mmdlm model, incomplete, broken, or of another version.
        """
        directory = shipped_model() if pretrained_model_name_or_path is None else Path(pretrained_model_name_or_path)
        check_model_directory(directory)
        if adapter is not None:
            adapter = adapter_directory(Path(adapter))  # a wrong path shows before anything slow happens
        if quantize is not None:
            from mmdlm.convert import load_predictor

            kwargs["model"] = load_predictor(directory / "model", dtype=dtype, quantize=quantize, device_map=device_map)
        try:
            pipe = super().from_pretrained(str(directory), use_safetensors=True, **kwargs)
        except InputError:
            raise
        except Exception as error:
            # tokenizers raises bare exceptions; every other class that is not named above is a bug and stays one.
            if not isinstance(error, _UNLOADABLE) and type(error) is not Exception:
                raise
            raise InputError(
                f"{directory} does not fit this version of mmdlm ({_first_line(error)}): "
                "update mmdlm, or save the model again with this version."
            ) from error
        for name in ("visual_tokenizer",) if quantize is not None else ("model", "visual_tokenizer"):
            _check_all_weights_used(getattr(pipe, name), directory / name)
            # torch's own: diffusers' `to` warns about modules it would rather keep in float32, of which there are none.
            torch.nn.Module.to(getattr(pipe, name), dtype)
        if adapter is not None:
            load_adapter(pipe.model, adapter, base=model_hash(directory))
            if new_words(pipe.model):
                pipe.register_modules(processor=processor_with(pipe.processor, new_words(pipe.model)))
        pipe.presets = read_presets(directory, DEFAULT_PRESETS)
        return pipe

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, variant: str | None = None, **kwargs: Any
    ) -> None:
        """Write the model directory that `from_pretrained` reads: diffusers' layout, safetensors, and the presets.

        It is written beside its place and renamed; other files that are there stay. Raises InputError while an adapter
        is in the model, of which only the adapter would be written, and where `safe_serialization` is False.
        """
        if not safe_serialization:
            raise InputError("safe_serialization is False, expected True: no other weights than safetensors are read.")
        if adapter_names(self.model):
            raise InputError(
                "An adapter is in the model, a model directory holds none: merge_adapter(pipe.model) before saving."
            )
        with whole_directory(Path(save_directory), variants=variant is not None) as place:
            super().save_pretrained(str(place), safe_serialization=True, variant=variant, **kwargs)
            write_presets(place, self.presets)
            finish_model_directory(place)

    @property
    def family(self) -> str:
        """The family of published models that this one's weights came from, whose layouts it knows; "" for our own."""
        return str((self.model.config.published or {}).get("family", ""))

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w): rows and columns of codes in a picture of the processor's size."""
        side = self.processor.image_size // self.visual_tokenizer.downsample
        return side, side

    def answer_canvas(
        self, codes: Tensor, question: str | None, length: int, answer: Sequence[int] | None = None
    ) -> Canvas:
        """Codes [h, w] and a question (None: to be described), with `length` places for an answer, in its layout.

        answer: ids that stand there, filled up with eos, to be judged; None for masks. Raises InputError for an answer
        that has no room together with one eos, and for a published model without such a layout.
        """
        canvas = layouts.answer_canvas(codes.cpu(), question, length, self.grid, self.processor, self.family)
        if answer is None:
            return canvas
        if len(answer) >= length:
            raise InputError(f"An answer has {len(answer)} tokens, expected at most {length - 1}: shorten it.")
        eos = [self.processor.vocabulary.eos_id] * (length - len(answer))
        return canvas._replace(ids=canvas.ids.masked_scatter(canvas.editable, torch.tensor([*answer, *eos])))

    def draw_canvas(self, text: str, codes: Tensor) -> Canvas:
        """The codes [h, w] of a picture drawn from `text`, to be judged, in this model's layout; "" is no condition."""
        canvas = layouts.draw_canvas(text, self.grid, self.processor, self.family)
        ids = self.processor.vocabulary.image_ids(codes.cpu()).flatten()
        return canvas._replace(ids=canvas.ids.masked_scatter(canvas.editable, ids))

    @torch.no_grad()
    def preview(self, codes: Tensor, undecided: Tensor) -> list[Image.Image]:
        """Pictures of the process, from what `callback_on_step_end` got: undecided cells are faded to grey."""
        faded = undecided.float().mul(-0.8).add(1.0).unsqueeze(1)
        factor = self.visual_tokenizer.downsample
        return self.processor.images(
            self.visual_tokenizer.decode(codes) * faded.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        )

    def _settings(self, task: str, **asked: Any) -> dict[str, Any]:
        """The task's preset with what the caller asked for, checked.

        A rule that finds the number of passes itself gets as many as it needs, where only the rule was asked for.
        """
        given = {name: value for name, value in asked.items() if value is not None}
        settings = {**self.presets[task], **given}
        if "policy" in given and "num_inference_steps" not in given and settings["policy"].get("name") in ADAPTIVE:
            settings["num_inference_steps"] = None
        steps = settings["num_inference_steps"]
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise InputError(f"num_inference_steps is {steps!r}, expected a whole number from 1 on.")
        scale = settings.get("guidance_scale", 1.0)
        if not isinstance(scale, (int, float)) or not 0 <= scale < float("inf"):
            raise InputError(f"guidance_scale is {scale!r}, expected a number from 0 on; 1 is no guidance.")
        if scale != 1 and settings.get("unprompted") is False:
            raise InputError(
                f"guidance_scale is {scale!r}, but this model was never trained without prompts: leave it at 1."
            )
        length = settings.get("answer_length")
        if length is not None and (not isinstance(length, int) or length < 1):
            raise InputError(f"answer_length is {length!r}, expected a whole number from 1 on.")
        block, places = settings.get("block_length"), length or math.prod(self.grid)
        if block is not None and (not isinstance(block, int) or block < 1 or places % block):
            raise InputError(f"block_length is {block!r}, expected a number that divides the {places} places to fill.")
        for name in ("policy", "draw", "cache"):
            value = settings.get(name)
            if not isinstance(value, Mapping) and not (name == "cache" and value is None):
                raise InputError(f"{name} is {value!r}, expected a table of its name and settings.")
        if settings.get("guidance_interval") is not None:
            check_interval(settings["guidance_interval"])
        policy_from_config(settings["policy"]), draw_from_config(settings["draw"])  # a bad one shows before any work
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
        canvas, valid = sequence.batch(canvases, pad_id=layouts.pad_id(self.processor, self.family), side="left")
        mask = attention.full(valid)
        device = self._execution_device
        return Canvas(*(part.to(device) for part in canvas)), None if mask is None else mask.to(device)

    def _predictor(self, canvas: Canvas, mask: Tensor | None, columns: tuple[int, int],
                   settings: Mapping[str, Any] | None = None) -> Predictor:
        """The model's logits of `columns` over a canvas [B, L], through the cache that the settings name, if any.

        Where their rule asks about written tokens these are hidden from their own places. Raises InputError where that
        cannot be.
        """
        inputs: dict[str, Any] = {"attention_mask": mask, "position_ids": canvas.positions, "grid": canvas.grid}
        inputs["columns"] = columns
        cache, rule = (settings or {}).get("cache"), (settings or {}).get("policy", {}).get("name")
        if rule in SHADOWED:
            self._check_shadows(rule, columns, cache)
            return shadowed(self.model, mask_id=self.processor.vocabulary.mask_id, editable=canvas.editable, **inputs)
        if settings is None or not cache:
            return full(self.model, **inputs)
        return cached_from_config(cache, self.model, steps=settings["num_inference_steps"], **inputs)

    def _check_shadows(self, rule: str, columns: tuple[int, int], cache: Mapping[str, Any] | None) -> None:
        """InputError where what is written cannot be asked about without being shown."""
        config = self.model.config
        folded = config.image_fold > 1 and columns == self.processor.vocabulary.image_columns
        for what, why in (
            (folded, "folds image tokens, of which several share a place"),
            (config.prediction_offset, "predicts a token from the place before it"),
        ):
            if what:
                raise InputError(
                    f"The policy {rule} asks about written tokens without showing them, and this model {why}: take "
                    "another policy, maskgit for instance."
                )
        if cache:
            raise InputError(f"The policy {rule} takes no cache, expected one of both: leave the cache out.")

    def _automaton(self, pattern: str, *, ends: bool) -> Automaton:
        """The automaton of a regular expression over this model's words; `ends`: the text may stop before its room."""
        tokenizer, vocabulary = self.processor.tokenizer, self.processor.vocabulary
        first, end = vocabulary.text_columns
        words = ((text, number) for text, number in tokenizer.get_vocab().items() if first <= number < end)
        special = {*tokenizer.all_special_ids, vocabulary.mask_id, vocabulary.eos_id}
        return automaton_of_pattern(pattern, token_bytes(words, special), eos_id=vocabulary.eos_id, ends=ends)

    def _run(
        self,
        canvas: Canvas,
        predict: Predictor,
        settings: Mapping[str, Any],
        *,
        first_id: int,
        generator: Generators | None,
        policy: Policy | None = None,
        draw: Draw | None = None,
        replay: Recording | None = None,
    ) -> Iterator[State]:
        """Denoise `canvas`, or play it back, and show the steps and the tokens per forward on the progress bar.

        `policy` and `draw`: instead of those of the settings.
        """
        rows, steps = len(canvas.ids), settings["num_inference_steps"]
        if isinstance(generator, list) and len(generator) != rows:
            raise InputError(f"Got {len(generator)} generators for {rows} rows: pass one for all, or one for each.")
        states = denoise(
            predict,
            canvas.ids,
            policy_from_config(settings["policy"]) if policy is None else policy,
            editable=canvas.editable,
            mask_id=self.processor.vocabulary.mask_id,
            steps=steps,
            block=settings.get("block_length"),
            draw=draw_from_config(settings["draw"]) if draw is None else draw,
            generator=generator,
            first_id=first_id,
            revise=settings["policy"].get("name") in REVISING,
        )
        if replay is not None:
            states = replay.states(canvas.ids, states)
        written = 0
        # None: the rule finds out how many passes it needs
        with self.progress_bar(range(0)) if steps is None else self.progress_bar(total=steps) as bar:
            for state in states:
                bar.update()
                if not bar.disable:
                    written += int(state.written.sum())
                    bar.set_postfix_str(f"{written / max(state.forwards, 1):.1f} tokens per forward")
                yield state


def cache_report(*predictors: Predictor) -> dict[str, float] | None:
    """What the caches among the predictors did in a run, summed or averaged; None where there is none."""
    reports = [predict.report() for predict in predictors if isinstance(predict, CachedPredictor)]
    if not reports:
        return None
    told = {name: sum(report[name] for report in reports) for name in reports[0]}
    return told | {name: told[name] / len(reports) for name in ("tokens_per_forward", "computed_share")}


def editable_places(canvas: Canvas) -> Tensor:
    """The positions [B, E] of the editable places of a canvas [B, L] whose rows have E each."""
    return canvas.editable.nonzero()[:, 1].view(len(canvas.ids), -1)


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

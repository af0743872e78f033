"""Fill anything: what is masked of a picture, of a text, or of both, given the rest.

Inpainting, outpainting, variations, text with holes, captions and joint generation are one thing here: a canvas whose
`editable` differs. Words are found in the describe layout, which shows the picture as far as it is known; the picture
is then drawn from the words in the draw layout, with guidance. `together` fills one canvas with both at once instead
(UniDisc, arXiv:2503.20853), for models that were trained so.

Shape letters: B rows, L positions, A places for words, C combinations of choices, h x w the grid of codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from mmdlm import sequence
from mmdlm.errors import InputError
from mmdlm.pipelines import layouts
from mmdlm.pipelines.describing import Token, told_apart
from mmdlm.pipelines.given import given_picture, put_back
from mmdlm.pipelines.partial_rows import PartialRow, hidden, varied
from mmdlm.pipelines.pipeline import Generators, MMDLMPipeline, StepCallback
from mmdlm.processing import Picture
from mmdlm.sampling.choices import chain_log_probability, without
from mmdlm.sampling.denoise import Predictor
from mmdlm.sampling.draws import row_generators
from mmdlm.sampling.formats import Automaton, Formats, Span
from mmdlm.sampling.mixtures import by_modality, draw_by_modality
from mmdlm.sampling.policies import SHADOWED, draw_from_config, policy_from_config
from mmdlm.sampling.predictors import full, guided, other_canvas, restricted
from mmdlm.sampling.replay import Recording
from mmdlm.sequence import IMAGE, Canvas
from mmdlm.templates import Hole, Layout, combinations, lay_out, parse_template, patterns


@dataclass
class FillOutput(BaseOutput):
    """What was filled, and how sure the model was. None where there was no picture, or no text.

    `images`: B Pillow pictures; `codes` int64 [B, h, w]; `filled` bool [B, h, w], the codes that were open;
    `confidence` float [B, h, w], 1 where given. `texts`: B texts; `tokens`: each token by token, 1 where given;
    `choices`: for each row, for each hole with choices, the probability of every choice.
    """

    images: list[Image.Image] | None
    codes: Tensor | None
    filled: Tensor | None
    confidence: Tensor | None
    texts: list[str] | None
    tokens: list[list[Token]] | None
    choices: list[list[dict[str, float]]] | None


class Fill(MMDLMPipeline):
    """Parts of a picture, of a text, or of both -> the whole."""

    @torch.no_grad()
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | None = None,
        masks: Picture | Sequence[Picture] | None = None,
        *,
        extend: Sequence[int] | None = None,
        strength: float | None = None,
        draw: bool = True,
        keep_pixels: bool = False,
        together: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        policy: Mapping[str, Any] | None = None,
        generator: Generators | None = None,
        callback_on_step_end: StepCallback | None = None,
        replay: Recording | None = None,
    ) -> FillOutput:
        """Fill every row. Texts, pictures and masks are as many, or one for all.

        text: what is said of the picture, with holes or without, see `mmdlm.templates`. images: None for a picture that
        is all to be drawn. masks: white where a picture is to be filled. extend: pixels to draw around it, left, top,
        right, bottom. strength: the share of the codes (of those under the mask, if there is one) that is masked at
        random: a variation. draw: False leaves pictures as they are and finds the words only. keep_pixels: every pixel
        outside the mask is the given one, not the tokenizer's; codes outside are the given ones in any case.
        together: words and picture in one run, without guidance.

        What is None comes from the model's presets "draw" for pictures, "describe" for words; num_inference_steps and
        policy change the picture's, or the words' where no picture is drawn. `generator`: one for all rows, or one for
        each. `callback_on_step_end(pipe, step, share still undecided, tensors)` gets "codes" and "undecided" [B, h, w]
        while a picture is drawn, "ids" [B, A] while words are found. `replay`: records every step, or plays it.

        Raises InputError where there is nothing to fill, for bad templates, masks and extensions, words longer than the
        model's positions, and settings out of range.
        """
        layouts.check_own(self.family, self.processor.vocabulary, "filling")
        asked = {"num_inference_steps": num_inference_steps, "policy": policy}
        drawing = self._settings("draw", guidance_scale=guidance_scale, **asked if draw else {})
        describing = self._settings("describe", **{} if draw else asked)
        rows, generators = self._rows(text, images, masks, extend, strength, describing["answer_length"], generator)
        drawn = draw and any(bool(row.opened.any()) for row in rows)
        holes = any(bool(row.free.any()) for row in rows)
        if not (drawn or holes or any(row.choices for row in rows)):
            raise InputError("There is nothing to fill, expected a mask, an extension, a strength or a text with holes "
                             "such as [MASK:2]: mark what is missing.")
        settings: dict[str, Any] = {"generators": generators, "callback": callback_on_step_end, "replay": replay}
        if text is not None and (holes or (together and drawn)):
            rows = self._find_words(rows, describing, drawing if together and drawn else None, **settings)
        if drawn and not (together and text is not None):
            rows = self._draw_codes(rows, drawing, **settings)
        return self._output(rows, with_text=text is not None, drawn=drawn, keep_pixels=keep_pixels)

    def _rows(
        self,
        text: str | Sequence[str] | None,
        images: Picture | Sequence[Picture] | None,
        masks: Picture | Sequence[Picture] | None,
        extend: Sequence[int] | None,
        strength: float | None,
        answer_length: int,
        generator: Generators | None,
    ) -> tuple[list[PartialRow], list[torch.Generator]]:
        """What is given, row by row, choices made; and a generator for each row."""
        texts = [text] if text is None or isinstance(text, str) else list(text)
        pictures, masked = _listed(images), _listed(masks)
        count = max(len(texts), len(pictures), len(masked))
        for what, listed in (("texts", texts), ("pictures", pictures), ("masks", masked)):
            if len(listed) not in (1, count):
                raise InputError(f"Got {len(listed)} {what} for {count} rows, expected 1 or one for each.")
        if isinstance(generator, list) and len(generator) != count:
            raise InputError(f"Got {len(generator)} generators for {count} rows: pass one for all, or one for each.")
        if images is None and text is None:
            raise InputError("Got neither a picture nor a text, expected parts of one of them: give what is there.")
        if images is None and (masks is not None or extend is not None or strength is not None):
            raise InputError("Got a mask, an extension or a strength but no picture: give the picture to fill.")
        if strength is not None and not 0 < strength <= 1:
            raise InputError(f"strength is {strength!r}, expected the share of the picture to draw anew, in (0, 1].")
        generators = row_generators(generator, count, torch.device("cpu"))
        seen: dict[tuple[int, int, int], PartialRow] = {}  # a picture that is given once is read once
        rows = []
        for index in range(count):
            at = index % len(pictures), index % len(masked), index % len(texts)
            key = at
            if key not in seen:
                seen[key] = self._known(pictures[at[0]], masked[at[1]], extend, texts[at[2]], answer_length)
            row = seen[key]
            rows.append(row if strength is None else varied(row, strength, generators[index]))
        return rows, generators

    def _known(
        self, picture: Picture | None, mask: Picture | None, extend: Sequence[int] | None, text: str | None, least: int
    ) -> PartialRow:
        """One row as it is given, its choices made."""
        given, codes = None, torch.zeros(self.grid, dtype=torch.long)
        opened = torch.ones(self.grid, dtype=torch.bool)
        if picture is not None:
            cell = self.visual_tokenizer.downsample
            given = given_picture(picture, mask, extend, processor=self.processor, cell=cell)
            pixels = self.processor.pixels(given.square).to(self._execution_device, self.visual_tokenizer.dtype)
            codes, opened = self.visual_tokenizer.encode(pixels)[0].cpu(), given.cells
        template = parse_template(text or "")
        layout = lay_out(template, self.processor.text_ids, self.processor.vocabulary, least=least)
        row = PartialRow(given, codes, opened, words=layout.ids[0], free=layout.free[0], open=layout.open[0],
                   pattern=layout.pattern[0], patterns=patterns(template), choices=[],
                   confidence=(~opened).float(), sure=torch.ones(layout.ids.shape[1]))
        if template:
            self._batch([self._canvas(row)], "text")  # too long a text shows before any work
        return row if len(layout.ids) == 1 else self._choose(row, template, layout)

    def _choose(self, row: PartialRow, template: Sequence[str | Hole], layout: Layout) -> PartialRow:
        """The likeliest combination of the choices: each scored exactly, given the picture and the rest of the text."""
        vocabulary, width = self.processor.vocabulary, layout.ids.shape[1]
        canvas = self._canvas(row)
        before = canvas.ids[:-width].expand(len(layout.ids), -1)
        # Of one length, the choices differ in their own tokens only. Else all that follows them has moved as well.
        scored = layout.chosen
        if len(set(scored.sum(dim=1).tolist())) > 1:
            scored = (scored.long().cumsum(dim=1) > 0) & ~layout.free
        scored = torch.cat([torch.zeros_like(before, dtype=torch.bool), scored], dim=1)
        batch, _ = self._batch([canvas], "text")

        def predict(ids: Tensor, where: Tensor) -> Tensor:
            places: dict[str, Any] = {"position_ids": batch.positions.expand(len(ids), -1)}
            places["grid"] = batch.grid.expand(len(ids), -1, -1)
            return full(self.model, columns=vocabulary.text_columns, **places)(ids, where)

        device = batch.ids.device
        candidates = torch.cat([before, layout.ids], dim=1).to(device)
        first_id = vocabulary.text_columns[0]
        logs = chain_log_probability(predict, candidates, scored.to(device), mask_id=vocabulary.mask_id,
                                     first_id=first_id)
        odds = logs.softmax(dim=0).cpu()
        best, picked = int(odds.argmax()), combinations(template)
        choices = [part.choices for part in template if isinstance(part, Hole) and part.choices]
        tables = [
            {choice: float(sum(p for p, words in zip(odds, picked, strict=True) if words[hole] == choice))
             for choice in named}
            for hole, named in enumerate(choices)
        ]
        sure = torch.where(layout.chosen[best], float(odds[best]), 1.0)
        words, free, open_ = (part[best] for part in layout[:3])
        return row._replace(words=words, free=free, open=open_, pattern=layout.pattern[best], choices=tables, sure=sure)

    def _canvas(self, row: PartialRow, *, with_codes: bool = False) -> Canvas:
        """The describe layout [L]: the picture as far as it is known, then the words; `with_codes`: both editable."""
        vocabulary = self.processor.vocabulary
        if min(vocabulary.bos_id, vocabulary.describe_id, vocabulary.eos_id) < 0:
            raise InputError("This model has no task word for describing, expected one to find words: fill pictures "
                             "without --text, or compose segments.")
        canvas = sequence.interleave(
            [
                sequence.text([vocabulary.bos_id, vocabulary.describe_id]),
                sequence.image(row.codes, *self.grid, vocabulary, editable=row.opened if with_codes else False),
                sequence.text(row.words, editable=row.free),
            ]
        )
        return hidden(canvas, row.opened, vocabulary.mask_id)

    def _find_words(
        self,
        rows: list[PartialRow],
        describing: Mapping[str, Any],
        drawing: Mapping[str, Any] | None,
        *,
        generators: list[torch.Generator],
        callback: StepCallback | None,
        replay: Recording | None,
    ) -> list[PartialRow]:
        """The rows with their words found; and with their codes, in the same run, where `drawing` is given."""
        vocabulary = self.processor.vocabulary
        canvas, mask = self._batch([self._canvas(row, with_codes=drawing is not None) for row in rows], "text")
        width = max(len(row.words) for row in rows)
        length = canvas.ids.shape[1]
        inside = torch.zeros_like(canvas.editable)
        for index, row in enumerate(rows):
            inside[index, length - len(row.words) :] = (row.free & ~row.open).to(inside.device)
        seen: dict[str, Any] = {"attention_mask": mask, "position_ids": canvas.positions, "grid": canvas.grid}
        settings, policy, draw = describing, None, None
        predict: Predictor
        if drawing is None:
            first_id = vocabulary.text_columns[0]
            predict = self._predictor(canvas, mask, vocabulary.text_columns, {"policy": describing["policy"]})
        else:
            first_id, settings = 0, {**drawing, "block_length": None}
            if drawing["policy"].get("name") in SHADOWED:
                raise InputError(
                    f"The policy {drawing['policy']['name']} is not for words and picture together: take another, or "
                    "leave together out."
                )
            predict = restricted(full(self.model, **seen), canvas.modality,
                                 [vocabulary.text_columns, vocabulary.image_columns])
            policy = by_modality(canvas.modality, canvas.editable, text=policy_from_config(describing["policy"]),
                                 image=policy_from_config(drawing["policy"]))
            draw = draw_by_modality(canvas.modality, text=draw_from_config(describing["draw"]),
                                    image=draw_from_config(drawing["draw"]))
        special = self.processor.tokenizer.all_special_ids
        predict = without(predict, inside, special, first_id=first_id)
        spans = self._spans(rows, length)
        if spans:
            formats = Formats(spans, mask_id=vocabulary.mask_id, first_id=first_id)
            base = draw_from_config(describing["draw"]) if draw is None else draw
            predict, draw = formats.predict(predict), formats.draw(base)
        states = self._run(canvas, predict, settings, first_id=first_id, generator=generators, policy=policy, draw=draw,
                           replay=replay)
        open_places = canvas.editable & (canvas.ids == vocabulary.mask_id)
        for step, state in enumerate(states):
            if callback is not None:
                left = ((state.x == vocabulary.mask_id) & open_places).sum() / open_places.sum().clamp(min=1)
                callback(self, step, float(left), {"ids": state.x0[:, length - width :]})
        ids, sure = state.x.cpu(), state.confidence.cpu()
        found = []
        for index, row in enumerate(rows):
            tail = slice(length - len(row.words), length)
            row = row._replace(words=ids[index, tail], sure=torch.where(row.free, sure[index, tail], row.sure))
            if drawing is not None:
                places = canvas.modality[index].cpu() == IMAGE
                codes = vocabulary.image_codes(ids[index, places]).view(self.grid)
                row = row._replace(codes=codes, confidence=sure[index, places].view(self.grid))
            found.append(row)
        return found

    def _spans(self, rows: Sequence[PartialRow], length: int) -> list[Span]:
        """The holes with patterns of a canvas [B, length] that ends in the rows' words."""
        known: dict[tuple[str, bool], Automaton] = {}
        spans = []
        for index, row in enumerate(rows):
            for number, pattern in enumerate(row.patterns, 1):
                places = (row.pattern == number).nonzero()[:, 0]
                key = pattern, bool(row.open[places].any())
                if key not in known:
                    known[key] = self._automaton(pattern, ends=key[1])
                spans.append(Span(index, places + length - len(row.words), known[key]))
        return spans

    def _draw_codes(
        self,
        rows: list[PartialRow],
        settings: Mapping[str, Any],
        *,
        generators: list[torch.Generator],
        callback: StepCallback | None,
        replay: Recording | None,
    ) -> list[PartialRow]:
        """The rows with their open codes drawn from their words, in the draw layout, with guidance."""
        vocabulary = self.processor.vocabulary
        prompts = [self._said(row) for row in rows]
        canvas, predict = self._drawn(rows, prompts, settings)
        if settings["guidance_scale"] != 1 and any(prompts):
            empty, unconditional = self._drawn(rows, [[]] * len(rows), settings)
            other = other_canvas(empty.ids, _image_places(canvas), _image_places(empty))
            predict = guided(predict, unconditional, settings["guidance_scale"], other=other)
        first_id = vocabulary.image_columns[0]
        states = self._run(canvas, predict, settings, first_id=first_id, generator=generators, replay=replay)
        places = _image_places(canvas)
        for step, state in enumerate(states):
            if callback is not None:
                shape = (len(rows), *self.grid)
                undecided = (state.x == vocabulary.mask_id).gather(1, places).view(shape)
                ids = state.x0.gather(1, places)
                codes = vocabulary.image_codes(ids.masked_fill(ids == vocabulary.mask_id, first_id)).view(shape)
                callback(self, step, float(undecided.float().mean()), {"codes": codes, "undecided": undecided})
        codes = vocabulary.image_codes(state.x.gather(1, places)).cpu()
        sure = state.confidence.gather(1, places).cpu()
        return [row._replace(codes=codes[index].view(self.grid), confidence=sure[index].view(self.grid))
                for index, row in enumerate(rows)]

    def _drawn(
        self, rows: Sequence[PartialRow], prompts: Sequence[list[int]], settings: Mapping[str, Any]
    ) -> tuple[Canvas, Predictor]:
        """The draw layout [B, L] with masks at the open codes, and its predictor."""
        vocabulary = self.processor.vocabulary
        canvases = []
        for row, prompt in zip(rows, prompts, strict=True):
            canvas = sequence.draw_canvas(prompt, row.codes, self.grid, vocabulary)
            editable = canvas.editable.clone()
            editable[canvas.modality == IMAGE] = row.opened.flatten()
            canvases.append(hidden(canvas._replace(editable=editable), row.opened, vocabulary.mask_id))
        canvas, mask = self._batch(canvases, "text")
        return canvas, self._predictor(canvas, mask, vocabulary.image_columns, {"policy": settings["policy"]})

    def _said(self, row: PartialRow) -> list[int]:
        """A row's words up to their end."""
        ids: list[int] = row.words.tolist()
        return ids[: ids.index(self.processor.vocabulary.eos_id)] if self.processor.vocabulary.eos_id in ids else ids

    def _output(self, rows: Sequence[PartialRow], *, with_text: bool, drawn: bool, keep_pixels: bool) -> FillOutput:
        texts, tokens, choices = None, None, None
        if with_text:
            texts = [self.processor.text(row.words) for row in rows]
            tokens = [told_apart(self.processor, row.words, row.sure) for row in rows]
            choices = [row.choices for row in rows]
        if not drawn:
            return FillOutput(None, None, None, None, texts, tokens, choices)
        codes = torch.stack([row.codes for row in rows])
        pictures = self.processor.images(self.visual_tokenizer.decode(codes.to(self._execution_device)))
        if keep_pixels:
            fit = self.processor.picture_fit
            pictures = [picture if row.given is None else put_back(row.given, picture, fit)
                        for row, picture in zip(rows, pictures, strict=True)]
        opened, sure = (torch.stack([getattr(row, name) for row in rows]) for name in ("opened", "confidence"))
        return FillOutput(pictures, codes, opened, sure, texts, tokens, choices)


def _image_places(canvas: Canvas) -> Tensor:
    """The positions [B, h * w] of the codes of a canvas [B, L] with one picture a row."""
    return (canvas.modality == IMAGE).nonzero()[:, 1].view(len(canvas.ids), -1)


def _listed(pictures: Picture | Sequence[Picture] | None) -> list[Picture | None]:
    if pictures is None or isinstance(pictures, (str, Path, bytes, Image.Image)):
        return [pictures]
    return list(pictures)

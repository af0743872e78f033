"""Lumina-DiMOO (arXiv:2510.06308): pictures from text, guided, kept in part, with its cache and from a picture; text.

Its canvas is prompt, answer_start, boi, lines of codes with a line end each, eoi, answer_end; an unconditional canvas
has another prompt before the same rest. B rows, P places of the canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.convert import load_predictor
from mmdlm.corruption import Corrupted
from mmdlm.evaluation.parity import Case, Check, close, equal, handed_to, same_passes
from mmdlm.evaluation.parity.blocks import MASK_MAY_STAY, fill_in_blocks
from mmdlm.evaluation.parity.computed import computed_by
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.objectives import denoising_loss
from mmdlm.sampling.caches import image_cache
from mmdlm.sampling.denoise import Predictor, denoise
from mmdlm.sampling.predictors import Other, full, guided, guided_by_each, other_canvas
from mmdlm.sampling.published_lumina import gumbel_of_masks, maskgit_of_masks

NOT_HIDDEN = "padding not hidden"  # the released forward drops its attention mask


def checks(case: Case) -> Iterator[Check]:
    """Per run the ids of every pass and the output; with the cache also which places each pass computed."""
    for name, arguments in case.runs.items():
        model = _model(case, arguments)
        if arguments["function"] == "generate_text_understanding":
            yield from _text(model, name, arguments, case.run(name))
        elif arguments["function"] in ("generate_image", "generate_i2i"):
            yield from _picture(model, name, arguments, case.run(name))
        else:
            yield Check(name, "not replayed", False, f"the function {arguments['function']} is unknown")
    if "ragged.input_ids" in case.tensors:
        yield from _ragged(_model(case, {}), case.run("ragged"))


def _model(case: Case, run: Mapping[str, Any]) -> MaskPredictor:
    """The model, its image codes being the last rows of its table, as the released program has it by default."""
    sizes = [int(other["codebook_size"]) for other in case.runs.values() if "codebook_size" in other]
    codes = int(run.get("codebook_size", sizes[0] if sizes else 1))
    given = {"image_size": codes, "image_start": _rows(case) - codes}
    mask_id = run.get("mask_token_id", run.get("mask_id"))
    if mask_id is not None:
        given["mask_id"] = int(mask_id)
    return load_predictor(case.directory, dtype=torch.float32, vocabulary=given)


def _picture(model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    ids, mask_id, steps = tensors["prompt"], model.vocabulary.mask_id, int(run["timesteps"])
    random = torch.Generator()
    if run.get("generator_seed") is not None:
        random.manual_seed(int(run["generator_seed"]))
    temperature = float(run["temperature"])
    with computed_by(model) as passes, handed_to(model) as handed:
        *_, last = denoise(
            _predictor(model, ids, run, tensors),
            ids,
            maskgit_of_masks(temperature=temperature, generator=random),
            editable=ids == mask_id,
            mask_id=mask_id,
            steps=steps,
            draw=gumbel_of_masks(temperature=temperature, generator=random),
            generator=[random] * len(ids),
            first_id=model.vocabulary.image_columns[0],
        )
    recorded = [row[:, :n] for row, n in zip(tensors["pass_input"], tensors["pass_len"].tolist(), strict=True)]
    yield same_passes(f"{name} passes", handed, recorded)
    if "pass_compute_mask" in tensors:
        lengths = tensors["pass_len"].tolist()
        masks = [row[:, :n] for row, n in zip(tensors["pass_compute_mask"], lengths, strict=True)]
        yield same_passes(f"{name} computed places", [one.places for one in passes], masks)
    width, start = int(run["newline_every"]), int(run["code_start"])
    place = torch.arange(int(run["seq_len"]))
    codes = last.x[:, start + place + place // width]
    yield equal(f"{name} output", codes, tensors["output"])


def _predictor(model: MaskPredictor, ids: Tensor, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Predictor:
    """The conditional branch, and the unconditional ones after it, each in a forward of its own."""
    columns = model.vocabulary.image_columns
    scale = float(run.get("cfg_scale") or 0)
    if run["function"] == "generate_i2i":
        scales = {"uncon_text": scale, "uncon_image": float(run.get("cfg_img") or 0)}
        if not any(scales.values()):
            return full(model, columns=columns)
        others = [
            (full(model, columns=columns), weight + 1, _other(ids, tensors[name], run))
            for name, weight in scales.items()
        ]
        return guided_by_each(full(model, columns=columns), others)
    if scale <= 0:
        return full(model, columns=columns)

    def branch() -> Predictor:
        if not run.get("use_cache"):
            return full(model, columns=columns)
        return image_cache(
            model,
            steps=int(run["timesteps"]),
            columns=columns,
            cache_ratio=float(run["cache_ratio"]),
            refresh_interval=int(run["refresh_interval"]),
            warmup_ratio=float(run["warmup_ratio"]),
        )

    return guided(branch(), branch(), scale + 1, other=_other(ids, tensors["uncon_ids"], run))


def _other(ids: Tensor, prompt: Tensor, run: Mapping[str, Any]) -> Other:
    """The canvas with `prompt` before the answer, which begins two places before the codes."""
    start = int(run["code_start"]) - 2
    shared = torch.arange(start, ids.shape[1]).expand(len(ids), -1)
    return other_canvas(
        torch.cat([prompt.expand(len(ids), -1), ids[:, start:]], dim=1), shared, shared - start + prompt.shape[1]
    )


def _text(model: MaskPredictor, name: str, run: Mapping[str, Any], tensors: dict[str, Tensor]) -> Iterator[Check]:
    """LLaDA's loop behind code_start places of prompt; what is recorded is only ever masked behind them."""
    start = int(run["code_start"])
    filled = fill_in_blocks(model, tensors["prompt"][:, :start], int(run["gen_length"]), run)
    yield same_passes(f"{name} passes", filled.passes, tensors["pass_input"])
    yield equal(f"{name} output", filled.state.x, tensors["output"], note=MASK_MAY_STAY)


def _ragged(model: MaskPredictor, tensors: dict[str, Tensor]) -> Iterator[Check]:
    """Rows of unlike lengths, filled up with id 0 that everybody sees, and the mean cross entropy of the labels."""
    ids, labels = tensors["input_ids"], tensors["labels"]
    ids = ids.masked_fill(ids < 0, 0)
    logits = full(model)(ids, torch.arange(ids.shape[1]).expand_as(ids))
    yield close("ragged logits", logits, tensors["logits"], atol=2e-4, note=NOT_HIDDEN)
    supervised = labels >= 0
    corrupted = Corrupted(ids, supervised, torch.ones(ids.shape))
    loss = denoising_loss(logits, labels.clamp(min=0), corrupted)
    yield close("ragged loss", loss, tensors["loss"], rtol=1e-4, note=NOT_HIDDEN)


def _rows(case: Case) -> int:
    """Rows of the model's table."""
    from mmdlm.convert.weights import read_json

    config = read_json(case.directory / "config.json")
    return int(config.get("embedding_size") or config["vocab_size"])

"""One forward of the transformer of MMaDA and LLaDA (arXiv:2505.15809, arXiv:2502.09992), with every kind of mask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmdlm.attention import block_causal, full
from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import Case, Check, close
from mmdlm.models.mask_predictor import MaskPredictor

ATOL, RTOL = 2e-4, 1e-4  # as the case states, float32


def checks(case: Case) -> Iterator[Check]:
    """Logits of every recorded forward, and the hidden states of the plain one."""
    sizes = {key: case.named_ids[key] for key in ("text_size",) if key in case.named_ids}
    model = load_predictor(case.directory, dtype=torch.float32, vocabulary=sizes)
    runs = {name: case.run(name) for name in dict.fromkeys(key.split(".")[0] for key in case.tensors)}
    with torch.no_grad():
        for name, run in runs.items():
            if "input_ids" in run:
                yield from _forward(model, name, run)
            elif "max_abs_diff_to_plain" in run:
                yield _all_seen(model, name, runs["plain"], run["max_abs_diff_to_plain"])


def _forward(model: MaskPredictor, name: str, run: dict[str, Tensor]) -> Iterator[Check]:
    ids = run["input_ids"]
    seen, bias = run.get("attention_mask"), run.get("attention_bias")
    rows, note, mask = torch.ones_like(ids, dtype=torch.bool), "", None  # rows: the places that are compared
    if bias is not None and bias.is_floating_point():
        mask, note = bias, "a float bias is added, not a mask: given as one"
    elif bias is not None:
        # The default hides padding from everybody, and leaves to padding's own queries what they see.
        valid = bias.diagonal(dim1=-2, dim2=-1).squeeze(1)  # a place that does not see itself is padding
        yield _logits(f"{name} logits", model, ids, full(valid), run["logits"], valid)
        mask, note = _shut(bias), "padding included: as released it sees all places alike"
    elif seen is not None and not bool(seen.all()):
        place = torch.arange(ids.shape[1]).expand_as(ids)
        mask = _shut(block_causal(place) & seen.bool()[:, None, None, :])
        rows, note = seen.bool(), "causal, as released where a mask holds a zero; by default it stays bidirectional"
    for key in (key for key in run if key.startswith("logits")):  # logits, or logits_last8: of the last 8 places
        count = int(key.removeprefix("logits").removeprefix("_last") or ids.shape[1])
        yield _logits(f"{name} {key}", model, ids, mask, run[key], rows[:, -count:], note=note)
    yield from _hidden(model, name, ids, mask, run)


def _logits(
    name: str,
    model: MaskPredictor,
    ids: Tensor,
    mask: Tensor | None,
    expected: Tensor,
    rows: Tensor,
    *,
    note: str = "",
) -> Check:
    """The logits at the last places of each row, as many as `rows` bool [B, n] has, where it is True."""
    got = model(ids, attention_mask=mask).logits[:, -rows.shape[1] :]
    return close(name, got[rows], expected[rows], atol=ATOL, rtol=RTOL, note=note)


def _hidden(
    model: MaskPredictor, name: str, ids: Tensor, mask: Tensor | None, run: dict[str, Tensor]
) -> Iterator[Check]:
    """hidden.i is what block i is given; the last is what the head reads."""
    wanted = {int(key.split(".")[1]): value for key, value in run.items() if key.startswith("hidden.")}
    if wanted:
        states = model.trunk(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        for index, value in sorted(wanted.items()):
            yield close(f"{name} hidden.{index}", states[index], value, atol=ATOL, rtol=RTOL)


def _all_seen(model: MaskPredictor, name: str, plain: dict[str, Tensor], recorded: Tensor) -> Check:
    """A mask of ones must change nothing: the difference to no mask at all, beside the recorded one."""
    ids = plain["input_ids"]
    masked = model(ids, attention_mask=full(torch.ones_like(ids, dtype=torch.bool))).logits
    difference = (masked - model(ids).logits).abs().max()
    return close(f"{name} difference", difference, recorded, atol=ATOL)


def _shut(seen: Tensor) -> Tensor:
    """bool [B, 1, L, L] as the released additive bias: the least float32 where nothing may be seen.

    A query that may see nothing then sees every place alike.
    """
    least = torch.finfo(torch.float32).min
    return torch.zeros(seen.shape).masked_fill(~seen, least)

"""How likely a model finds what is true: the bound in nats and bits per token, matching, and multiple choice.

The bound is LLaDA's (arXiv:2502.09992, eq. 6): n/l * sum over masked places of -log p(x0 | x_t), l of the n editable
places masked, averaged over l and masks; see `mmdlm.objectives.likelihood_bound`, its twin for training batches. Here
every row has a generator of its own, so that a row's number depends neither on its batch nor on how many processes
share the rows, and rows with one seed and as many editable places get the same masks: what is compared is then
compared on the same questions, and most of the Monte Carlo error cancels.

Shape letters: N rows to score, S masks for each, L positions, W asked places, V ids, I pictures, J texts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdlm import attention, sequence
from mmdlm.errors import InputError
from mmdlm.objectives import supervised_places
from mmdlm.sampling.denoise import Predictor
from mmdlm.sampling.predictors import full, restricted
from mmdlm.sequence import IMAGE, TEXT, Canvas
from mmdlm.vocabulary import Vocabulary


class Bounds(NamedTuple):
    """Estimates of upper bounds of -log p(editable places | the others), in nats, each [N]."""

    nats: Tensor  # float64
    standard_error: Tensor  # float64: of the estimate, by Monte Carlo; on the safe side, for the counts are stratified
    text_nats: Tensor  # float64: the text places' part of `nats`
    image_nats: Tensor  # float64: the image places' part
    tokens: Tensor  # int64: editable places


@torch.no_grad()
def bounds(
    model: nn.Module,
    canvases: Sequence[Canvas],
    *,
    vocabulary: Vocabulary,
    samples: int = 32,
    seeds: Sequence[int] | int = 0,
    batch_size: int = 64,
) -> Bounds:
    """The bound of the editable places of each canvas [L], whose ids are clean, given the other places.

    samples: S, masks per row; each is one row of a forward of `batch_size` rows. seeds: one per row; or one number s,
    row i then gets s + i. A text place is judged among text ids, an image place among image ids. The error of a mean
    over rows is only that of independent rows where the seeds differ.

    Raises InputError for fewer than two samples, and ValueError for a canvas without an editable place.
    """
    if samples < 2:
        raise InputError(f"The likelihood bound got {samples} samples, expected at least 2 for its standard error.")
    row_seeds = [seeds + row for row in range(len(canvases))] if isinstance(seeds, int) else list(seeds)
    if len(row_seeds) != len(canvases):
        raise ValueError(f"bounds got {len(row_seeds)} seeds for {len(canvases)} rows, expected one for each.")
    parts = torch.zeros(len(canvases) * samples, 2, dtype=torch.float64)
    work = _masked_rows(canvases, samples, row_seeds, vocabulary.mask_id)
    start = 0
    while chunk := list(islice(work, batch_size)):
        parts[start : start + len(chunk)] = _losses(model, chunk, vocabulary)
        start += len(chunk)
    parts = parts.view(len(canvases), samples, 2)
    total = parts.sum(2)
    tokens = torch.tensor([int(canvas.editable.sum()) for canvas in canvases])
    by_kind = parts.mean(1)
    return Bounds(
        total.mean(1), (total.var(1) / samples).sqrt(), by_kind[:, TEXT], by_kind[:, IMAGE], tokens
    )


def masks(places: int, samples: int, generator: torch.Generator) -> Tensor:
    """Which of n places each of S masks hides: bool [S, n], l of them, l uniform in 1 to n, stratified over the S."""
    u = 1 - torch.rand(samples, generator=generator, dtype=torch.float64)
    count = ((torch.arange(samples) + u) / samples * places).ceil().clamp(1, places)
    order = torch.rand(samples, places, generator=generator, dtype=torch.float64).argsort(dim=1, stable=True)
    return order.argsort(dim=1, stable=True) < count[:, None]


class _Masked(NamedTuple):
    hidden: Canvas  # ids with masks
    clean: Tensor  # int64 [L]
    masked: Tensor  # bool [L]
    weight: float


def _masked_rows(canvases: Sequence[Canvas], samples: int, seeds: Sequence[int], mask_id: int) -> Iterator[_Masked]:
    for canvas, seed in zip(canvases, seeds, strict=True):
        places = int(canvas.editable.sum())
        if places == 0:
            raise ValueError("bounds got a canvas without an editable place, expected one to judge")
        for hidden in masks(places, samples, torch.Generator().manual_seed(seed)):
            masked = torch.zeros_like(canvas.editable)
            masked[canvas.editable] = hidden
            ids = canvas.ids.masked_fill(masked, mask_id)
            yield _Masked(canvas._replace(ids=ids), canvas.ids, masked, places / int(hidden.sum()))


def _losses(model: nn.Module, rows: Sequence[_Masked], vocabulary: Vocabulary) -> Tensor:
    """The weighted losses of masked rows, by modality: float64 [rows, 2]."""
    device = next(model.parameters()).device
    # Nobody sees the padding: published vocabularies may have no id for it.
    pad_id = vocabulary.pad_id if vocabulary.pad_id >= 0 else vocabulary.mask_id
    canvas, valid = sequence.batch([row.hidden for row in rows], pad_id=pad_id, side="left")
    canvas = Canvas(*(part.to(device) for part in canvas))
    mask = attention.full(valid)
    masked, clean = torch.zeros_like(valid), torch.zeros(valid.shape, dtype=torch.long)
    masked[valid], clean[valid] = torch.cat([row.masked for row in rows]), torch.cat([row.clean for row in rows])
    where = supervised_places(masked).to(device)
    masked, clean = masked.to(device), clean.to(device)
    kinds = canvas.modality[masked].unique()
    ranges = (vocabulary.text_columns, vocabulary.image_columns)
    columns = ranges[int(kinds[0])] if len(kinds) == 1 else None
    predict: Predictor = full(
        model,
        attention_mask=None if mask is None else mask.to(device),
        position_ids=canvas.positions,
        grid=canvas.grid,
        columns=columns,
    )
    if columns is None:
        predict = restricted(predict, canvas.modality, ranges)
    logits = predict(canvas.ids, where)
    asked, first_id = masked.gather(1, where), columns[0] if columns else 0
    targets = (clean.gather(1, where) - first_id).masked_fill(~asked, 0)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    # where, not a product: a filled-up place may have an infinite loss, and 0 * inf is no number
    nats = torch.where(asked, losses.double(), 0.0)
    kind = canvas.modality.gather(1, where)
    by_kind = torch.stack([torch.where(kind == one, nats, 0.0).sum(1) for one in (TEXT, IMAGE)], dim=1).cpu()
    return by_kind * torch.tensor([row.weight for row in rows], dtype=torch.float64)[:, None]


# ------------------------------------------------------------------------------------------------ what is reported


def per_token(found: Bounds, *, counted: Sequence[int] | None = None) -> dict[str, Any]:
    """The bound over all rows: nats and bits per token, perplexity, and two errors of the nats per token.

    counted: how many tokens a row counts for, where that is not all its editable places: a caption's own tokens and
    one eos, though the bound is that of the whole answer area. monte_carlo_error: of the estimate over masks, for rows
    of different seeds; sampling_error: of the rows drawn, one standard error (of a ratio); None for a single row.
    """
    tokens = found.tokens.double() if counted is None else torch.tensor(list(counted), dtype=torch.float64)
    whole = tokens.sum()
    mean = found.nats.sum() / whole
    spread = None
    if len(tokens) > 1:
        residual = found.nats - mean * tokens
        spread = float((residual.square().sum() * len(tokens) / (len(tokens) - 1)).sqrt() / whole)
    return {
        "nats_per_token": float(mean),
        "bits_per_token": float(mean) / math.log(2),
        "perplexity": float(mean.exp()),
        "monte_carlo_error": float(found.standard_error.square().sum().sqrt() / whole),
        "sampling_error": spread,
        "nats": float(found.nats.sum()),
        "tokens": int(whole),
        "rows": len(tokens),
    }


def text_canvas(ids: Sequence[int], vocabulary: Vocabulary, *, prompt: Sequence[int] = ()) -> Canvas:
    """Plain text, all of it to be judged given `prompt`: for the perplexity of text under a text model."""
    judged = sequence.text(ids, editable=True)
    return sequence.interleave([sequence.text(prompt), judged] if len(prompt) else [judged])


def retrieval(nats: Tensor) -> dict[str, float]:
    """retrieval@1 over a pool, both ways, from nats [I, J] of text j given picture i; the pairs are the diagonal.

    text_to_picture: under a flat prior over the pool, the picture that makes the text likeliest is the likeliest
    picture. picture_to_text: the likeliest text. picture_to_text_by_information: the text whose probability the picture
    raises most, by p(text) = the mean over the pool; without it, texts that are likely anyway win (arXiv:2306.01879).
    A tie among k counts 1/k. Raises ValueError unless there are as many texts as pictures, at least two.
    """
    if nats.dim() != 2 or nats.shape[0] != nats.shape[1] or len(nats) < 2:
        raise ValueError(f"retrieval got nats {tuple(nats.shape)}, expected as many texts as pictures, at least two")
    nats = nats.double()
    prior = -(torch.logsumexp(-nats, 0) - math.log(len(nats)))
    return {
        "text_to_picture": _at_one(nats.T),
        "picture_to_text": _at_one(nats),
        "picture_to_text_by_information": _at_one(nats - prior),
        "chance": 1 / len(nats),
    }


def match(
    model: nn.Module,
    pictures: Sequence[Tensor],
    texts: Sequence[Sequence[int]],
    *,
    vocabulary: Vocabulary,
    answer_length: int,
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """nats float64 [I, J] of every text (ids) as caption of every picture (codes [h, w]); the same masks for all."""
    canvases = [
        sequence.describe_canvas(codes.cpu(), _shape(codes), text, answer_length, vocabulary)
        for codes in pictures
        for text in texts
    ]
    found = bounds(
        model, canvases, vocabulary=vocabulary, samples=samples, seeds=[seed] * len(canvases), batch_size=batch_size
    )
    return found.nats.view(len(pictures), len(texts))


def choose(
    model: nn.Module,
    codes: Tensor,
    question: Sequence[int],
    choices: Sequence[Sequence[int]],
    *,
    vocabulary: Vocabulary,
    answer_length: int,
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 64,
) -> Bounds:
    """Multiple choice without writing: the bound of every choice (ids) as answer to a question (ids) about a picture.

    The answer is the choice of the fewest nats, `int(found.nats.argmin())`; all are judged on the same masks.
    Raises InputError for fewer than two choices.
    """
    if len(choices) < 2:
        raise InputError(f"A question has {len(choices)} choices, expected at least two to choose from.")
    canvases = [
        sequence.ask_canvas(codes.cpu(), _shape(codes), question, choice, answer_length, vocabulary)
        for choice in choices
    ]
    return bounds(
        model, canvases, vocabulary=vocabulary, samples=samples, seeds=[seed] * len(canvases), batch_size=batch_size
    )


def _shape(codes: Tensor) -> tuple[int, int]:
    height, width = codes.shape
    return height, width


def _at_one(nats: Tensor) -> float:
    """The share of rows whose diagonal entry is the smallest."""
    smallest = nats == nats.min(1, keepdim=True).values
    return float((smallest.diagonal() / smallest.sum(1)).mean())

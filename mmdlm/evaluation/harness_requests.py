"""What lm_eval and lmms_eval ask of a model, answered by ours: texts to write, and how likely texts are.

A request is a prompt with a picture or without. With a picture it has the layout of a question, and without a prompt
that of a caption; with words alone it is plain text, the prompt given and the rest masked, as LLaDA's harness has it
(arXiv:2502.09992). A model that learned pictures only answers plain text too, and nobody should expect sense.

Likelihoods are the bound of `mmdlm.evaluation.likelihood`, all requests on masks of one seed, so that choices of one
length are compared on the same masks. Shape letters: B rows, L positions, W places of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmdlm import attention, sequence
from mmdlm.errors import InputError
from mmdlm.evaluation.likelihood import bounds, text_canvas
from mmdlm.processing import Picture
from mmdlm.sampling.denoise import denoise
from mmdlm.sampling.draws import greedy
from mmdlm.sampling.policies import draw_from_config, policy_from_config, top_k
from mmdlm.sampling.predictors import full
from mmdlm.sequence import Canvas


class Request(NamedTuple):
    """What a harness asks: words, and the picture that they are about."""

    prompt: str
    picture: Picture | None = None


class Settings(NamedTuple):
    """How requests are answered; `settings_from_arguments` makes them of a harness's model arguments."""

    batch_size: int = 8
    steps: int | None = None  # None: the preset's
    samples: int = 32  # masks for each likelihood
    seed: int = 0
    check_greedy: bool = True  # whether a likelihood also says if the text is what the model itself would write


def settings_from_arguments(batch_size: int | str | None = None, **arguments: Any) -> Settings:
    """The settings of a harness's `--model_args steps=8,...`. Raises InputError for what is not known or no number."""
    arguments.pop("max_batch_size", None)  # harnesses always pass it, for a search of theirs
    unknown = sorted(set(arguments) - set(Settings._fields))
    if unknown:
        raise InputError(
            f"The model mmdlm has no argument {unknown[0]!r}, expected some of pretrained, "
            f"{', '.join(Settings._fields)}: leave it out."
        )
    if batch_size is not None:
        arguments["batch_size"] = 8 if str(batch_size).startswith("auto") else batch_size
    for name in ("batch_size", "steps", "samples", "seed"):
        given = str(arguments.get(name, 1))
        if not given.isdecimal() or (name != "seed" and int(given) < 1):
            raise InputError(f"The model's argument {name} is {given!r}, expected a whole number: mend it.")
        if name in arguments:
            arguments[name] = int(given)
    arguments["check_greedy"] = str(arguments.get("check_greedy", True)).lower() in ("true", "1")
    return Settings(**arguments)


def write(
    pipe: Any,
    requests: Sequence[Request],
    settings: Settings,
    *,
    longest: Sequence[int],
    until: Sequence[Sequence[str]],
    done: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """What the model writes to every request, at most `longest` tokens of it, cut before the first of its `until`.

    Request i has the seed settings.seed + i. `done(n)` is called after every n requests. Raises InputError for a
    request that is too long for the model.
    """
    written: list[str] = [""] * len(requests)
    for part in _batches(range(len(requests)), settings.batch_size, lambda place: _task(requests[place])):
        asked = [requests[place] for place in part]
        preset = pipe.presets["describe" if _task(asked[0]) == "describe" else "ask"]
        room = int(preset["answer_length"])
        ids = _decode(
            pipe, [_open_canvas(pipe, one, room) for one in asked],
            policy=policy_from_config(preset["policy"]), draw=draw_from_config(preset["draw"]),
            steps=settings.steps or preset["num_inference_steps"], seeds=[settings.seed + place for place in part],
        )  # fmt: skip
        for place, row in zip(part, ids, strict=True):
            text = pipe.processor.text(row[: longest[place]])
            stops = [text.index(stop) for stop in until[place] if stop and stop in text]
            written[place] = text[: min(stops, default=len(text))]
        done(len(part))
    return written


def score(
    pipe: Any,
    requests: Sequence[Request],
    continuations: Sequence[str],
    settings: Settings,
    *,
    done: Callable[[int], None] = lambda count: None,
) -> list[tuple[float, bool]]:
    """(nats, greedy) of every continuation: the bound of -log p(continuation | request), and whether it is what the
    model writes by itself, greedily, one token a pass (False throughout without settings.check_greedy).

    Raises InputError for an empty continuation, and for what is too long for the model.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    canvases = [_closed_canvas(pipe, one, text) for one, text in zip(requests, continuations, strict=True)]
    for part in _batches(range(len(requests)), settings.batch_size, lambda place: int(canvases[place].editable.sum())):
        rows = [canvases[place] for place in part]
        nats = bounds(
            pipe.model, rows, vocabulary=pipe.processor.vocabulary, samples=settings.samples,
            seeds=[settings.seed] * len(rows), batch_size=max(settings.batch_size, settings.samples),
        ).nats.tolist()  # fmt: skip
        same = [False] * len(rows)
        if settings.check_greedy:
            room = int(rows[0].editable.sum())
            own = _decode(pipe, rows, policy=top_k(), draw=greedy, steps=room, seeds=[settings.seed] * len(rows))
            same = [torch.equal(row.ids[row.editable], ids.cpu()) for row, ids in zip(rows, own, strict=True)]
        for place, value, equal in zip(part, nats, same, strict=True):
            found[place] = (value, equal)
        done(len(part))
    return found


def score_whole(pipe: Any, texts: Sequence[str], settings: Settings) -> list[float]:
    """The bound of -log p(text) of plain texts of any length, in nats.

    A text longer than the model's positions is taken in windows of half of them, each given the one before: every
    token counts once. Raises InputError for an empty text.
    """
    vocabulary, half = pipe.processor.vocabulary, pipe.model.config.max_positions // 2
    totals = []
    for text in texts:
        ids = pipe.processor.text_ids(text)
        if not ids:
            raise InputError("A text to be judged is empty, expected some words.")
        windows = [text_canvas(ids[start : start + half], vocabulary, prompt=ids[max(start - half, 0) : start])
                   for start in range(0, len(ids), half)]  # fmt: skip
        found = bounds(pipe.model, windows, vocabulary=vocabulary, samples=settings.samples,
                       seeds=[settings.seed] * len(windows), batch_size=max(settings.batch_size, settings.samples))
        totals.append(float(found.nats.sum()))
    return totals


# ------------------------------------------------------------------------------------------------- the canvas


def _task(request: Request) -> str:
    return "text" if request.picture is None else "ask" if request.prompt.strip() else "describe"


def _open_canvas(pipe: Any, request: Request, room: int) -> Canvas:
    """The request with `room` masked places after it."""
    if request.picture is None:
        prompt, vocabulary = pipe.processor.text_ids(request.prompt.strip()), pipe.processor.vocabulary
        given = [sequence.text(prompt)] if prompt else []
        return sequence.interleave([*given, sequence.masked_text(room, vocabulary)])
    question = request.prompt.strip() or None
    canvas: Canvas = pipe.answer_canvas(_codes(pipe, request.picture), question, room)
    return canvas


def _closed_canvas(pipe: Any, request: Request, continuation: str) -> Canvas:
    """The request with a text to be judged after it: in plain text its tokens, else the whole area of an answer."""
    processor, vocabulary = pipe.processor, pipe.processor.vocabulary
    if not continuation.strip():
        raise InputError("A continuation to be judged is empty, expected some words: look at the task's choices.")
    if request.picture is None:
        # Tokenised together, so that the words are those that a reader of the whole text would see.
        given = processor.text_ids(request.prompt)
        whole = processor.text_ids(request.prompt + continuation)
        ids = whole[len(given) :] if whole[: len(given)] == given else processor.text_ids(continuation)
        return _checked(pipe, text_canvas(ids, vocabulary, prompt=given))
    codes, ids = _codes(pipe, request.picture), processor.text_ids(continuation.strip())
    room = max(int(pipe.presets[_task(request)]["answer_length"]), len(ids) + 1)
    return _checked(pipe, pipe.answer_canvas(codes, request.prompt.strip() or None, room, ids))


def _checked(pipe: Any, canvas: Canvas) -> Canvas:
    limit = pipe.model.config.max_positions
    if len(canvas.ids) > limit:
        raise InputError(
            f"A request is too long by {len(canvas.ids) - limit} tokens, the model has {limit} positions: "
            "take fewer examples in the prompt, or a shorter task."
        )
    return canvas


@torch.no_grad()
def _codes(pipe: Any, picture: Picture) -> Tensor:
    pixels = pipe.processor.pixels(picture).to(pipe.model.device, pipe.visual_tokenizer.dtype)
    codes: Tensor = pipe.visual_tokenizer.encode(pixels)[0].cpu()
    return codes


@torch.no_grad()
def _decode(
    pipe: Any, canvases: Sequence[Canvas], *, policy: Any, draw: Any, steps: int | None, seeds: Sequence[int]
) -> Tensor:
    """The editable places of each canvas, W in every one, filled by the model: int64 [B, W]."""
    vocabulary = pipe.processor.vocabulary
    rows = [sequence.hide(_checked(pipe, canvas), vocabulary.mask_id) for canvas in canvases]
    canvas, valid = sequence.batch(rows, pad_id=vocabulary.eos_id, side="left")  # nobody sees it
    canvas, mask = Canvas(*(part.to(pipe.model.device) for part in canvas)), attention.full(valid)
    predict = full(
        pipe.model, attention_mask=None if mask is None else mask.to(pipe.model.device), position_ids=canvas.positions,
        grid=canvas.grid, columns=vocabulary.text_columns,
    )  # fmt: skip
    states = denoise(
        predict, canvas.ids, policy, editable=canvas.editable, mask_id=vocabulary.mask_id, steps=steps, draw=draw,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], first_id=vocabulary.text_columns[0],
    )  # fmt: skip
    for state in states:
        ids = state.x
    return ids[canvas.editable].view(len(rows), -1)


def _batches(places: Sequence[int], size: int, kind: Callable[[int], Any]) -> Iterator[list[int]]:
    """Places in batches of one kind each, in their order."""
    kinds: dict[Any, list[int]] = {}
    for place in places:
        kinds.setdefault(kind(place), []).append(place)
    for same in kinds.values():
        for start in range(0, len(same), size):
            yield same[start : start + size]


def picture_of(visuals: Any) -> Picture | None:
    """The one picture of a harness's list of visuals; None for none. Raises InputError for several, and for no picture.

    Lists within lists, as some tasks give them, are looked through.
    """
    found: list[Any] = []
    waiting = [visuals]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, (list, tuple)):
            waiting = [*one, *waiting]
        elif one is not None:
            found.append(one)
    if len(found) > 1:
        raise InputError(f"A request has {len(found)} pictures, this model reads one: choose a task with one picture.")
    if found and isinstance(found[0], dict):  # datasets' undecoded picture
        found = [found[0].get("bytes") or found[0].get("path")]
    if found and isinstance(found[0], str):
        found = [Path(found[0])]
    return found[0] if found else None

"""Server-sent events of chat and pictures, in OpenAI's shapes, with drafts where they are asked for.

A text does not come from left to right here: its places firm up in any order. What a plain stream sends is the part
before the first place that is still masked, which will not change any more; `drafts` shows the whole of it.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from mmdlm.serving.engine import Ticket
from mmdlm.serving.follow import Mail
from mmdlm.serving.jobs import Job
from mmdlm.serving.refusals import refusal
from mmdlm.serving.shapes import ChatRequest, ImagesRequest

if TYPE_CHECKING:
    from mmdlm.serving.server import Service

logger = logging.getLogger("mmdlm.serving")


def completion(
    about: dict[str, Any], tickets: Sequence[Ticket], texts: Sequence[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """OpenAI's chat.completion; `seed` and every choice's `confidence` are ours."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text["text"], "refusal": None},
            "logprobs": None,
            "finish_reason": _finish(text),
            "confidence": text["confidence"],
        }
        for i, text in enumerate(texts)
    ]
    usage = text_usage(tickets, texts)
    return {"id": _id(), "object": "chat.completion", **about, "choices": choices, "usage": usage, "seed": seed}


async def chat(
    service: Service, about: dict[str, Any], body: ChatRequest, tickets: list[Ticket], mail: Mail, request_id: str
) -> AsyncIterator[str]:
    """Chunks of chat.completion.chunk, then [DONE]. With `drafts` every step is a chunk with a `draft` besides."""
    head = {"id": _id(), "object": "chat.completion.chunk", **about}

    def chunk(row: int, delta: dict[str, Any], finish: str | None = None, ours: dict[str, Any] | None = None) -> str:
        choice = {"index": row, "delta": delta, "logprobs": None, "finish_reason": finish, **(ours or {})}
        return event({**head, "choices": [choice]})

    sent, texts = [""] * len(tickets), [dict[str, Any]() for _ in tickets]
    try:
        for row in range(len(tickets)):
            yield chunk(row, {"role": "assistant", "content": ""})
        async for row, state in mail.states(tickets):
            job, done = tickets[row].job, bool(state.done.all())
            firm = service.answers.firm(job, state)
            new = firm[len(sent[row]) :] if firm.startswith(sent[row]) else ""
            sent[row] += new
            if new or body.drafts:
                ours = {"draft": service.answers.text_draft(job, state)} if body.drafts else {}
                yield chunk(row, {"content": new} if new else {}, ours=ours)
            if done:
                texts[row] = service.answers.text(job, state)
                yield chunk(row, {}, _finish(texts[row]), {"confidence": texts[row]["confidence"], "seed": job.seed})
        if body.stream_options is not None and body.stream_options.include_usage:
            yield event({**head, "choices": [], "usage": text_usage(tickets, texts)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _error(error, request_id)


async def pictures(
    service: Service, created: int, body: ImagesRequest, tickets: list[Ticket], mail: Mail, request_id: str
) -> AsyncIterator[str]:
    """OpenAI's image_generation events: partial_image for every step with `drafts`, else for `partial_images` steps
    evenly spread (fewer where the client reads more slowly than the model draws), then completed for every picture."""
    side = f"{service.image_size}x{service.image_size}"
    about = {"created_at": created, "size": side, "output_format": "png", "quality": "auto", "background": "opaque"}
    shown, reached = [0] * len(tickets), [0] * len(tickets)
    try:
        async for row, state in mail.states(tickets):
            job, seed = tickets[row].job, tickets[row].job.seed
            passed = sum(state.step >= step for step in _spread(body.partial_images or 0, job))
            if body.drafts or (passed > reached[row] and not bool(state.done.all())):
                reached[row] = passed
                preview = await service.in_thread(service.answers.preview, job, state)
                kind = {"type": "image_generation.partial_image", "partial_image_index": shown[row], "index": row}
                draft = {} if not body.drafts else {"draft": service.answers.picture_draft(job, state)}
                shown[row] += 1
                yield event({**kind, **about, "b64_json": preview, **draft}, named=True)
            if bool(state.done.all()):
                drawn = await service.in_thread(service.answers.picture, job, state, body.prompt)
                kind = {"type": "image_generation.completed", "index": row, "seed": seed}
                usage = picture_usage(tickets[row : row + 1])
                yield event({**kind, **about, "b64_json": drawn, "usage": usage}, named=True)
    except Exception as error:
        yield _error(error, request_id)


def text_usage(tickets: Sequence[Ticket], texts: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Tokens given (once, however many answers) and tokens answered, the fillings after an answer's end left out."""
    job = tickets[0].job
    given, answered = job.length - int(job.canvas.editable.sum()), sum(text["tokens"] for text in texts)
    return {"prompt_tokens": given, "completion_tokens": answered, "total_tokens": given + answered}


def picture_usage(tickets: Sequence[Ticket]) -> dict[str, Any]:
    drawn = sum(int(ticket.job.canvas.editable.sum()) for ticket in tickets)
    given = tickets[0].job.length - int(tickets[0].job.canvas.editable.sum())
    details = {"text_tokens": given, "image_tokens": 0}
    return {"input_tokens": given, "input_tokens_details": details, "output_tokens": drawn,
            "total_tokens": given + drawn}


def event(content: dict[str, Any], *, named: bool = False) -> str:
    """One server-sent event; `named` repeats its type as the event's name, as OpenAI's picture streams do."""
    name = f"event: {content['type']}\n" if named else ""
    return f"{name}data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _error(error: Exception, request_id: str) -> str:
    """After the first byte the status is sent: what goes wrong then is an event, and the stream's last one."""
    refused = refusal(error, request_id)
    if refused.status >= 500:
        logger.error("stream failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    return event(refused.body)


def _spread(count: int, job: Job) -> set[int]:
    """`count` of a job's steps, evenly spread and without the last; fewer where there are not as many."""
    steps = min(job.settings["num_inference_steps"], int(job.canvas.editable.sum()))
    return {round(i * steps / (count + 1)) for i in range(1, count + 1)} - {0, steps}


def _finish(text: dict[str, Any]) -> str:
    return "stop" if text["ended"] else "length"


def _id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"

"""The HTTP interfaces of one model: /v1/caption, OpenAI's chat and pictures, health and metrics, the page.

    app = create_app(Service(pipe, name="pictures", limits=Limits()), keys={}, local=True)

What a request means is in `shapes`, what is done about it in `jobs`, with others in `engine`; what a client may do at
all is decided at the `door`. Streams of chat and pictures are in `streams`.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio.to_thread
from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from mmdlm import __version__
from mmdlm.errors import InputError
from mmdlm.pipelines import TextToImage
from mmdlm.serving import streams
from mmdlm.serving.answers import Answers
from mmdlm.serving.clients import Clients
from mmdlm.serving.door import Door
from mmdlm.serving.engine import Busy, Engine, Late, Ticket
from mmdlm.serving.follow import ClientGone, Mail, finished, unless_gone
from mmdlm.serving.forms import content_type, form, form_schema, unsupported
from mmdlm.serving.jobs import Job, Studio
from mmdlm.serving.metrics import Metrics
from mmdlm.serving.page import page, page_policy
from mmdlm.serving.pictures import picture_bytes
from mmdlm.serving.refusals import Refused, refusal
from mmdlm.serving.settings import Limits
from mmdlm.serving.shapes import CaptionRequest, ChatRequest, EditRequest, ImagesRequest

logger = logging.getLogger("mmdlm.serving")

PREPARING = 2  # pictures unpacked and encoded at once, beside the engine's thread
FETCHING = 8  # pictures fetched at once: a slow host keeps nobody from being prepared
FURTHER_CAPTIONS = 1.0  # temperature of captions after the first, where none is asked for


class Service:
    """One model and what may be asked of it. `url_hosts`: where pictures may be fetched from.

    `adapters`: those that are in the model, each with the hash of its weights; a request's `model` names one.
    """

    def __init__(
        self,
        pipe: TextToImage,
        *,
        name: str,
        model_hash: str = "",
        limits: Limits | None = None,
        url_hosts: Collection[str] = (),
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        self.limits, self.name, self.url_hosts = limits or Limits(), name, url_hosts
        self.adapters = dict(adapters or {})
        if name in self.adapters:
            raise InputError(f"An adapter and the model are both called {name!r}: give one another name (--name).")
        self.studio = Studio(pipe, largest_picture=self.limits.picture_pixels)
        self.answers, self.metrics, self.created = Answers(pipe, self.fingerprint), Metrics(), int(time.time())
        self.model_hash, self.image_size = model_hash, pipe.processor.image_size
        self.engine = Engine(
            pipe.model,
            pipe.processor.vocabulary.mask_id,
            budget=self.limits.budget,
            queue=self.limits.queue,
            watch=self.metrics.watch,
        )
        self._room, self._fetching = CapacityLimiter(PREPARING), CapacityLimiter(FETCHING)

    async def in_thread(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Run what computes outside the event loop; no more than PREPARING at once."""
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self._room)

    # ------------------------------------------------------------------------------------------------ the requests

    async def caption(self, request: Request) -> Response:
        """Captions of pictures: multipart files named `image`, or JSON with data URLs; the surest caption first."""
        if content_type(request) == "application/json":
            body, pictures = CaptionRequest.model_validate_json(await request.body()), []
        elif content_type(request) == "multipart/form-data":
            body, files = await form(request, CaptionRequest, ("image",), most=self.limits.rows)
            pictures = files["image"]
        else:
            raise unsupported(request, "multipart/form-data or application/json")
        adapter = self._adapter(body.model)
        urls = [body.image_url] if isinstance(body.image_url, str) else body.image_url or []
        if bool(pictures) == bool(urls):
            raise Refused(400, "Expected pictures in one of two ways: files named 'image' in a multipart form, or "
                          "image_url in JSON.", param="image_url")
        count, seed = body.num_captions, _seed(body.seed)
        self._check_rows(count * len(urls or pictures), "num_captions")
        warmer = {"temperature": FURTHER_CAPTIONS} if body.temperature is None else {}

        def prepare(fetched: list[bytes]) -> list[Job]:
            jobs = []
            for content in pictures or fetched:
                for i in range(count):
                    sampling = {**body.sampling, **(warmer if i else {})}
                    jobs.append(self.studio.describing(content, seed=seed + i, max_tokens=body.max_tokens, **sampling))
            return jobs

        async def work() -> dict[str, Any]:
            tickets = await self._submit(request, prepare, adapter, urls=urls)
            states = await finished(tickets)
            texts = [self.answers.text(ticket.job, state) for ticket, state in zip(tickets, states, strict=True)]
            data = []
            for first in range(0, len(texts), count):
                some = sorted(texts[first : first + count], key=lambda text: -text["confidence"])
                kept = ("text", "confidence") if body.score else ("text",)
                data.append({"captions": [{name: text[name] for name in kept} for text in some]})
            return {"model": body.model or self.name, "seed": seed, "data": data}

        return JSONResponse(await unless_gone(request, work()))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completion: a question about a picture; without words, its description."""
        adapter = self._adapter(body.model)
        question, url = body.question_and_picture()
        count, seed = body.n, _seed(body.seed)
        self._check_rows(count, "n")
        bounds = [most for most in (body.max_tokens, body.max_completion_tokens) if most is not None]
        settings = {**body.sampling, "max_tokens": min(bounds, default=None)}

        def prepare(fetched: list[bytes]) -> list[Job]:
            (content,) = fetched
            if not question:
                return [self.studio.describing(content, seed=seed + i, **settings) for i in range(count)]
            return [self.studio.asking(content, question, seed=seed + i, **settings) for i in range(count)]

        about = {"created": int(time.time()), "model": body.model or self.name}
        about["system_fingerprint"] = self.fingerprint(adapter)
        if body.stream:
            mail = Mail(count)
            tickets = await unless_gone(request, self._submit(request, prepare, adapter, mail, [url]))
            return _events(streams.chat(self, about, body, tickets, mail, request.state.request_id))

        async def work() -> dict[str, Any]:
            tickets = await self._submit(request, prepare, adapter, urls=[url])
            states = await finished(tickets)
            texts = [self.answers.text(ticket.job, state) for ticket, state in zip(tickets, states, strict=True)]
            return streams.completion(about, tickets, texts, seed)

        return JSONResponse(await unless_gone(request, work()))

    async def images(self, body: ImagesRequest, request: Request) -> Response:
        """OpenAI's picture generation; pictures come as base64, or as data URLs where `url` is asked for."""
        side = self.image_size
        if body.size not in (None, "auto", f"{side}x{side}"):
            raise Refused(400, f"size is {body.size[:40]!r}, expected '{side}x{side}' or 'auto': this model draws one "
                          "size.", param="size")
        return await self._pictures(request, body, partial(self.studio.drawing, body.prompt))

    async def edits(self, request: Request) -> Response:
        """OpenAI's picture edit: what the mask leaves open is drawn anew from the prompt, every other pixel stays; with
        `extend` what is around the picture."""
        body, files = await form(request, EditRequest, ("image", "mask"), most=2)
        if len(files["image"]) != 1 or len(files["mask"]) > 1:
            raise Refused(400, f"Got {len(files['image'])} pictures and {len(files['mask'])} masks, expected one "
                          "picture named 'image' and at most one 'mask'.", param="image")
        if body.size not in (None, "auto"):
            raise Refused(400, f"size is {body.size[:40]!r}, expected 'auto': an edited picture keeps its size.",
                          param="size")
        picture, mask = files["image"][0], next(iter(files["mask"]), None)
        job = partial(self.studio.filling, body.prompt, picture, mask, extend=body.borders)
        return await self._pictures(request, body, job)

    async def _pictures(self, request: Request, body: ImagesRequest, job: Callable[..., Job]) -> Response:
        """Pictures of jobs that `job` makes for a seed and settings."""
        adapter = self._adapter(body.model)
        count, seed, created = body.n or 1, _seed(body.seed), int(time.time())
        self._check_rows(count, "n")

        def prepare(_: list[bytes]) -> list[Job]:
            settings = {"guidance_scale": body.guidance_scale, **body.sampling}
            return [job(seed=seed + i, **settings) for i in range(count)]

        if body.stream:
            mail = Mail(count)
            tickets = await unless_gone(request, self._submit(request, prepare, adapter, mail))
            return _events(streams.pictures(self, created, body, tickets, mail, request.state.request_id))

        async def work() -> dict[str, Any]:
            tickets = await self._submit(request, prepare, adapter)
            data = []
            for ticket, state in zip(tickets, await finished(tickets), strict=True):
                drawn = await self.in_thread(self.answers.picture, ticket.job, state, body.prompt)
                url = body.response_format == "url"
                where = {"url": f"data:image/png;base64,{drawn}"} if url else {"b64_json": drawn}
                data.append({**where, "seed": ticket.job.seed})
            usage, side = streams.picture_usage(tickets), self.image_size
            return {"created": created, "data": data, "size": f"{side}x{side}", "output_format": "png", "usage": usage}

        return JSONResponse(await unless_gone(request, work()))

    async def models(self) -> dict[str, Any]:
        """OpenAI's list of models: the one this server runs, then its adapters."""
        return {"object": "list", "data": [self._model(name) for name in (self.name, *self.adapters)]}

    async def model(self, name: str) -> dict[str, Any]:
        self._adapter(name)
        return self._model(name)

    async def health(self) -> dict[str, str]:
        """Does the process answer?"""
        return {"status": "ok"}

    async def ready(self) -> Response:
        """Does it take requests? 503 while it shuts down."""
        closed = self.engine.closed
        return JSONResponse({"status": "draining" if closed else "ready"}, 503 if closed else 200)

    async def numbers(self) -> Response:
        """Prometheus' metrics."""
        content = self.metrics.text(self.engine.waiting, self.engine.active)
        return Response(content, media_type="text/plain; version=0.0.4")

    async def front(self) -> Response:
        """The page."""
        return HTMLResponse(page(), headers={"content-security-policy": page_policy()})

    # ------------------------------------------------------------------------------------------------ their parts

    async def _submit(
        self,
        request: Request,
        prepare: Callable[[list[bytes]], list[Job]],
        adapter: str | None,
        mail: Mail | None = None,
        urls: Sequence[str] = (),
    ) -> list[Ticket]:
        """Make a request's jobs, of the pictures at `urls`, and queue them. What is wrong is found before they meet
        others."""
        fetch = partial(picture_bytes, hosts=self.url_hosts, most=self.limits.body_bytes)
        fetched = [await anyio.to_thread.run_sync(fetch, url, limiter=self._fetching) for url in urls]

        def started() -> list[Job]:
            jobs = prepare(fetched)
            for job in jobs:
                job.adapter = adapter
                job.start(self.engine.mask_id)
            return jobs

        jobs: list[Job] = await self.in_thread(started)
        # Not in that thread, which goes on when the client is gone and its request cancelled: what it submitted then
        # nobody would take out. From here on the door does, when the request is over, however it ends.
        tickets = self.engine.submit_all(
            jobs,
            client=request.state.client,
            seconds=self.limits.seconds,
            on_states=None if mail is None else mail.listeners,
        )
        request.state.tickets, request.state.log = tickets, {"rows": len(tickets)}
        return tickets

    def _check_rows(self, rows: int, param: str) -> None:
        if rows > self.limits.rows:
            raise Refused(400, f"The request asks for {rows} results, expected at most {self.limits.rows}: ask for "
                          "the others in another request.", param=param)

    def _adapter(self, name: str | None) -> str | None:
        """The adapter that a request's `model` names, None for the model itself. `Refused` (404) for other names."""
        if name is None or name == self.name:
            return None
        if name not in self.adapters:
            known = " or ".join(map(repr, (self.name, *self.adapters)))
            raise Refused(404, f"There is no model {name[:80]!r} here, expected {known}: leave it out, or see "
                          "/v1/models.", code="model_not_found", param="model")
        return name

    def fingerprint(self, adapter: str | None) -> str:
        """The hash of the model's weights, and of the adapter's where there is one."""
        return self.model_hash if adapter is None else f"{self.model_hash}+{self.adapters[adapter]}"

    def _model(self, name: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": self.created, "owned_by": "mmdlm"}
        adapter = self._adapter(name)
        parent = {} if adapter is None else {"parent": self.name}
        about |= {"hash": self.fingerprint(adapter), "image_size": self.image_size, "mmdlm_version": __version__}
        return {**about, **parent}


def create_app(service: Service, *, keys: Mapping[str, str], local: bool) -> Door:
    """The ASGI application around `service`, and the door around that. The engine stops when the application does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(service.engine.stop, 10.0)

    # no /docs: FastAPI's own pages load scripts from elsewhere
    app = FastAPI(title="mmdlm", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.post("/v1/caption", openapi_extra=form_schema(CaptionRequest, ("image",), json=True))(service.caption)
    app.post("/v1/chat/completions")(service.chat)
    app.post("/v1/images/generations")(service.images)
    edited = form_schema(EditRequest, ("image", "mask"))
    app.post("/v1/images/edits", openapi_extra=edited)(service.edits)
    app.get("/v1/models")(service.models)
    app.get("/v1/models/{name:path}")(service.model)
    app.get("/health")(service.health)
    app.get("/ready")(service.ready)
    app.get("/metrics")(service.numbers)
    app.get("/", include_in_schema=False)(service.front)
    for kind in (HTTPException, RequestValidationError, ValidationError, InputError, Busy, Late, ClientGone, Exception):
        app.add_exception_handler(kind, _answer_error)
    return Door(app, Clients(keys, service.limits), service.limits, service.metrics, local=local)


async def _answer_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientGone):
        return Response(status_code=499)  # nobody reads it; the log does
    refused = refusal(error, request.state.request_id)
    return JSONResponse(refused.body, refused.status, refused.headers)


def _events(events: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def _seed(seed: int | None) -> int:
    return secrets.randbelow(2**32) if seed is None else seed

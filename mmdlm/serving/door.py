"""The door: what every request passes before anybody looks at what it says, and every answer on its way out.

Request id, key, origin, rate, size and time of the body, the whole request's time, security headers, one line of log.
An ASGI application around another; outermost, so that nothing that goes wrong inside reaches a client as a traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmdlm.serving.clients import Clients
from mmdlm.serving.metrics import Metrics
from mmdlm.serving.refusals import Refused, failure
from mmdlm.serving.settings import Limits, is_loopback

logger = logging.getLogger("mmdlm.serving")

OPEN = ("/", "/health", "/ready")  # no key is needed for these, and no limit counts them
DRAINED_BYTES, DRAIN_SECONDS = 4 * 2**20, 2.0  # of the body of a request that is refused
_REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Door:
    """`local`: the server is bound to loopback, and its requests have to name it so (DNS rebinding)."""

    def __init__(self, app: ASGIApp, clients: Clients, limits: Limits, metrics: Metrics, *, local: bool) -> None:
        self.app, self.clients, self.limits, self.metrics, self.local = app, clients, limits, metrics, local
        self.held = 0  # bytes of all bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await _Visit(self, scope, receive, send).run()
        # a websocket is not answered, which closes it


class _Visit:
    """One request and its answer."""

    def __init__(self, door: Door, scope: Scope, receive: Receive, send: Send) -> None:
        self.door, self.scope, self._receive, self._send = door, scope, receive, send
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.started, self.status, self.read, self.whole = time.perf_counter(), 0, 0, False
        self.client = ""
        scope.setdefault("state", {})
        scope["state"]["request_id"] = self.id

    async def run(self) -> None:
        entered = False
        try:
            self._check_origin()
            if self.scope["path"] not in OPEN:
                address = (self.scope.get("client") or ("unknown",))[0]
                self.client = self.door.clients.name(self.headers.get("authorization"), address)
                self.door.clients.enter(self.client)
                entered = True
            self.scope["state"]["client"] = self.client
            self._check_length()
            async with asyncio.timeout(self.door.limits.seconds + 10):  # the engine's own deadline comes before
                await self.door.app(self.scope, self.receive, self.send)
        except Refused as refused:
            await self._refuse(refused)
        except TimeoutError:
            await self._refuse(Refused(504, "The request took too long.", kind="timeout_error", code="timeout"))
        except Exception:
            logger.exception("request failed", extra={"fields": {"request_id": self.id}})
            await self._refuse(failure(self.id))
        finally:
            if entered:
                self.door.clients.leave(self.client)
            for ticket in self.scope["state"].get("tickets", ()):
                ticket.future.cancel()  # nothing, where it is finished
            self.door.held -= self.read
            self._report()

    def _check_origin(self) -> None:
        """No other site's page may use the server through a visitor's browser; with keys none could anyway, and a proxy
        may call the server as it likes."""
        if self.door.clients.have_keys:
            return
        host = self.headers.get("host", "")
        name = urlsplit(f"//{host}").hostname or ""
        if self.door.local and not is_loopback(name):
            raise Refused(403, "This server answers to its loopback address only.", code="wrong_host")
        origin = self.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refused(403, "Requests from other sites' pages are not answered.", code="wrong_origin")

    def _check_length(self) -> None:
        length = self.headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.door.limits.body_bytes:
            raise self._too_large()

    def _too_large(self) -> Refused:
        most = self.door.limits.body_bytes
        return Refused(413, f"The request is larger than {most} bytes: send smaller pictures.", code="body_too_large")

    async def receive(self) -> Message:
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self.door.limits.idle_seconds)
        except TimeoutError:
            raise Refused(408, "The request's body did not arrive.", code="body_timeout") from None
        size = len(message.get("body", b""))
        self.read, self.door.held = self.read + size, self.door.held + size
        self.whole = not message.get("more_body", False)
        if self.read > self.door.limits.body_bytes:  # whatever the header said
            raise self._too_large()
        if self.door.held > self.door.limits.bodies_bytes:
            raise Refused(503, "Too much is being sent to this server at once.", code="overloaded", retry_after=2,
                          kind="server_error")
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY.items():
                headers.setdefault(name, value)
            headers["x-request-id"] = self.id
        await self._send(message)

    async def _refuse(self, refused: Refused) -> None:
        if self.status:
            return  # the answer has begun: all that can be done is to break it off
        await self._drain()
        body = json.dumps(refused.body).encode()
        # The body may not have been read, and its rest cannot be told from a next request.
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        raw = [(name.encode(), value.encode()) for name, value in {**headers, **(refused.headers or {})}.items()]
        try:
            await self.send({"type": "http.response.start", "status": refused.status, "headers": raw})
            await self._send({"type": "http.response.body", "body": body})
        except OSError:  # the client is gone
            pass

    async def _drain(self) -> None:
        """Read away the rest of a small body: who is hung up on while sending may never see why."""
        length = self.headers.get("content-length", "0")
        if "expect" in self.headers or not length.isdecimal() or int(length) > DRAINED_BYTES:
            return
        drained = 0
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while not self.whole and drained < DRAINED_BYTES:
                    message = await self._receive()
                    drained += len(message.get("body", b""))
                    self.whole = not message.get("more_body", False)
        except TimeoutError:
            pass

    def _report(self) -> None:
        seconds = time.perf_counter() - self.started
        path = getattr(self.scope.get("route"), "path", None) or "other"
        self.door.metrics.answered(path, self.status, seconds)
        fields: dict[str, Any] = {
            "request_id": self.id,
            "client": self.client,
            "method": self.scope["method"],
            "path": self.scope["path"][:200],
            "status": self.status,
            "seconds": round(seconds, 4),
            **self.scope["state"].get("log", {}),
        }
        logger.info("request", extra={"fields": fields})


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, what happened, and the fields of requests."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)

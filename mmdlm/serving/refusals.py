"""How a refusal reads: OpenAI's error body, one sentence, and nothing of what is inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mmdlm.errors import InputError
from mmdlm.serving.engine import Busy, Late


class Refused(HTTPException):
    """An answer that is an error: its HTTP status and OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        headers = {} if retry_after is None else {"retry-after": str(retry_after)}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        if status in (408, 413):  # the rest of a body that was not read cannot be told from a next request
            headers["connection"] = "close"
        super().__init__(status, message, headers)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def refusal_of_fields(errors: Sequence[Any]) -> Refused:
    """pydantic's errors -> one sentence about the first of them, unknown fields before all others."""
    first = min(errors, key=lambda error: error["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"] if part not in ("body", "text", "image_url", "parts")]
    # where a field is a union the last part of its path may be the name of the branch that was tried
    path = [part for part in path if "[" not in part and part != "str"] or ["the body"]
    where = ".".join(path)
    if first["type"] == "extra_forbidden":
        return Refused(400, f"Unknown field {where!r}: leave it out.", code="unknown_parameter", param=where)
    return Refused(400, f"{where}: {first['msg']}.", code="invalid_value", param=where)


def refusal(error: Exception, request_id: str) -> Refused:
    """An exception -> what the client is told of it."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        return refusal_of_fields(error.errors())
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return Refused(error.status_code, str(error.detail), code=code)
    if isinstance(error, InputError):
        return Refused(400, " ".join(str(error).split()))
    if isinstance(error, Busy):
        return Refused(429, str(error), kind="rate_limit_error", code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Late):
        return Refused(504, str(error), kind="timeout_error", code="timeout")
    return failure(request_id)


def failure(request_id: str) -> Refused:
    """What a client is told of a bug here: nothing but where to find it in the log."""
    message = f"The server failed; its log says why under the request id {request_id}."
    return Refused(500, message, kind="server_error", code="server_error")

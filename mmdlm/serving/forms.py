"""Requests with files: multipart forms, whose fields are text whatever they mean."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request

from mmdlm.serving.refusals import Refused, refusal_of_fields

MOST_FIELDS = 32
Fields = TypeVar("Fields", bound=BaseModel)


def content_type(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def form(
    request: Request, shape: type[Fields], names: Collection[str], *, most: int
) -> tuple[Fields, dict[str, list[bytes]]]:
    """The fields of a multipart form, checked against `shape`, and its files by name: those of `names`, `most` in all.

    Raises Refused for a form that is broken, another content type, and fields and files with other names.
    """
    if content_type(request) != "multipart/form-data":
        raise unsupported(request, "multipart/form-data")
    files: dict[str, list[bytes]] = {name: [] for name in names}
    async with request.form(max_files=most, max_fields=MOST_FIELDS) as parts:
        fields: dict[str, str] = {}
        for name, value in parts.multi_items():
            name = name.removesuffix("[]")  # how OpenAI's clients name one of several
            if not isinstance(value, UploadFile):
                fields[name] = value
            elif name in files:
                files[name].append(await value.read())
            else:
                raise Refused(400, f"Unknown file {name[:80]!r}, expected {' or '.join(names)}: rename it or leave it "
                              "out.", param=name[:80], code="unknown_parameter")
    try:
        return shape.model_validate(fields, strict=False), files
    except ValidationError as error:
        raise refusal_of_fields(error.errors()) from None


def unsupported(request: Request, expected: str) -> Refused:
    return Refused(415, f"The content type is {content_type(request)[:80]!r}, expected {expected}.",
                   code="unsupported_media_type")


def form_schema(shape: type[BaseModel], names: Collection[str], *, json: bool = False) -> dict[str, Any]:
    """What OpenAPI says of such a request; `json`: the fields may come as JSON instead."""
    plain = shape.model_json_schema()
    files = {name: {"type": "string", "format": "binary"} for name in names}
    content = {"multipart/form-data": {"schema": {**plain, "properties": {**plain["properties"], **files}}}}
    if json:
        content["application/json"] = {"schema": plain}
    return {"requestBody": {"required": True, "content": content}}

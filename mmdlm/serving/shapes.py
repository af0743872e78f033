"""What may be asked over HTTP, field by field: OpenAI's shapes with a few fields of our own.

A field that is not named here is refused by name: a server that ignores what it was asked answers another question.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mmdlm.serving.refusals import Refused

LARGEST_SEED = 2**63 - 1 - 2**16  # row i of a request takes seed + i

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Count = Annotated[int, Field(ge=1)]
Temperature = Annotated[float, Field(ge=0, le=10)]
TopP = Annotated[float, Field(gt=0, le=1)]
Guidance = Annotated[float, Field(ge=0, le=100)]


class _Request(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    seed: Seed | None = None
    num_inference_steps: Count | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    user: str | None = None  # OpenAI's end-user id: not used

    @property
    def sampling(self) -> dict[str, Any]:
        """The keywords of `mmdlm.serving.jobs.Studio.settings`."""
        return self.model_dump(include={"num_inference_steps", "temperature", "top_p"})


class CaptionRequest(_Request):
    """POST /v1/caption: pictures as data URLs, or as multipart files named `image`."""

    image_url: str | Annotated[list[str], Field(min_length=1)] | None = None
    num_captions: Count = 1
    max_tokens: Count | None = None
    score: bool = True


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # pictures have one size here: not used


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(_Part):
    role: Literal["user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]
    name: str | None = None


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions: one question about one picture; without words, a description of it."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    drafts: bool = False

    def question_and_picture(self) -> tuple[str, str]:
        """The words and the picture's URL. `Refused` where it is not one message with one picture."""
        if len(self.messages) != 1:
            raise Refused(
                400,
                f"messages has {len(self.messages)} messages, expected one: this model answers one question about one "
                "picture and remembers none.",
                param="messages",
            )
        content = self.messages[0].content
        parts = [] if isinstance(content, str) else content
        urls = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(urls) != 1:
            raise Refused(
                400,
                f"The message has {len(urls)} pictures, expected one: add one part of the type image_url.",
                param="messages.0.content",
            )
        return " ".join(part.text.strip() for part in parts if isinstance(part, TextPart)).strip(), urls[0]


class ImagesRequest(_Request):
    """POST /v1/images/generations."""

    prompt: str
    n: Count | None = 1
    size: str | None = "auto"
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    guidance_scale: Guidance | None = None
    stream: bool | None = False
    partial_images: Annotated[int, Field(ge=0)] | None = None
    drafts: bool = False


class EditRequest(ImagesRequest):
    """POST /v1/images/edits: the fields beside its files."""

    extend: str | None = None  # pixels to draw around the picture, LEFT,TOP,RIGHT,BOTTOM; then there is no mask

    @property
    def borders(self) -> list[int] | None:
        """`extend` as four numbers. `Refused` where it is something else."""
        parts = [] if self.extend is None else self.extend.split(",")
        fits = len(parts) == 4 and all(part.strip().isdecimal() and len(part) < 8 for part in parts)
        if self.extend is not None and not fits:
            raise Refused(400, f"extend is {self.extend[:40]!r}, expected LEFT,TOP,RIGHT,BOTTOM in pixels, for example "
                          "16,0,16,0.", param="extend")
        return [int(part) for part in parts] or None

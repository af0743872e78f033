"""A request that takes too long, and pictures from hosts that are slow: the application itself, in this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mmdlm.pipelines import TextToImage
from mmdlm.serving.door import Door
from mmdlm.serving.server import Service, create_app
from mmdlm.serving.settings import Limits


@pytest.fixture(scope="module")
def door(tiny_model: Path) -> Iterator[Door]:
    """An application whose requests may take a millisecond: no machine draws sixteen pictures in that."""
    pipe = TextToImage.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    service = Service(pipe, name="tiny", limits=Limits(seconds=0.001))
    yield create_app(service, keys={}, local=True)
    service.engine.stop(0)


def post(door: Door, path: str, body: dict[str, object]) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=door)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


def test_a_request_past_its_deadline_is_504_and_in_a_stream_an_event(door):
    long = {"prompt": "a cat", "n": 16, "num_inference_steps": 1000, "temperature": 1.0}
    answer = post(door, "/v1/images/generations", long)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
    stream = post(door, "/v1/images/generations", {**long, "stream": True})
    last = [line for line in stream.text.splitlines() if line.startswith("data: ")][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "timeout_error"
    assert post(door, "/health", {}).status_code == 405  # and it still answers

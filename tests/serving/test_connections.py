"""Connections that do not get on, on both of uvicorn's HTTP/1.1 protocols: hung up on, while others are answered."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn

from mmdlm.serving.connections import HEAD_BYTES, most_connections, patient
from mmdlm.serving.run import bind

SECONDS = 0.5
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = 32 * 2**20  # more than the buffers of a connection hold
gone = threading.Event()


async def app(scope, receive, send) -> None:
    """A small answer, or at /large a large one; `gone` is set when that is over, one way or the other."""
    parts = [bytes(2**20)] * (LARGE // 2**20) if scope["path"] == "/large" else [b"ok"]
    length = str(sum(map(len, parts))).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    for i, part in enumerate(parts):
        await send({"type": "http.response.body", "body": part, "more_body": i + 1 < len(parts)})
    if len(parts) > 1:
        gone.set()


@pytest.fixture(scope="module", params=["h11", "httptools"])
def address(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed; uvicorn takes the other one")
    listening = bind("127.0.0.1", 0)
    listening.listen()  # so that who comes before the server waits for it
    config = uvicorn.Config(app, http=request.param, loop="asyncio", lifespan="off", log_config=None)
    config.load()
    config.http_protocol_class = patient(config.http_protocol_class, SECONDS)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()
    server.should_exit = True
    thread.join(30)


def answered(connection: socket.socket) -> bool:
    connection.sendall(REQUEST)
    content = b""
    while not content.endswith(b"ok"):
        part = connection.recv(4096)
        if not part:
            return False
        content += part
    return content.startswith(b"HTTP/1.1 200")


def hung_up_on(connection: socket.socket) -> bool:
    connection.settimeout(30)
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True  # otherwise TimeoutError


def test_a_head_that_does_not_end_is_hung_up_on(address):
    silent, slow, second = (socket.create_connection(address, timeout=30) for _ in range(3))
    with silent, slow, second:
        slow.sendall(REQUEST[:20])
        assert answered(second)
        second.sendall(REQUEST[:20])  # on a connection that was answered before
        assert hung_up_on(silent) and hung_up_on(slow) and hung_up_on(second)
    with socket.create_connection(address, timeout=30) as other:
        assert answered(other) and answered(other)


def test_a_head_without_end_is_hung_up_on_however_fast_it_comes(address):
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(REQUEST[:-2])
        try:
            for _ in range(4 * HEAD_BYTES // 1000):
                connection.sendall(b"X: " + b"x" * 995 + b"\r\n")
        except OSError:
            return
        assert hung_up_on(connection)


def test_an_answer_that_nobody_reads_is_given_up(address):
    gone.clear()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(address)
    with connection:
        connection.sendall(REQUEST.replace(b"/", b"/large", 1))
        assert gone.wait(30)


def test_how_many_connections_there_may_be_is_known():
    most = most_connections()
    assert most is None or most > 0

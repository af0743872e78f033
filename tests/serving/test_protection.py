"""What keeps a server and its clients from each other: keys, limits, sizes, queues, and those who hang up."""

from __future__ import annotations

import base64
import contextlib
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from mmdlm.errors import InputError
from mmdlm.serving.clients import Clients
from mmdlm.serving.refusals import Refused
from mmdlm.serving.settings import Limits, is_loopback, read_keys

ANNA, BEN, CARL = (f"{name}-0123456789abcdef" for name in ("anna", "ben", "carl"))


@pytest.fixture
def ask(guarded, picture):
    """A function that asks for captions with a key: 16 of them take 512 steps or so, one row at a time."""

    def ask(key: str, count: int = 1, **settings: object) -> httpx.Response:
        with guarded.client(key, **settings) as client:
            data = {"num_captions": str(count), "seed": "1"}
            return client.post("/v1/caption", files={"image": picture(0)}, data=data)

    return ask


def settled(guarded) -> None:
    until = time.monotonic() + 60
    while guarded.metric("mmdlm_active_rows", ANNA) or guarded.metric("mmdlm_queue_rows", ANNA):
        assert time.monotonic() < until
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ keys


def test_without_the_right_key_nothing_but_the_page_and_the_health(guarded, ask):
    for header in (None, "Bearer", f"Basic {ANNA}", f"Bearer {ANNA}x", f"Bearer {ANNA[:-1]}", "Bearer \xe9"):
        with guarded.client() as client:
            headers = {} if header is None else {"authorization": header.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["type"] == "authentication_error"
    with guarded.client() as client:
        assert [client.get(path).status_code for path in ("/", "/health", "/ready")] == [200] * 3
    assert ask(BEN).status_code == 200
    assert [line["client"] for line in guarded.log() if line.get("path") == "/v1/caption"][-1] == "ben"
    assert not any(key in guarded.stderr.read_text() for key in (ANNA, BEN, CARL))


def test_with_keys_a_proxy_may_name_the_server_as_it_likes(guarded):
    headers = {"host": "pictures.example", "origin": "https://pictures.example"}
    with guarded.client(ANNA) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_key_file_is_read_or_refused(tmp_path: Path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n\nanna {ANNA}\n{BEN}\n")
    assert read_keys(path) == {ANNA: "anna", BEN: "key 4"}
    for content, words in [
        ("", "holds no key"),
        ("short", "Line 1 of the key file .* is no key"),
        (f"a b {ANNA}", "is no key"),
        (f"{ANNA}\nanna {ANNA}", "Line 2 .* repeats a key"),
        ("schlüssel-0123456789", "is no key"),
    ]:
        path.write_text(content)
        with pytest.raises(InputError, match=words) as raised:
            read_keys(path)
        assert ANNA not in str(raised.value)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "nothing")
    for name in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert is_loopback(name)
    for name in ("0.0.0.0", "::", "192.168.0.1", "example.com", ""):
        assert not is_loopback(name)


# ------------------------------------------------------------------------------------------------ how much


def test_a_minutes_requests_run_out_and_come_back():
    clients = Clients({}, Limits(requests_per_minute=600))
    for _ in range(600):
        clients.enter("a")
        clients.leave("a")
    with pytest.raises(Refused) as raised:
        for _ in range(60):  # what came back meanwhile is taken, too
            clients.enter("a")
    assert raised.value.status == 429 and int(raised.value.headers["retry-after"]) >= 1
    clients.enter("b")  # another client has its own
    time.sleep(0.11)
    clients.enter("a")


def test_a_client_may_only_run_so_many_at_once(guarded, ask):
    """At most two at once, 64 tokens a forward: of five requests some are turned away; others are served."""
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(ask, ANNA, 4) for _ in range(5)]
        other = pool.submit(ask, BEN, 1).result()
        statuses = sorted(answer.result().status_code for answer in answers)
    assert other.status_code == 200
    assert statuses[0] == 200 and 429 in statuses and set(statuses) == {200, 429}
    (turned_away, *_) = [answer.result() for answer in answers if answer.result().status_code == 429]
    assert turned_away.json()["error"]["code"] == "too_many_at_once" and turned_away.headers["retry-after"] == "1"
    assert ask(ANNA).status_code == 200


def test_a_full_queue_is_429_with_retry_after(guarded, ask):
    """20 rows may wait: of three requests of 16 rows one at least is refused, whole."""
    with ThreadPoolExecutor(3) as pool:
        answers = [answer.result() for answer in [pool.submit(ask, key, 16) for key in (ANNA, BEN, CARL)]]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}, statuses
    full = answers[statuses.index(429)]
    assert full.json()["error"]["code"] == "queue_full" and int(full.headers["retry-after"]) >= 1
    settled(guarded)
    assert ask(ANNA).status_code == 200


def test_a_body_that_is_too_large_is_refused_whatever_its_header_says(guarded):
    """0.1 MiB: with a length it is refused before it is read, in chunks as soon as it is too much."""
    with guarded.client(ANNA) as client:
        answer = client.post("/v1/caption", content=bytes(200_000), headers={"content-type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"

        def chunks(head: bytes):
            yield head
            for _ in range(40):
                yield bytes(10_000)

        # A form that is well begun: a broken one may be refused as such before it is too large.
        part = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for kind, head in (("application/json", b"{"), ("multipart/form-data; boundary=x", part)):
            # the server may hang up while it is still being sent to
            with contextlib.suppress(httpx.WriteError, httpx.ReadError):
                answer = client.post("/v1/caption", content=chunks(head), headers={"content-type": kind})
                assert answer.status_code == 413
        url = "data:image/bmp;base64," + base64.b64encode(bytes(90_000)).decode()
        assert client.post("/v1/caption", json={"image_url": url}).status_code == 413
        assert client.get("/v1/models").status_code == 200


def test_who_is_refused_while_sending_reads_why(guarded):
    """A wrong key is known before the body has come; a client that is hung up on then sees a broken pipe."""
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as raw:
        raw.sendall(f"POST /v1/caption HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                    f"Content-Length: 100000\r\n\r\n".encode())
        for _ in range(10):
            raw.sendall(bytes(10_000))
            time.sleep(0.01)
        assert raw.recv(12) == b"HTTP/1.1 401"


@pytest.mark.parametrize("length", ["-1", "1e9", "99999999999999999999"])
def test_a_length_that_is_none_is_refused(guarded, length):
    host, port = guarded.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(f"POST /v1/caption HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {ANNA}\r\n"
                    f"Content-Length: {length}\r\n\r\n".encode())
        assert raw.recv(20).split()[1] in (b"400", b"413")


# ------------------------------------------------------------------------------------------------ who hangs up


@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_leaves_the_batch(guarded, picture, stream):
    """16 rows of 32 steps, of which only a few are made."""
    url = "data:image/png;base64," + base64.b64encode(picture(0)).decode()
    body = {
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
        "n": 16,
        "stream": stream,
        "drafts": True,
        "temperature": 1.0,
        "num_inference_steps": 32,
    }
    settled(guarded)
    before = guarded.metric("mmdlm_steps_total", ANNA)
    with guarded.client(ANNA) as client:
        if stream:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                assert next(answer.iter_lines()).startswith("data: ")
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.1))
    settled(guarded)
    made = guarded.metric("mmdlm_steps_total", ANNA) - before
    assert made < 16 * 32 * 0.8, f"{made} steps were made"

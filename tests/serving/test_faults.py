"""Clients that mean no good or have bad luck, against a real server: none of them touches another's request."""

from __future__ import annotations

import base64
import contextlib
import io
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from PIL import Image


def at(server) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def head(server, path: str = "/v1/images/generations", length: int = 0) -> bytes:
    host, port = at(server)
    return (f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {length}\r\n").encode()


def ended(connection: socket.socket, seconds: float) -> bytes:
    """What comes until the server hangs up; fails where it does not."""
    connection.settimeout(seconds)
    content = b""
    try:
        while part := connection.recv(65536):
            content += part
    except ConnectionResetError:
        pass
    return content


def good(server, seed: int = 5) -> object:
    """A request that has nothing to do with any of this, and its answer."""
    with server.client() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a red apple", "seed": seed})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


# ------------------------------------------------------------------------------------------------ connections


def test_slow_heads_are_hung_up_on_and_hold_nobody(short):
    """A byte of a head now and then, and connections that say nothing at all: they end, and others are answered."""
    slow = [socket.create_connection(at(short)) for _ in range(40)]
    for connection in slow[:20]:
        connection.sendall(b"POST / HTTP/1.1\r\nX-Slow: ")
    expected, started = good(short), time.monotonic()
    while time.monotonic() - started < 1.5:
        for connection in slow[:20]:
            with contextlib.suppress(OSError):
                connection.sendall(b"x")
        time.sleep(0.3)
    assert good(short) == expected
    for connection in slow:
        with connection:
            assert ended(connection, 30) == b""


def test_an_endless_head_is_hung_up_on(short):
    with socket.create_connection(at(short)) as connection:
        connection.sendall(head(short))
        try:
            for _ in range(100):
                connection.sendall(b"X-Filling: " + b"x" * 10_000 + b"\r\n")
        except OSError:
            pass
        ended(connection, 30)
    good(short)


def test_a_body_that_does_not_come_is_refused(short):
    with socket.create_connection(at(short)) as connection:
        connection.sendall(head(short, length=100) + b"\r\n{")
        answer = ended(connection, 30)
    assert answer.startswith(b"HTTP/1.1 408") and b"body_timeout" in answer


def test_who_reads_nothing_is_let_go_and_the_rows_finish(short):
    """A stream of many previews into a receive buffer of no size: the answer lies unread, and is given up."""
    body = b'{"prompt": "a cat", "n": 16, "stream": true, "drafts": true, "num_inference_steps": 40}'
    before = short.metric("mmdlm_written_tokens_total")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.connect(at(short))
    with connection:
        connection.sendall(head(short, length=len(body)) + b"\r\n" + body)
        good(short)
        until = time.monotonic() + 60
        while short.metric("mmdlm_active_rows") or short.metric("mmdlm_written_tokens_total") == before:
            assert time.monotonic() < until
            time.sleep(0.1)
    good(short)


def test_who_vanishes_in_a_stream_disturbs_nobody(server):
    """Connections broken off at once (RST) in the middle of a stream, while another's request shares their forwards."""
    expected = good(server)
    body = b'{"prompt": "a cat", "n": 4, "stream": true, "drafts": true, "num_inference_steps": 200}'
    gone = []
    for _ in range(5):
        connection = socket.create_connection(at(server))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head(server, length=len(body)) + b"\r\n" + body)
        assert connection.recv(12).startswith(b"HTTP/1.1 200")
        gone.append(connection)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(good, server)
        for connection in gone:
            connection.close()
        assert other.result() == expected
    until = time.monotonic() + 60
    while server.metric("mmdlm_active_rows"):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_five_hundred_connections_at_once(server):
    """All open at the same time before any of them asks; every one is answered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 700:
        pytest.skip(f"this machine lets a process open {hard} files, the test needs 700")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 700), hard))
    host, port = at(server)
    connections = [socket.create_connection((host, port), timeout=60) for _ in range(500)]
    try:
        for connection in connections:
            connection.sendall(f"GET /health HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        assert [connection.recv(12) for connection in connections] == [b"HTTP/1.1 200"] * 500
    finally:
        for connection in connections:
            connection.close()
    good(server)


def test_more_connections_than_files_are_refused_and_leave_it_alive(short):
    """`short` may open 256 files: what is too many is answered with 503 or waits, and afterwards all is well."""
    host, port = at(short)
    connections = [socket.create_connection((host, port), timeout=60) for _ in range(300)]
    for connection in connections:
        connection.close()
    until = time.monotonic() + 60
    while True:
        try:
            assert good(short)
            break
        except (AssertionError, httpx.HTTPError):
            assert time.monotonic() < until
            time.sleep(0.2)


# ------------------------------------------------------------------------------------------------ bodies


PART = b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
FORMS = {
    "no boundary": (b"--x\r\n" + PART, "multipart/form-data"),
    "empty boundary": (b"--\r\n" + PART, "multipart/form-data; boundary="),
    "other boundary": (b"--y\r\n" + PART + b"a\r\n--y--\r\n", "multipart/form-data; boundary=x"),
    "long boundary": (b"x", "multipart/form-data; boundary=" + "x" * 5000),
    "no end": (b"--x\r\n" + PART + b"abc", "multipart/form-data; boundary=x"),
    "no head": (b"--x\r\n\r\nabc\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    "no name": (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    "broken head": (b"--x\r\n: :\x00\xff\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x"),
    "endless head": (b"--x\r\nX: " + b"a" * 300_000, "multipart/form-data; boundary=x"),
    "many fields": (b"".join(b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\n1\r\n' % i for i in range(99)) +
                    b"--x--\r\n", "multipart/form-data; boundary=x"),
    "many files": ((b"--x\r\n" + PART + b"a\r\n") * 99 + b"--x--\r\n", "multipart/form-data; boundary=x"),
    "a path": (b'--x\r\nContent-Disposition: form-data; name="image"; filename="../etc/passwd"\r\n\r\na\r\n--x--\r\n',
               "multipart/form-data; boundary=x"),
    "no text": (b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n\xff\xfe\r\n--x--\r\n',
                "multipart/form-data; boundary=x"),
    "charset": (b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1\r\n--x--\r\n',
                "multipart/form-data; boundary=x; charset=no-such"),
}  # fmt: skip


@pytest.mark.parametrize("how", FORMS)
def test_a_malformed_form_is_refused(server, how):
    content, kind = FORMS[how]
    with server.client() as client:
        answer = client.post("/v1/caption", content=content, headers={"content-type": kind})
    assert answer.status_code == 400, answer.text
    assert "\n" not in answer.json()["error"]["message"]


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, kind: int = 2, data: bytes = bytes(100)) -> bytes:
    """A PNG that says it has that size; what is in it is `data`."""
    first = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + first + b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(kind: str, frames: int = 1, side: int = 24, **options: object) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.effect_noise((side, side), 40 + i).convert("RGB") for i in range(frames)]
    first.save(buffer, kind, **({"save_all": True, "append_images": others} if others else {}), **options)
    return buffer.getvalue()


BAD: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(5000),
    "text": lambda: b"hello",
    "svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "svg with an entity bomb": lambda: b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><svg>&b;</svg>',
    "html": lambda: b"<!doctype html><script>alert(1)</script>",
    "pdf": lambda: b"%PDF-1.4\n%%EOF",
    "postscript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) run\n",
    "zip": lambda: b"PK\x03\x04" + bytes(50),
    "gzip of a picture": lambda: __import__("gzip").compress(saved("PNG")),
    "executable": lambda: b"\x7fELF" + bytes(200),
    "icon": lambda: saved("ICO"),
    "photoshop": lambda: b"8BPS\x00\x01" + bytes(60),
    "targa": lambda: saved("TGA"),
    "png: 3,600 megapixels": lambda: png(60_000, 60_000),
    "png: the largest numbers": lambda: png(2**31 - 1, 2**31 - 1),
    "png: no pixels": lambda: png(0, 0),
    "png: wide": lambda: png(2**26, 1),
    "png: unpacks to 200 MB": lambda: png(9000, 9000, data=bytes(9000 * 9000)),
    "png: text that unpacks to 100 MB": lambda: png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "png: another type": lambda: png(4, 4, kind=5),
    "png: a wrong sum": lambda: saved("PNG")[:20] + b"\xff" + saved("PNG")[21:],
    "png: only a head": lambda: saved("PNG")[:20],
    "png: truncated": lambda: saved("PNG", side=64)[:700],
    "png: animated": lambda: saved("PNG", frames=3),
    "gif: animated": lambda: saved("GIF", frames=3),
    "gif: truncated": lambda: saved("GIF")[:40],
    "webp: animated": lambda: saved("WEBP", frames=3),
    "webp: truncated": lambda: saved("WEBP")[:60],
    "tiff: several pages": lambda: saved("TIFF", frames=2),
    "tiff: truncated": lambda: saved("TIFF")[:200],
    "tiff: points to itself": lambda: b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
    "jpeg: truncated": lambda: saved("JPEG", side=64)[:-500],
    "jpeg: says 65,500 x 65,500": lambda: saved("JPEG").replace(struct.pack(">HH", 24, 24), b"\xff\xdc\xff\xdc", 1),
    "bmp: a negative size": lambda: saved("BMP").replace(struct.pack("<ii", 24, 24), struct.pack("<ii", -24, -(2**31))),
    "ppm: more than there is": lambda: b"P6 4000 4000 255\n" + bytes(100),
    "ppm: no number": lambda: b"P6 a b 255\n",
}
# A picture with something else behind it is still the picture, and nothing else is looked at.
POLYGLOTS = {
    "png and html": lambda: saved("PNG") + b"<script>alert(1)</script>",
    "gif and javascript": lambda: saved("GIF") + b"/*alert(1)*/",
    "jpeg and zip": lambda: saved("JPEG") + b"PK\x03\x04" + bytes(50),
}


def test_bad_pictures_are_refused_in_one_sentence_and_touch_no_other_request(server):
    """All of them one after the other in both ways to send a picture, while others' requests go on."""
    assert len(BAD) + len(POLYGLOTS) >= 30
    expected, stop, others = good(server), threading.Event(), list[object]()

    def keep_asking() -> None:
        while not stop.is_set():
            others.append(good(server))

    with server.client() as client, ThreadPoolExecutor(1) as pool:
        asking = pool.submit(keep_asking)
        try:
            for how, make in BAD.items():
                url = f"data:image/png;base64,{base64.b64encode(make()).decode()}"
                for answer in (client.post("/v1/caption", files={"image": ("a.png", make(), "image/png")}),
                               client.post("/v1/caption", json={"image_url": url})):  # fmt: skip
                    assert answer.status_code == 400, (how, answer.text)
                    message = answer.json()["error"]["message"]
                    assert "\n" not in message and "Traceback" not in message and "/" not in message.split("(")[0], how
            for how, make in POLYGLOTS.items():
                assert client.post("/v1/caption", files={"image": make()}).status_code == 200, how
        finally:
            stop.set()
        asking.result()
    assert others and all(one == expected for one in others)


# ------------------------------------------------------------------------------------------------ the end


def test_terminated_under_load_nothing_accepted_is_lost(tiny_model, tmp_path, launcher):
    """24 clients at work, one that reads nothing and one that vanishes; SIGTERM: who was let in is answered, in full,
    as he is without it; who comes then is not let in; the process ends in order."""
    server = launcher(tmp_path, tiny_model, "--budget", 512)
    bodies = [{"prompt": "a cat", "seed": i, "num_inference_steps": 60, "n": 2} for i in range(24)]

    def ask(body: dict[str, object]) -> httpx.Response:
        with server.client() as client:
            return client.post("/v1/images/generations", json=body)

    expected = ask(bodies[3]).json()["data"]
    vanishing = socket.create_connection(at(server))
    stream = b'{"prompt": "a cat", "stream": true, "drafts": true, "num_inference_steps": 500}'
    vanishing.sendall(head(server, length=len(stream)) + b"\r\n" + stream)
    vanishing.recv(12)
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(ask, body) for body in bodies]
        until = time.monotonic() + 60
        while server.metric("mmdlm_active_rows") + server.metric("mmdlm_queue_rows") < 48:  # all of them are let in
            assert time.monotonic() < until and not all(answer.done() for answer in answers)
            time.sleep(0.02)
        server.process.send_signal(signal.SIGTERM)
        vanishing.close()
        found = [answer.result() for answer in answers]
    assert [answer.status_code for answer in found] == [200] * 24
    assert found[3].json()["data"] == expected
    assert server.process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        ask(bodies[0])
    assert not [line for line in server.log() if line["level"] == "error"]


# ------------------------------------------------------------------------------------------------ the description


def test_schemathesis_finds_no_server_error(server):
    """Its own examples for every operation of the OpenAPI document, wrong ones included; bounded and seeded."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "--checks",
               "not_a_server_error", "--max-examples", "8", "--phases", "examples,coverage,fuzzing", "--seed", "0",
               "--mode", "all", "--generation-database", "none", "--request-timeout", "60"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_no_answer_of_500_and_no_error_in_the_log(server, short):
    assert not [line for line in server.log() if line["level"] == "error"]
    for one in (server, short):
        assert not [line for line in one.log() if int(line.get("status", 0)) == 500]

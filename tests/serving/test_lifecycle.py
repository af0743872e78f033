"""Starting, being killed, starting again at the same place, and being asked to stop while at work."""

from __future__ import annotations

import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from mmdlm.cli import app


@pytest.fixture
def start(tiny_model, tmp_path, launcher):
    """A function that starts a server with options and waits for it; what still runs at the end is killed."""
    running = []

    def start(*options: object):
        running.append(launcher(tmp_path / f"server {len(running)}", tiny_model, *options))
        return running[-1]

    yield start
    for server in running:
        server.process.kill()
        server.process.wait()


def long_request(server, picture) -> httpx.Response:
    """16 captions one row after the other."""
    with server.client() as client:
        return client.post("/v1/caption", files={"image": picture(0)}, data={"num_captions": "16", "seed": "1"})


def at_work(server) -> None:
    until = time.monotonic() + 60
    while not server.metric("mmdlm_active_rows"):
        assert time.monotonic() < until
        time.sleep(0.02)


def test_killed_then_back_at_the_same_port_then_stopped_at_work(start, picture):
    """kill -9 ends it and every connection at once; SIGTERM lets it finish what it accepted, and take nothing more."""
    killed = start("--budget", 64)
    with ThreadPoolExecutor(1) as pool:
        broken = pool.submit(long_request, killed, picture)
        at_work(killed)
        killed.process.kill()
        assert killed.process.wait(10) == -signal.SIGKILL
        with pytest.raises(httpx.RemoteProtocolError):
            broken.result(10)

    again = start("--budget", 64, "--port", killed.url.rpartition(":")[2])
    assert again.url == killed.url
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(long_request, again, picture) for _ in range(3)]
        at_work(again)
        while again.metric("mmdlm_queue_rows") < 30:  # all three are accepted
            time.sleep(0.02)
        again.process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 3
    assert again.process.wait(30) == 0
    with pytest.raises(httpx.ConnectError), again.client() as client:
        client.get("/health")
    assert [line["status"] for line in again.log() if line.get("path") == "/v1/caption"] == [200] * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--host", "0.0.0.0"), "others could use the model, expected keys"),
        (("--host", "0.0.0.0", "--api-key-file", "nothing"), "cannot be read"),
        (("--host", "no such host", "--allow-anyone"), "cannot be listened at"),
        (("--host", "203.0.113.7", "--allow-anyone"), "cannot be listened at"),
        (("--model", "nothing"), "no model directory at /"),  # the whole path
    ],
)
def test_what_it_cannot_start_with_is_one_sentence(options, words, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.output


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(app, ["serve", "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2 and "cannot be listened at (Address already in use)" in result.stderr

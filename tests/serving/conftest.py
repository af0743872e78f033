"""A real server process on a free port, started as a person starts it, on the tiny model of random weights."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

KEYS = {name: f"{name}-0123456789abcdef" for name in ("anna", "ben", "carl")}


@dataclass
class Server:
    """A running server. `log()` are its log lines so far, as JSON."""

    process: subprocess.Popen[bytes]
    url: str
    stderr: Path

    def client(self, key: str | None = None, **settings: object) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, trust_env=False, **settings)

    def log(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.stderr.read_text().splitlines()]

    def metric(self, name: str, key: str | None = None) -> float:
        with self.client(key) as client:
            found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def launch(directory: Path, tiny_model: Path, *options: object, files: int | None = None) -> Server:
    """Start a server; it is listening once the line with its address is there (`wait_for`). `files` it may open."""
    directory.mkdir(exist_ok=True)
    arguments = ["serve", "--model", tiny_model, "--device", "cpu", "--port", 0, *options]
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", *map(str, arguments)]
    one_lane = os.environ | {"OMP_NUM_THREADS": "1"}  # so that who comes together shares steps, on any machine
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        command = command if files is None else _limited(command, files)
        process = subprocess.Popen(command, stdout=out, stderr=err, env=one_lane)
        return Server(process, "", directory / "err")


def _limited(command: list[str], files: int) -> list[str]:
    return ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *command]


def wait_for(server: Server) -> Server:
    """`server`, listening, with its address."""
    out = server.stderr.with_name("out")
    while not (address := out.read_text().strip()):
        assert server.process.poll() is None, server.stderr.read_text()
        time.sleep(0.05)
    server.url = address
    with server.client() as client:
        until = time.monotonic() + 30
        while True:
            try:
                assert client.get("/ready").status_code == 200
                return server
            except httpx.ConnectError:
                assert time.monotonic() < until
                time.sleep(0.05)


@pytest.fixture(scope="session")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the tiny model, of random weights, by their names."""
    import torch

    from mmdlm.model_directory import model_hash
    from mmdlm.models.adapters import adapter_parameters, add_lora, save_adapter
    from mmdlm.models.mask_predictor import MaskPredictor

    torch.manual_seed(0)
    model = MaskPredictor.from_pretrained(tiny_model / "model")
    places = {}
    for name in ("stickers", "sketches"):
        add_lora(model, rank=4, name=name)
        for parameter in adapter_parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.5)
        places[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, places[name], base=model_hash(tiny_model), name=name)
    return places


@pytest.fixture(scope="session")
def servers(
    tiny_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """Servers, started together: `open` as a person starts it, `guarded` with keys, narrow limits and adapters, `short`
    with little patience and few files."""
    directory = tmp_path_factory.mktemp("serving")
    keys = directory / "keys"
    keys.write_text("# clients\n" + "".join(f"{name} {key}\n" for name, key in KEYS.items()))
    narrow = ("--budget", 64, "--queue", 20, "--at-once", 2, "--largest-body", 0.1, "--timeout", 60)
    named = [word for name, place in adapters.items() for word in ("--adapter", f"{name}={place}")]
    running = {
        "open": launch(directory / "open", tiny_model, "--name", "tiny"),
        "guarded": launch(directory / "guarded", tiny_model, "--api-key-file", keys, *narrow, *named, "--name", "tiny"),
        "short": launch(directory / "short", tiny_model, "--idle", 4, files=256),
    }
    try:
        yield {name: wait_for(server) for name, server in running.items()}
    finally:
        for server in running.values():
            server.process.send_signal(signal.SIGTERM)
        for server in running.values():
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                server.process.kill()


@pytest.fixture
def launcher() -> Callable[..., Server]:
    """A function that starts a server in a directory and waits until it listens."""
    return lambda *arguments: wait_for(launch(*arguments))


@pytest.fixture(scope="session")
def server(servers: dict[str, Server]) -> Server:
    return servers["open"]


@pytest.fixture(scope="session")
def guarded(servers: dict[str, Server]) -> Server:
    return servers["guarded"]


@pytest.fixture(scope="session")
def short(servers: dict[str, Server]) -> Server:
    return servers["short"]


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """A function that gives the bytes of a noise picture in any of Pillow's formats."""

    def make(seed: int = 0, side: int = 16, kind: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        levels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(levels).save(buffer, kind)
        return buffer.getvalue()

    return make

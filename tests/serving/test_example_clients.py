"""The example clients, each run as a person runs it, against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

CLIENTS = Path(__file__).resolve().parents[2] / "examples" / "clients"


@pytest.fixture(scope="module")
def apple(picture, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "apple.png"
    path.write_bytes(picture(0))
    return path


def run(*command: object, key: str = "none") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MMDLM_API_KEY": key}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=environment)


def test_the_folder_holds_nothing_that_is_not_run_here():
    assert {path.name for path in CLIENTS.iterdir()} - {"__pycache__"} == {
        "caption.sh", "client_openai.py", "client_httpx.py", "client.mjs",
    }  # fmt: skip


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("sh")), reason="needs curl and a shell")
def test_curl(server, guarded, apple):
    done = run("sh", CLIENTS / "caption.sh", apple, server.url, 2)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["data"][0]["captions"]) == 2
    locked = run("sh", CLIENTS / "caption.sh", apple, guarded.url, key="wrong")
    assert locked.returncode == 22 and json.loads(locked.stdout)["error"]["code"] == "invalid_api_key"


def test_openai(server, tmp_path):
    drawn = tmp_path / "drawn.png"
    done = run(sys.executable, CLIENTS / "client_openai.py", "a red apple", drawn, server.url)
    assert done.returncode == 0, done.stderr
    assert Image.open(drawn).size == (16, 16) and done.stdout.count("\n") >= 2


def test_httpx(server, apple):
    done = run(sys.executable, CLIENTS / "client_httpx.py", apple, "a red apple", server.url)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(bool(re.match(r"0\.\d\d ", line)) for line in lines) == 3
    assert any(line.endswith("0% undecided") for line in lines) and lines[-1] == "drawn with seed 7"


@pytest.mark.skipif(not shutil.which("node"), reason="needs node 18 or later")
def test_node(server, guarded, apple):
    done = run("node", CLIENTS / "client.mjs", apple, "how many?", server.url)
    assert done.returncode == 0 and done.stdout.count("\n") >= 2, done.stderr
    locked = run("node", CLIENTS / "client.mjs", apple, "how many?", guarded.url)
    assert locked.returncode != 0 and "Wrong API key" in locked.stderr

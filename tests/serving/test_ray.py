"""The server as a Ray Serve deployment and a folder captioned through Ray Data, on a real, small Ray of one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.pipelines import ImageToText
from mmdlm.serving.ray_serve import PATIENT

PATIENCE = 1800  # seconds: a busy machine starts processes slowly


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray with three (logical) CPUs."""
    before = {name: os.environ.get(name) for name in PATIENT}
    os.environ.update(PATIENT)
    import ray

    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_the_server_runs_as_a_deployment_and_streams(cluster, tiny_model, picture, tmp_path):
    arguments = ["serve", "--ray", "--replicas", 1, "--max-replicas", 2, "--model", tiny_model, "--device", "cpu",
                 "--port", 0, "--name", "tiny"]
    command = [sys.executable, "-c", "from mmdlm.cli import main; main()", *map(str, arguments)]
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, "RAY_ADDRESS": cluster})
    try:
        until = time.monotonic() + PATIENCE
        while not (address := (tmp_path / "out").read_text().strip()):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "err").read_text()
            time.sleep(0.1)
        with httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client:
            assert client.get("/ready").json() == {"status": "ready"} and "<h1>mmdlm</h1>" in client.get("/").text
            told = client.post("/v1/caption", files={"image": picture(0)}).json()["data"][0]["captions"][0]
            pipe = ImageToText.from_pretrained(tiny_model)
            pipe.set_progress_bar_config(disable=True)
            assert told["text"] == pipe(picture(0)).texts[0]
            body = {"prompt": "a red apple", "seed": 7, "num_inference_steps": 8}
            whole = client.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
            asked = {**body, "stream": True, "drafts": True}
            with client.stream("POST", "/v1/images/generations", json=asked) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
            events = [json.loads(line) for line in lines]
            assert len(events) > 2 and all("draft" in event for event in events[:-1])
            assert events[-1]["type"] == "image_generation.completed" and events[-1]["b64_json"] == whole
            refused = client.post("/v1/images/generations", json={**body, "style": "vivid"})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "style"
            assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
        from ray import serve

        (deployment,) = serve.status().applications["mmdlm"].deployments.values()
        assert deployment.replica_states == {"RUNNING": 1}
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, (tmp_path / "err").read_text()
        assert "mmdlm" not in serve.status().applications
    finally:
        process.kill()
        process.wait()


def test_a_folder_through_ray_data_is_the_same_as_without(cluster, tiny_model, picture, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.png").write_bytes(picture(number, side=16 + number % 3))
    (folder / "torn.png").write_bytes(picture(0)[:60])
    found = {}
    for name, options in {"plain": [], "ray": ["--ray", "--workers", "2"]}.items():
        arguments = ["caption-folder", folder, tmp_path / name, "--model", tiny_model, "--batch-size", 2, *options]
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0 and "41 pictures, 1 could not be read" in result.stdout, result.output
        lines = (tmp_path / name / "captions.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line) for line in lines]
    assert len(list((tmp_path / "ray" / "shards").glob("*.parquet"))) == 3
    sure = {name: [row.pop("confidence") for row in rows] for name, rows in found.items()}
    assert found["ray"] == found["plain"]
    # processes may use another number of threads, whose sums differ in the last bits
    assert sure["ray"] == [None if value is None else pytest.approx(value, rel=1e-4) for value in sure["plain"]]
    shard = next((tmp_path / "ray" / "shards").glob("*.parquet"))
    shard.unlink()  # as if it had been killed before this one
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert "of them done before" in result.stdout, result.output
    lines = (tmp_path / "ray" / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["caption"] for line in lines] == [row["caption"] for row in found["plain"]]


def test_without_ray_the_option_says_what_to_install(monkeypatch, tiny_model, picture, tmp_path):
    monkeypatch.setattr("mmdlm.serving.ray_serve.find_spec", lambda name: None)
    (tmp_path / "a.png").write_bytes(picture(0))
    for arguments in (["serve", "--ray", "--port", "0"], ["caption-folder", tmp_path, Path(tmp_path / "out"), "--ray"]):
        result = CliRunner().invoke(app, [*map(str, arguments), "--model", str(tiny_model)])
        assert result.exit_code == 2 and "pip install 'mmdlm[ray]'" in result.stderr, result.output

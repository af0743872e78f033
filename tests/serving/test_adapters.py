"""Several adapters of one model, over HTTP: listed, chosen by a request's `model`, refused where they cannot be."""

from __future__ import annotations

import base64
import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app

ANNA = "anna-0123456789abcdef"


def test_adapters_are_models_of_their_own(guarded, picture, tiny_model):
    with guarded.client(ANNA) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["tiny", "stickers", "sketches"]
        assert [one.get("parent") for one in listed] == [None, "tiny", "tiny"]
        base, *adapted = [one["hash"] for one in listed]
        assert all(one.startswith(f"{base}+") for one in adapted) and len(set(adapted)) == 2
        assert client.get("/v1/models/stickers").json() == listed[1]
        answer = client.post("/v1/images/generations", json={"prompt": "x", "model": "../stickers"})
        assert answer.status_code == 404 and "'tiny' or 'stickers' or 'sketches'" in answer.json()["error"]["message"]

    def drawn(model: str | None) -> tuple[bytes, str]:
        with guarded.client(ANNA) as client:
            body = {"prompt": "a red apple", "seed": 3, **({} if model is None else {"model": model})}
            (one,) = client.post("/v1/images/generations", json=body).json()["data"]
        opened = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
        return opened.tobytes(), opened.text["model_hash"]

    names = [None, "tiny", "stickers", "sketches"]
    alone = [drawn(name) for name in names]
    assert alone[0] == alone[1] and len({pixels for pixels, _ in alone}) == 3
    assert [fact for _, fact in alone] == [base, base, *adapted]
    with ThreadPoolExecutor(2) as pool:  # as many as this server lets one client ask at once
        assert list(pool.map(drawn, names)) == alone
    with guarded.client(ANNA) as client:
        said = client.post("/v1/caption", files={"image": picture(0)}, data={"model": "sketches"}).json()
    assert said["model"] == "sketches"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--adapter", "stickers"], "expected NAME=DIR"),
        (["--adapter", "=x"], "expected NAME=DIR"),
        (["--adapter", "a=x", "--adapter", "a=y"], "names two adapters alike"),
        (["--adapter", "a=nowhere"], "no adapter at"),
    ],
)
def test_adapters_that_cannot_be_are_one_sentence(tiny_model, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "--port", "0", "--model", str(tiny_model), "--device", "cpu", *options])
    assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.output


def test_an_adapter_may_not_be_called_as_the_model(tiny_model, adapters):
    options = ["--model", str(tiny_model), "--device", "cpu", "--adapter", f"tiny={adapters['stickers']}"]
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2 and "both called 'tiny'" in result.stderr


def test_an_adapter_with_words_of_its_own_has_to_be_merged_first(tiny_model, adapters, tmp_path):
    place = Path(shutil.copytree(adapters["stickers"], tmp_path / "worded"))
    settings = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**settings, "new_words": ["glyptodon"]}))
    options = ["--model", str(tiny_model), "--device", "cpu", "--adapter", f"worded={place}"]
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2 and "words of its own" in result.stderr

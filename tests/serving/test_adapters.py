"""Several adapters of one model, over HTTP: listed, chosen by a request's `model`, refused where they cannot be."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from typer.testing import CliRunner

from mmdlm.cli import app
from mmdlm.cli.serve import application
from mmdlm.model_directory import model_hash
from mmdlm.models.adapters import adapter_parameters, add_lora, save_adapter
from mmdlm.models.new_words import add_new_words, new_rows
from mmdlm.pipelines import TextToImage
from mmdlm.serving.settings import Limits

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
        (["--adapter", "stickers"], "no adapter at"),
        (["--adapter", "a=x", "--adapter", "stickers"], "expected NAME=DIR"),
        (["--adapter", "x", "--quantize", "int8"], "expected one:"),
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


@pytest.fixture
def worded(tiny_model: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny model, of random weights, with a word of its own."""
    model = TextToImage.from_pretrained(tiny_model).model
    torch.manual_seed(5)
    add_new_words(model, ["glyptodon"])
    add_lora(model, rank=2)
    for parameter in [*adapter_parameters(model).values(), *new_rows(model).values()]:
        torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(model, tmp_path / "worded", base=model_hash(tiny_model))
    return tmp_path / "worded"


def test_an_adapter_with_words_of_its_own_is_not_served_beside_its_base(tiny_model, worded):
    options = ["--model", str(tiny_model), "--device", "cpu", "--adapter", f"worded={worded}"]
    result = CliRunner().invoke(app, ["serve", "--port", "0", *options])
    assert result.exit_code == 2 and f"serve it by itself, with --adapter {worded}" in result.stderr


def test_an_adapter_alone_is_the_model_and_draws_as_it_does_elsewhere(tiny_model, worded):
    door = application(tiny_model, "cpu", None, None, Limits(), None, (), True, {}, worded)
    with TestClient(door, base_url="http://127.0.0.1") as client:
        (listed,) = client.get("/v1/models").json()["data"]
        assert listed["id"] == "worded" and listed["hash"].startswith(f"{model_hash(tiny_model)}+")
        body = {"prompt": "a red glyptodon", "seed": 3}
        (one,) = client.post("/v1/images/generations", json=body).json()["data"]
    served = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
    pipe = TextToImage.from_pretrained(tiny_model, adapter=worded)
    pipe.set_progress_bar_config(disable=True)
    (drawn,) = pipe("a red glyptodon", generator=[torch.Generator().manual_seed(3)]).images
    assert served.tobytes() == drawn.tobytes()

"""`mmdlm convert` on a recorded checkpoint: what it writes and prints; a mistake leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mmdlm.cli import app
from mmdlm.convert import load_predictor

RECORDED = Path(__file__).parent.parent / "parity" / "recorded"
LLADA, MMADA = RECORDED / "llada-generate", RECORDED / "mmada-t2i"


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def refused(place: Path, *arguments: object) -> str:
    """The one sentence of a mistake, after which nothing new lies in `place`."""
    before = sorted(place.iterdir())
    done = convert(*arguments)
    assert done.exit_code == 2, (done.output, done.exception)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and done.stderr.startswith("mmdlm: ")
    assert sorted(place.iterdir()) == before
    return done.stderr


def test_the_converted_model_gives_the_same_logits(tmp_path):
    done = convert(LLADA, tmp_path / "ours")
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{tmp_path / 'ours'} (model)\n", "")
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours, theirs = (load_predictor(place)(ids).logits for place in (tmp_path / "ours", LLADA))
    assert torch.equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_dtype_and_the_ids_asked_for(tmp_path):
    sentence = refused(tmp_path, MMADA, tmp_path / "ours")
    assert "image_start" in sentence, "the tiny vocabulary's is in no file"
    given = ["--dtype", "bfloat16", "--id", "text_size=220", "--id", "bos_id=211"]
    assert convert(MMADA, tmp_path / "ours", *given).exit_code == 0
    model = load_predictor(tmp_path / "ours")
    assert model.dtype == torch.bfloat16
    assert (model.vocabulary.image_columns, model.vocabulary.bos_id) == ((220, 284), 211)


@pytest.mark.parametrize("given", ["mask_id", "mask_id=", "mask_id=-1", "nonsense=3", "=3"])
def test_a_wrong_id(tmp_path, given):
    assert "expected NAME=NUMBER with a name of text_size" in refused(tmp_path, LLADA, tmp_path / "ours", "--id", given)


def test_wrong_sources_and_places(tmp_path):
    source = Path(shutil.copytree(LLADA, tmp_path / "source"))
    out = tmp_path / "out"
    assert "expected float32, bfloat16 or float16" in refused(tmp_path, source, out, "--dtype", "float8")
    assert "exists already" in refused(tmp_path, source, source)
    refused(tmp_path, tmp_path / "none", out)
    weights = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cut short" in refused(tmp_path, source, out)
    (source / "model.safetensors").write_bytes(weights)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    refused(tmp_path, source, out)
    (source / "config.json").write_text(json.dumps({"model_type": "unheard of"}))
    assert "unheard of" in refused(tmp_path, source, out)
    (source / "config.json").unlink()
    refused(tmp_path, source, out)

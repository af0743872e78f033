"""A tiny hand-drawn world, a tokenizer of random weights, and a way to run a program in this process."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image, ImageDraw

from mmdlm.data.concepts import load_concepts
from mmdlm.data.drawings import STYLES, webp, write_archive
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.programs import program_path

TINY_SUPERVISED = [
    "concepts=16", "train_batch_size=3", "scenes=12", "validation_scenes=4", "logging_steps=1", "ema_decay=0.9",
    "trunk={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4}", "image_fold=2", "validation_prompts=[a cat]", "report_to=none",
]  # fmt: skip


def drawing(number: int, side: int = 96) -> Image.Image:
    """A thing no other number looks like: a polygon or an ellipse with a spot, in its own colour."""
    picture = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(picture)
    colour = tuple((number * step + 40) % 256 for step in (97, 151, 57))
    corners = 3 + number % 4
    if corners == 6:
        pen.ellipse((4, 16, side - 4, side - 16), fill=colour)
    else:
        pen.regular_polygon((side / 2, side / 2, side / 2 - 4), corners, rotation=number * 11, fill=colour)
    pen.ellipse((40, 40, 56, 56), fill=(250, 250, 240) if number % 2 else (20, 20, 30))
    return picture


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive as `mmdlm data build pictures` writes it: the sixteen commonest concepts in every style."""
    directory = tmp_path_factory.mktemp("pictures")
    for shift, style in enumerate(STYLES):
        pictures = {c.sequence: webp(drawing(n + 16 * shift)) for n, c in enumerate(load_concepts()[:16])}
        write_archive(directory, style, pictures, 96)
    return directory


@pytest.fixture(scope="session")
def visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of random weights: 64 x 64 pixels, 16 x 16 codes of 6 bits."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tokenizer")
    widths = {"encoder_widths": (8, 8), "decoder_widths": (8, 8), "encoder_blocks": 1, "decoder_blocks": 1}
    LFQTokenizer(sample_size=64, codebook_bits=6, **widths).save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs run on the CPU, where sums have one order, and leave nothing of accelerate's state behind."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def run() -> Callable[..., None]:
    """Runs a program's main in this process: run("train/supervised", "seed=1", ...)."""

    def run_program(name: str, *arguments: str | Path) -> None:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        load_program(name).main([str(argument) for argument in arguments])

    return run_program


def load_program(name: str) -> ModuleType:
    path = program_path(name)
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_supervised() -> list[str]:
    """Settings of train/supervised for seconds on a CPU."""
    return TINY_SUPERVISED


@pytest.fixture(scope="session")
def load() -> Callable[[str], ModuleType]:
    """A program as a module: load("train/supervised")."""
    return load_program


@pytest.fixture(scope="session")
def pipeline(world: Path, visual_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory that a run of two steps leaves."""
    out = tmp_path_factory.mktemp("trained")
    arguments = [*TINY_SUPERVISED, "max_train_steps=2", f"data={world}", f"tokenizer={visual_tokenizer}", f"out={out}"]
    os.environ["ACCELERATE_USE_CPU"] = "true"
    load_program("train/supervised").main(arguments)
    return out / "pipeline"

"""The model that ships: its size and precision, its card, and that the documents' figures are its own."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmdlm.assets import shipped_model
from mmdlm.data.concepts import common_concepts
from mmdlm.model_directory import model_hash

ROOT = Path(__file__).parents[1]


def test_the_weights_are_in_half_precision_and_at_most_40_mb():
    files = list(shipped_model().rglob("*.safetensors"))
    assert len(files) == 2 and sum(path.stat().st_size for path in files) <= 40_000_000
    for path in files:
        kinds = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
        assert kinds == {torch.float16}, path.name


def test_the_card_names_every_thing_it_knows():
    card = " ".join((shipped_model() / "README.md").read_text(encoding="utf-8").split())
    lists = re.findall(r"\*\*[^*]+\*\* \((\d+)\): (.*?)\.(?= - |$)", card)
    named = [name for _, names in lists for name in names.split(", ")]
    assert sorted(named) == sorted(concept.name for concept in common_concepts(300))
    assert [int(count) for count, _ in lists] == [len(names.split(", ")) for _, names in lists]


def test_the_readme_s_figures_are_of_the_model_that_ships():
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    cannot = shown[shown.index("## What it can and cannot do") : shown.index("## Fill anything")]
    written = (ROOT / "eval" / "README.md").read_text(encoding="utf-8")
    table = written[written.index("<!-- from run files -->") : written.index("<!-- end of run files -->")]
    for page in (cannot, table):
        assert re.findall(r"[Mm]odel\s+([0-9a-f]{16})\b", page)[0] == model_hash(shipped_model())

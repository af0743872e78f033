"""A case on disk, and the three comparisons: what is equal, close, and handed to the model pass by pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdlm.errors import InputError
from mmdlm.evaluation.parity import close, equal, handed_to, read_case, same_passes, verify

LLADA = Path(__file__).parent / "recorded" / "llada-generate"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LLADA, tmp_path / "case"))


def keep_runs(case: Path, *names: str) -> None:
    spec = json.loads((case / "case.json").read_text())
    spec["runs"] = {name: spec["runs"][name] for name in names}
    (case / "case.json").write_text(json.dumps(spec))


def test_one_wrong_id_is_found_where_it_is(case):
    keep_runs(case, "uneven")
    tensors = load_file(case / "case.safetensors")
    tensors["uneven.step_model_input"][3, 0, 1] += 1
    tensors["uneven.output_ids"][0, 0] += 1
    save_file(tensors, case / "case.safetensors")
    found = [(check.name, check.found, check.passed) for check in verify(case)]
    assert found == [
        ("uneven passes", "pass 4 of 9 differs", False),
        ("uneven output", "25 of 26 equal", False),
    ]


def test_another_checkpoint_fails(case):
    keep_runs(case, "blocks")
    weights = load_file(case / "model.safetensors")
    weights["model.transformer.blocks.0.q_proj.weight"].mul_(2)
    save_file(weights, case / "model.safetensors")
    assert not all(check.passed for check in verify(case))


def test_the_same_case_twice_and_the_global_generator_untouched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert list(verify(LLADA)) == list(verify(LLADA))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_ids_that_a_case_names():
    assert read_case(LLADA).named_ids == {"bos": 239, "eos": 240, "eot": 241, "mask": 243}
    named = read_case(LLADA.parent / "mmada-t2i").named_ids
    assert (named["text_size"], named["<|soi|>"], named["[iPAD]"]) == (220, 200, 209)


def test_what_is_no_case(tmp_path, case):
    with pytest.raises(InputError, match="has no case"):
        read_case(tmp_path)
    with pytest.raises(InputError, match="has no case"):
        read_case(tmp_path / "none")
    (tmp_path / "case.json").write_text('{"case": "unheard of"}')
    with pytest.raises(InputError, match="kind 'unheard of', expected one of mmada-forward"):
        read_case(tmp_path)
    for broken in ("{", "[]", "\udcff"):
        (tmp_path / "case.json").write_text(broken, errors="surrogateescape")
        with pytest.raises(InputError, match=r"copy the case again|of kind"):
            read_case(tmp_path)
    tensors = (case / "case.safetensors").read_bytes()
    (case / "case.safetensors").write_bytes(tensors[: len(tensors) // 2])
    with pytest.raises(InputError, match="incomplete or broken"):
        list(verify(case))
    (case / "case.safetensors").unlink()
    with pytest.raises(InputError, match="incomplete or broken"):
        list(verify(case))


def test_comparisons():
    one = torch.tensor([1, 2, 3])
    assert equal("a", one, one).passed
    assert (equal("a", one, torch.tensor([1, 2, 4])).found, equal("a", one, one[:2]).passed) == ("2 of 3 equal", False)
    value = torch.tensor([1.0, 2.0])
    assert close("a", value, value + 1e-4, atol=2e-4).passed
    assert not close("a", value, value + 1e-4, atol=1e-5).passed
    assert close("a", value, value * 1.01, rtol=0.02).passed
    assert not close("a", value, torch.tensor([1.0, torch.nan]), atol=1.0).passed
    assert not close("a", torch.tensor([1.0, torch.nan]), value, atol=1.0).passed
    assert not close("a", value, value[:1], atol=1.0).passed


def test_passes():
    one, two = torch.tensor([[1]]), torch.tensor([[2]])
    assert same_passes("a", [one, two], torch.stack([one, two])).found == "2 passes equal"
    assert same_passes("a", [one, one], [one, two]).found == "pass 2 of 2 differs"
    assert same_passes("a", [one], [one, two]).found == "1 passes, not 2"
    assert not same_passes("a", [one, two, two], [one, two]).passed
    layer = torch.nn.Embedding(3, 1)
    with handed_to(layer) as handed:
        layer(one), layer(two)
    layer(one)
    assert [ids.tolist() for ids in handed] == [[[1]], [[2]]]

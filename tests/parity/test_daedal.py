"""DAEDAL on the recorded model: the default ways keep what the released ones do not promise, and a wrong id is seen."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmdlm.convert import load_predictor
from mmdlm.evaluation.parity import read_case, verify
from mmdlm.sampling.denoise import ABSENT
from mmdlm.sampling.lengths import fit_length, grow, ragged, trim_at_eos

RECORDED = Path(__file__).parent / "recorded" / "daedal"


def test_every_pass_is_held_against_the_recorded_one(tmp_path: Path):
    case = tmp_path / "daedal"
    shutil.copytree(RECORDED, case)
    tensors = load_file(case / "case.safetensors")
    tensors["batch.step_model_input"][20, 0, 9] += 1
    tensors["capped.step_attention_mask"][3, 0, 24] = 0
    save_file(tensors, case / "case.safetensors")
    found = {check.name: check for check in verify(case)}
    assert [name for name, check in found.items() if not check.passed] == ["batch passes", "capped passes"]
    assert found["batch passes"].found == "pass 21 of 32 differs"
    assert found["capped passes"].found == "pass 4 of 16 differs"


def test_rows_alone_and_in_a_batch_give_the_same_answer_within_the_budget():
    case = read_case(RECORDED)
    model = load_predictor(RECORDED, dtype=torch.float32)
    run, prompts = case.runs["batch"], case.run("batch")["input_ids"]
    settings = {"mask_id": run["mask_id"], "eos_id": run["eos_token_id"], "longest": 18, "window": 4, "expansion": 4}

    def answers(rows: torch.Tensor) -> list[list[int]]:
        fitted = fit_length(ragged(model), rows, initial_length=8, eos_threshold=0.25, **settings)
        first = rows.shape[1]
        *_, last = grow(
            ragged(model), fitted.x, prompt_length=first, block=8, threshold=0.5, low=0.2, eos_threshold=0.7, **settings
        )
        assert torch.equal(last.x[:, :first], rows)
        assert bool(((last.x[:, first:] != ABSENT).sum(1) <= 18).all())
        assert not bool((last.x == run["mask_id"]).any())
        trimmed = trim_at_eos(last.x, prompt_length=first, eos_id=run["eos_token_id"])
        assert not any((answer == run["eos_token_id"]).any() for answer in trimmed)
        return [row[row != ABSENT].tolist() for row in last.x[:, first:]]

    # one prompt shorter than the others, filled up on the left
    shorter = torch.cat([torch.full_like(prompts[:1, :3], ABSENT), prompts[:1, :4]], dim=1)
    together = torch.cat([prompts, shorter])
    all_at_once = answers(together)
    assert len({len(row) for row in all_at_once}) > 1, "the rows have grown differently"
    assert max(len(row) for row in all_at_once) == 18, "a row has met the budget, which is no multiple of four"
    assert all_at_once == [answers(together[i : i + 1])[0] for i in range(3)]
    assert all_at_once[2] == answers(prompts[:1, :4])[0], "padding on the left changes nothing"

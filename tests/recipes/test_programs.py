"""The programs run: every YAML two steps on a tiny hand-drawn world, resume, a kill, two processes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdlm.models.lfq import entropies
from mmdlm.models.visual_tokenizer import LFQTokenizer
from mmdlm.pipelines import TextToImage
from mmdlm.programs import program_path
from mmdlm.training.checkpoints import list_checkpoints, load_checkpoint
from mmdlm.training.run_log import read_metrics

ROOT = Path(__file__).parent.parent.parent
SETTINGS = sorted(path for folder in ("tokenizers", "train", "eval") for path in (ROOT / folder).glob("*.yaml"))
TINY_LFQ = [
    "concepts=16", "train_batch_size=2", "validation_pictures=4", "logging_steps=1", "ema_decay=0.9",
    "model={sample_size: 32, codebook_bits: 6, encoder_widths: [8, 16], decoder_widths: [8, 16], "
    "encoder_blocks: 1, decoder_blocks: 1}",
]  # fmt: skip


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Equal to the last bit: tensors, and dicts and lists of them."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{where}[{index}]")
    else:
        assert found == expected, where


# ---------------------------------------------------------------------------------------------- every YAML, two steps


def program_of(settings: Path) -> str:
    """The program that a YAML's head comment runs."""
    head = [line for line in settings.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    found = re.findall(r"mmdlm (?:path|run) ((?:tokenizers|train|eval)/\w+)", "\n".join(head))
    assert found, f"the head comment of {settings.name} has no command"
    return found[0]


def test_there_are_settings_to_run():
    assert {"train_lfq", "supervised"} <= {program_of(path).split("/")[1] for path in SETTINGS}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_yaml_runs_two_steps(
    settings: Path, run, world: Path, visual_tokenizer: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    program, out = program_of(settings), tmp_path / "out"
    two_steps = ["max_train_steps=2", "logging_steps=1", "checkpointing_steps=2", "validation_steps=2"]
    own = {
        "tokenizers/train_lfq": [
            *two_steps, "train_batch_size=1", "validation_pictures=2", "adversarial_start=1", "mixed_precision=no",
            # one that grows begins with a tokenizer
            *([f"init_from={visual_tokenizer}"] if settings.stem.endswith("_decoder") else ["model.sample_size=64"]),
        ],
        "train/supervised": [
            *two_steps, "train_batch_size=2", "scenes=6", "validation_scenes=2", "validation_prompts=[a cat]",
            # bfloat16 is many times slower on a CPU that lacks it; test_supervised has a tiny run in it
            "report_to=none", "mixed_precision=no",
            *([] if settings.stem == "finetune" else [f"tokenizer={visual_tokenizer}"]),
        ],
        "eval/pictures": [
            "scenes=4", "questions=4", "judged_renders=8", "judge.scenes_per_drawing=1", "judge.least_steps=2",
            "batch_size=4", "steps=2", f"judge_cache={tmp_path}", "styles=[twemoji]",
        ],
    }  # fmt: skip
    arguments = own[program]
    if program == "eval/pictures":
        arguments += [f"model={request.getfixturevalue('pipeline')}", "concepts=16"]
    run(program, "--config", settings.stem, f"data={world}", f"out={out}", *arguments)
    if program.startswith("eval/"):
        assert (out / "run.json").is_file()
        return
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 2]  # two reports and one validation
    assert all(abs(value) < float("inf") for row in rows for value in row.values())
    assert [path.name for path in list_checkpoints(out)] == ["checkpoint-2"]
    with Image.open(out / "curves.png") as curves:
        assert curves.width > 100
    if program == "tokenizers/train_lfq":
        assert {"psnr", "codes_used", "perplexity"} <= rows[2].keys()
        made = LFQTokenizer.from_pretrained(out / "visual_tokenizer")
        assert made.decode(torch.zeros(1, 2, 2, dtype=torch.long)).shape == (
            1,
            3,
            2 * made.downsample,
            2 * made.downsample,
        )
    else:
        assert {"held_out_image", "held_out_text"} <= rows[2].keys()
        assert (out / "report.html").stat().st_size > 5000
        if settings.stem == "finetune":
            assert (out / "adapter" / "adapter_model.safetensors").is_file() and not (out / "pipeline").exists()
        else:
            assert TextToImage.from_pretrained(out / "pipeline").grid == (16, 16)


# ---------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("program", ["tokenizers/train_lfq", "train/supervised"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    program: str, run, world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path
):
    if program == "train/supervised":
        arguments = [*tiny_supervised, f"tokenizer={visual_tokenizer}", "optimizer=muon"]
    else:
        arguments = [*TINY_LFQ, "adversarial_weight=0.1", "adversarial_start=1", "adversarial_ramp=3"]
    arguments += [f"data={world}", "max_train_steps=4", "checkpointing_steps=2", "validation_steps=3"]
    arguments += ["checkpoints_total_limit=3"]  # the best one too
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(program, *arguments, f"out={whole}")

    # What a run that was killed after step 3 leaves: the checkpoint of step 2, metrics beyond it, half a line.
    killed.mkdir()
    shutil.copytree(whole / "checkpoint-2", killed / "checkpoint-2")
    if (whole / "codes").is_dir():
        shutil.copytree(whole / "codes", killed / "codes")
    lines = [line for line in (whole / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 3]
    (killed / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "lo')
    run(program, *arguments, f"out={killed}")

    expected, found = load_checkpoint(whole, "checkpoint-4"), load_checkpoint(killed, "checkpoint-4")
    assert expected is not None and expected[2]["step"] == 4
    assert {"model", "average"} <= expected[0].keys()
    assert_same(found, expected)
    timeless = [
        [{k: v for k, v in row.items() if "second" not in k and "memory" not in k} for row in read_metrics(out)]
        for out in (killed, whole)
    ]
    assert timeless[0] == timeless[1]


def test_a_finished_run_is_left_as_it_is(run, world: Path, tmp_path: Path):
    arguments = [*TINY_LFQ, f"data={world}", f"out={tmp_path / 'run'}", "max_train_steps=1"]
    run("tokenizers/train_lfq", *arguments)
    before = load_checkpoint(tmp_path / "run", "latest")
    run("tokenizers/train_lfq", *arguments)
    assert_same(load_checkpoint(tmp_path / "run", "latest"), before)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 1]


# ---------------------------------------------------------------------------------------------- a kill


def test_a_kill_in_the_middle_of_training_leaves_whole_checkpoints(run, world: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = [*TINY_LFQ, f"data={world}", f"out={out}", "checkpointing_steps=1", "adversarial_weight=0.1"]
    command = [sys.executable, str(program_path("tokenizers/train_lfq")), *arguments, "adversarial_start=0"]
    with (tmp_path / "printed").open("w") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        try:
            give_up = time.monotonic() + 300
            # In the middle of writing a checkpoint, once there are two.
            while len(list_checkpoints(out)) < 2 or not any(out.glob(".writing-*")):
                assert process.poll() is None and time.monotonic() < give_up, (tmp_path / "printed").read_text()
                time.sleep(0.0005)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL

    found = list_checkpoints(out)
    assert found
    for path in found:
        weights, state, meta = load_checkpoint(out, path.name)
        assert weights.keys() == {"model", "average", "discriminator"} and state.keys() >= {"optimizer", "score_means"}
        assert path.name == f"checkpoint-{meta['step']}"
    # And training goes on from the newest.
    run("tokenizers/train_lfq", *arguments, "adversarial_start=0", f"max_train_steps={meta['step'] + 1}")
    assert list_checkpoints(out)[-1].name == f"checkpoint-{meta['step'] + 1}"
    assert not [path for path in out.iterdir() if path.name.startswith((".writing-", ".deleting-"))]
    steps = [row["step"] for row in read_metrics(out)]
    assert steps == sorted(steps) and set(steps) == set(range(1, meta["step"] + 2))


def test_the_adversarial_and_the_perceptual_term_come_when_they_shall(run, world: Path, tmp_path: Path):
    steps = [*TINY_LFQ, f"data={world}", "max_train_steps=6", "checkpointing_steps=2", "validation_steps=100"]
    judged = [*steps, "adversarial_weight=0.5", "adversarial_start=4", "adversarial_ramp=1"]
    judged += ["checkpoints_total_limit=9"]
    run("tokenizers/train_lfq", *judged, f"out={tmp_path / 'judged'}")
    rows = [row for row in read_metrics(tmp_path / "judged") if "loss" in row]
    assert [row["step"] for row in rows if "adversarial" in row] == [5, 6]
    assert [row["step"] for row in rows if "discriminator" in row] == [5, 6]
    states = [load_checkpoint(tmp_path / "judged", f"checkpoint-{step}")[0]["discriminator"] for step in (2, 4, 6)]
    moved = [any(not torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(states)]
    assert moved == [False, True]

    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", pretrained=False).state_dict(), tmp_path / "tiny.safetensors")
    run("tokenizers/train_lfq", *steps, f"out={tmp_path / 'plain'}")
    seen = ["perceptual_weight=0.5", f"perceptual_model=test_resnet@{tmp_path / 'tiny.safetensors'}"]
    run("tokenizers/train_lfq", *steps, *seen, f"out={tmp_path / 'seen'}")
    first = [read_metrics(tmp_path / name)[0]["reconstruction"] for name in ("plain", "seen")]
    assert first[1] > first[0]  # the same pictures and weights, and one term more


def test_tokenizer_training_stops_when_asked_and_on_a_full_disk(world: Path, tmp_path: Path):
    out = tmp_path / "run"
    arguments = [*TINY_LFQ, f"data={world}", f"out={out}", "validation_steps=1000000", "checkpointing_steps=1000000"]
    command = [sys.executable, str(program_path("tokenizers/train_lfq")), *arguments]
    process = subprocess.Popen([*command, "max_train_steps=100000"], stdout=subprocess.PIPE, text=True)
    try:
        give_up = time.monotonic() + 300
        while not ((out / "metrics.jsonl").exists() and len(read_metrics(out)) >= 3):
            assert process.poll() is None and time.monotonic() < give_up
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    [saved] = list_checkpoints(out)
    step = read_metrics(out)[-1]["step"]
    assert process.returncode == 0 and saved.name == f"checkpoint-{step}"
    assert f"stopped as asked after step {step}" in said

    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    limit += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    full = [sys.executable, "-c", limit, *command[1:], f"max_train_steps={step + 2}", "checkpointing_steps=1"]
    done = subprocess.run(full, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "writing failed (" in done.stderr and f"start the same command again; checkpoint-{step} in" in done.stderr
    assert list_checkpoints(out) == [saved]


# ---------------------------------------------------------------------------------------------- two processes


def torchrun(*command: str | Path) -> str:
    """Runs a Python program in two gloo processes; what they print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, *map(str, command)], capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


HALVES = """
import os
import sys
import torch
import torch.distributed as dist
from mmdlm.models.lfq import entropies

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
z = torch.load(sys.argv[1], weights_only=True).chunk(2)[rank].requires_grad_()
for group_bits in (None, 2):
    found = entropies(z, 0.5, group_bits=group_bits)
    gradient = torch.autograd.grad(found.codebook, z)[0]
    torch.save([found.codebook.detach(), gradient], f"{sys.argv[1]}-{rank}-{group_bits}")
dist.barrier()
os._exit(0)  # all is written; on a busy machine gloo's threads sometimes abort the teardown ("terminate called")
"""


def test_the_codebook_entropy_is_that_of_all_processes(tmp_path: Path):
    z = torch.randn(10, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.save(z, tmp_path / "z")
    (tmp_path / "halves.py").write_text(HALVES)
    torchrun(tmp_path / "halves.py", tmp_path / "z")
    z.requires_grad_()
    for group_bits in (None, 2):
        expected = entropies(z, 0.5, group_bits=group_bits).codebook
        (gradient,) = torch.autograd.grad(expected, z)
        parts = [torch.load(tmp_path / f"z-{rank}-{group_bits}") for rank in (0, 1)]
        for value, _ in parts:
            torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
        # Data-parallel training takes the mean over processes, so each one's share comes twice as large.
        torch.testing.assert_close(torch.cat([share for _, share in parts]) / 2, gradient, rtol=1e-10, atol=1e-14)


def test_the_tokenizer_trains_on_two_processes(run, world: Path, tmp_path: Path):
    arguments = [*TINY_LFQ, f"data={world}", "max_train_steps=2", "adversarial_weight=0.1", "adversarial_start=1"]
    torchrun(program_path("tokenizers/train_lfq"), *arguments, f"out={tmp_path / 'two'}")
    run("tokenizers/train_lfq", *arguments, f"out={tmp_path / 'one'}", "train_batch_size=4")
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    assert [row["step"] for row in two] == [1, 2, 2]
    # Two halves of a batch of four: the codebook entropy is that of all four, the other term that of a half.
    assert two[0]["codebook_entropy"] == pytest.approx(one[0]["codebook_entropy"], rel=1e-5)
    assert two[0]["sample_entropy"] != pytest.approx(one[0]["sample_entropy"], rel=1e-3)
    # And so is the step: Adam's first one goes by the sign of the gradient.
    steps = [load_file(tmp_path / name / "checkpoint-2" / "average.safetensors") for name in ("one", "two")]
    near = torch.cat([(steps[0][name] - steps[1][name]).abs().flatten() < 1e-4 for name in steps[0]])
    assert float(near.float().mean()) > 0.9


def test_two_processes_train_the_predictor_as_one_with_twice_the_batch(
    run, world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path
):
    arguments = [*tiny_supervised, f"data={world}", f"tokenizer={visual_tokenizer}", "max_train_steps=2"]
    arguments += ["learning_rate=1e-4", "validation_prompts=[]"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [str(ROOT / "train" / "accelerate" / "cpu_two_processes.yaml"), str(program_path("train/supervised"))]
    done = subprocess.run(
        [*launcher, *arguments, f"out={tmp_path / 'two'}", "train_batch_size=3"],
        capture_output=True, text=True, timeout=600, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    printed = done.stdout
    assert "2 process(es) on cpu" in printed
    run("train/supervised", *arguments, f"out={tmp_path / 'one'}", "train_batch_size=6")
    run(
        "train/supervised", *arguments, f"out={tmp_path / 'parts'}", "train_batch_size=2",
        "gradient_accumulation_steps=3",
    )  # fmt: skip
    two, one, parts = (read_metrics(tmp_path / name) for name in ("two", "one", "parts"))
    assert [row["step"] for row in two] == [1, 2, 2]
    for other in (two, parts):
        for row, expected in zip(other[:2], one[:2], strict=True):
            for name in {"loss", "image", "text", "gradient_norm", "image/bound", "text/nats"} & expected.keys():
                assert row[name] == pytest.approx(expected[name], rel=2e-5), name
    weights = [load_file(tmp_path / name / "checkpoint-2" / "model.safetensors") for name in ("one", "two", "parts")]
    for other in weights[1:]:
        # Adam's first steps go by the sign of the gradient, so a weight whose gradient is nearly 0 may go either way.
        near = torch.cat([(weights[0][name] - other[name]).abs().flatten() < 1e-6 for name in other])
        assert float(near.float().mean()) > 0.98
    assert TextToImage.from_pretrained(tmp_path / "two" / "pipeline")("a cat").images[0].size == (64, 64)

"""train/supervised: adapters, mixtures, packing; what ends a run ends it with a reason and loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdlm.errors import InputError
from mmdlm.pipelines import TextToImage
from mmdlm.programs import program_path
from mmdlm.training.checkpoints import list_checkpoints, load_checkpoint, read_best
from mmdlm.training.run_log import read_metrics


@pytest.fixture
def arguments(world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path) -> list[str]:
    return [
        *tiny_supervised, f"data={world}", f"tokenizer={visual_tokenizer}", f"out={tmp_path / 'run'}",
        "validation_prompts=[]", "max_train_steps=3", "validation_steps=2", "lr_warmup_steps=1",
    ]  # fmt: skip


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Eight pictures of one's own with captions, and one row that is broken."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = []
    for n in range(8):
        Image.new("RGB", (40, 30 + n), (30 * n, 200 - 20 * n, 90)).save(folder / f"{n}.png")
        lines.append({"file_name": f"{n}.png", "text": f"a plate, number {n}"})
    lines.append({"file_name": "missing.png", "text": "nothing"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_best_checkpoint_stays_beside_the_newest(run, arguments: list[str], tmp_path: Path):
    settings = ["max_train_steps=4", "validation_steps=1", "checkpointing_steps=2", "checkpoints_total_limit=1"]
    # A step so large that everything after the first validation is worse.
    run("train/supervised", *arguments, *settings, "learning_rate=3.0", "lr_warmup_steps=4", "report_to=tensorboard")
    assert list((tmp_path / "run" / "mmdlm").rglob("events.out.tfevents.*"))
    held = {row["step"]: row["held_out_image"] + 0.3 * row["held_out_text"]
            for row in read_metrics(tmp_path / "run") if "held_out_image" in row}  # fmt: skip
    best = min(held, key=lambda step: held[step])
    assert best < 4 and read_best(tmp_path / "run") == (best, pytest.approx(held[best], rel=1e-4))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"checkpoint-{best}", "checkpoint-4"]


def test_an_adapter_on_ones_own_pictures_beside_a_replayed_world(
    run, arguments: list[str], pipeline: Path, pairs: Path, world: Path, tmp_path: Path, capsys
):
    mixture = json.dumps([{"path": str(pairs), "weight": 2}, {"path": str(world)}])
    before = load_file(pipeline / "model" / "model.safetensors")
    run(
        "train/supervised", *arguments, f"data={mixture}", f"init_from={pipeline}", "full=false", "rank=2",
        "held_out_share=0.25", "train_batch_size=8", "validation_prompts=[a plate]", "caption_length=40",
        "gradient_checkpointing=true",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "mine: 1 rows left out, the first at metadata.jsonl:9" in printed
    out = tmp_path / "run"
    rows = read_metrics(out)
    trained = next(row for row in rows if row["step"] == 3)
    assert {"image/nats/mine", f"image/nats/{world.name}"} <= trained.keys()
    held = next(row for row in rows if "held_out_image" in row)
    assert {"held_out/mine/image/nats", f"held_out/{world.name}/image/nats"} <= held.keys()
    weights, _, _ = load_checkpoint(out, "latest")
    assert weights["model"] and all("lora" in name for name in weights["model"])
    assert not (out / "pipeline").exists() and (out / "adapter" / "adapter_model.safetensors").is_file()
    after = load_file(pipeline / "model" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)  # the base is left alone
    picture = TextToImage.from_pretrained(pipeline, adapter=out)("a plate").images[0]
    assert picture.size == (64, 64)
    page = (out / "report.html").read_text()
    assert "a plate, number" in page and page.count("data:image/png") >= 2 and "http" not in page.replace("www.w3", "")
    # The same directory with other settings is no run to go on with.
    with pytest.raises(InputError, match=r"has other weights \(model\) than these settings train"):
        run("train/supervised", *arguments, f"data={mixture}", f"init_from={pipeline}", "caption_length=40")


def test_packed_rows_train_alike(run, arguments: list[str], tmp_path: Path):
    settings = ["validation_steps=9", "train_batch_size=4", "max_train_steps=2", "learning_rate=1e-4"]
    run("train/supervised", *arguments, *settings)
    run("train/supervised", *arguments, *settings, f"out={tmp_path / 'packed'}", "pack=true", "pack_length=600")
    plain, packed = read_metrics(tmp_path / "run")[:2], read_metrics(tmp_path / "packed")[:2]
    for row, expected in zip(packed, plain, strict=True):
        for name in {"loss", "gradient_norm", "image/bound"} & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=1e-4), name


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_weights(run, arguments: list[str], tmp_path: Path):
    wild = ["learning_rate=1e30", "max_grad_norm=1e30", "max_train_steps=30", "checkpointing_steps=1"]
    with pytest.raises(SystemExit, match=r"the loss became nan .* at step \d+: lower learning_rate"):
        run("train/supervised", *arguments, *wild, "validation_steps=99")
    assert list_checkpoints(tmp_path / "run")


def test_epochs_and_wrong_settings(run, arguments: list[str], pairs: Path, tmp_path: Path):
    epochs = ["num_train_epochs=2", "train_batch_size=2", "caption_length=40", "held_out_share=0.25", f"data={pairs}"]
    run("train/supervised", *arguments, *epochs, "mixed_precision=bf16")
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-6"  # 2 x 6 pictures, 2 a step
    for setting, sentence in (
        ("data=''", "data is empty"), ("max_positions=100", "the longest row has"),
        ("optimizer=sgd", "expected 'adamw'"), ("lr_scheduler=steps", "expected one of cosine, linear, constant"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=sentence):
            run("train/supervised", *arguments, f"out={tmp_path / 'wrong'}", "lr_warmup_steps=0", setting)


# One process imports torch, and forks a child for every way in which a run may end.
ENDS = """
import importlib.util, os, resource, signal, sys, time
from pathlib import Path
import torch
from mmdlm.training.arguments import run_program
from mmdlm.training.checkpoints import list_checkpoints, load_checkpoint

torch.set_num_threads(1)
program, run, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
spec = importlib.util.spec_from_file_location("supervised", program)
module = importlib.util.module_from_spec(spec)
sys.modules["supervised"] = module
spec.loader.exec_module(module)

def start(*more, limit=None):
    child = os.fork()
    if child:
        return child
    sys.argv = [program, *arguments, f"out={run}", *more]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run_program(module.main)
        code = 0
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        code = 1 if isinstance(stopped.code, str) else stopped.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def newest():
    found = list_checkpoints(run)
    return int(found[-1].name.split("-")[1]) if found else 0

# Killed in the middle of a save.
child = start("checkpointing_steps=1", "max_train_steps=100000")
while newest() < 2 or not any(run.glob(".writing-*")):
    time.sleep(0.0005)
os.kill(child, signal.SIGKILL)
assert ended(child) == -signal.SIGKILL
for path in list_checkpoints(run):
    weights, state, meta = load_checkpoint(run, path.name)
    assert path.name == f"checkpoint-{meta['step']}" and {"model", "average"} <= weights.keys() and state["optimizers"]
before = newest()

# Goes on from there, and is asked to stop: everything is saved, and that is no failure.
log = run / "metrics.jsonl"
child = start("checkpointing_steps=1000000", "max_train_steps=100000")
while not log.exists() or f'"step": {before + 2},' not in log.read_text():
    time.sleep(0.01)
os.kill(child, signal.SIGTERM)
assert ended(child) == 0
stopped = newest()
assert stopped >= before + 2, (stopped, before)

# The disk is full: the file system refuses what is larger than a checkpoint's smallest part.
child = start("checkpointing_steps=1", f"max_train_steps={stopped + 3}", limit=60_000)
assert ended(child) == 1
assert newest() == stopped and not any(run.glob(".writing-*"))
load_checkpoint(run, "latest")

# And when there is room again, to the end.
assert ended(start("checkpointing_steps=1", f"max_train_steps={stopped + 2}")) == 0
assert newest() == stopped + 2
"""


def test_a_kill_in_a_save_a_request_to_stop_and_a_full_disk(
    world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path
):
    settings = [*tiny_supervised, f"data={world}", f"tokenizer={visual_tokenizer}", "validation_prompts=[]"]
    settings += ["validation_steps=1000000", "lr_warmup_steps=0", "lr_scheduler=constant"]
    done = subprocess.run(
        [sys.executable, "-c", ENDS, str(program_path("train/supervised")), str(tmp_path / "run"), *settings],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"stopped": "SIGTERM"' in done.stdout
    assert "writing failed (" in done.stderr and "start the same command again; checkpoint-" in done.stderr
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert steps == list(range(1, steps[-1] + 1))  # nothing twice, nothing missing


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the launcher's workers")
def test_a_scheduler_that_signals_launcher_and_workers_gets_a_checkpoint(
    world: Path, visual_tokenizer: Path, tiny_supervised: list[str], tmp_path: Path
):
    """As SLURM and systemd do: the workers then hear it twice, since the launcher passes it on."""
    out = tmp_path / "run"
    settings = [*tiny_supervised, f"data={world}", f"tokenizer={visual_tokenizer}", f"out={out}"]
    settings += ["validation_steps=1000000", "checkpointing_steps=1000000", "max_train_steps=100000"]
    settings += ["train_batch_size=96"]  # so long a step that both signals come in one
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(program_path("train/supervised")), *settings],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while launcher.poll() is None and not ((out / "metrics.jsonl").exists() and len(read_metrics(out)) >= 3):
            time.sleep(0.05)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(workers) == 2
        for process in (*map(int, workers), launcher.pid):
            os.kill(process, signal.SIGTERM)
        said, _ = launcher.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    steps = [row["step"] for row in read_metrics(out)]
    [saved] = list_checkpoints(out)
    assert saved.name == f"checkpoint-{steps[-1]}" and steps == list(range(1, steps[-1] + 1)), said[-2000:]
    assert '"stopped": "SIGTERM"' in said

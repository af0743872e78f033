"""The estimate of a run's memory: beside the measured peak of a real step, its parts, and the refusal."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.training.memory import TrainingMemory, check_fits, training_memory
from mmdlm.vocabulary import Vocabulary

FACTOR = 1.5  # the estimate is within this of the whole process' measured peak
SHAPE = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
WORDS = Vocabulary(
    text_size=512, image_start=512, image_size=1024, mask_id=1, bos_id=2, eos_id=3, pad_id=0, boi_id=4, eoi_id=5,
    draw_id=6, describe_id=7, ask_id=8,
)  # fmt: skip
ROWS = 12

# Alone in its process, for a peak is of a whole process. Prints what the model and three steps added to it.
STEPS = """
import json, sys
import torch
from test_memory import ROWS, WORDS, model
from mmdlm.models.adapters import add_lora
from mmdlm.sequence import batch, draw_canvas
from mmdlm.training.masked_loss import MaskedLoss, NoiseSettings, corrupt
full, checkpointing = json.loads(sys.argv[1])
def peak():  # not ru_maxrss, which a child inherits from the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
import peft, transformers.models.llama.modeling_llama
# What peft and the optimizer import when they are first used belongs to the process, not to the step.
small = torch.nn.Sequential(torch.nn.Linear(2, 2))
peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), small)
small(torch.ones(1, 2)).sum().backward()
torch.optim.AdamW([value for value in small.parameters() if value.requires_grad]).step()
before = peak()
predictor = model()
if not full:
    add_lora(predictor, rank=16)
if checkpointing:
    predictor.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
rows = [draw_canvas([9, 10, 11], torch.zeros(256, dtype=torch.long), (16, 16), WORDS)] * ROWS
canvas, valid = batch(rows, pad_id=0)
trained = [value for value in predictor.parameters() if value.requires_grad]
optimizer, loss = torch.optim.AdamW(trained), MaskedLoss(predictor.train())
average = [value.detach().clone() for value in trained]
for step in range(2):
    noised = corrupt(canvas, valid, [0] * ROWS, mask_id=1, settings=NoiseSettings(minimum_t=0.9),
                     generator=torch.Generator().manual_seed(step))
    loss(noised)["image"].backward()
    optimizer.step()
    optimizer.zero_grad()
print(peak() - before, before)
"""


def model() -> MaskPredictor:
    return MaskPredictor(MaskPredictorConfig(SHAPE, WORDS.to_dict(), code_bits=10, image_side=16))


def estimate(full: bool, checkpointing: bool) -> TrainingMemory:
    from mmdlm.models.adapters import lora_parameters

    with torch.device("meta"):
        shape = model()
    trained = None if full else lora_parameters(shape, 16)
    return training_memory(shape, rows=ROWS, length=264, image_tokens=256, trainable=trained,
                           rank=0 if full else 16, gradient_checkpointing=checkpointing)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize(("full", "checkpointing"), [(True, False), (False, True)])
def test_the_estimate_is_within_its_factor_of_the_measured_peak(full, checkpointing, pytestconfig):
    done = subprocess.run(
        [sys.executable, "-c", STEPS, json.dumps([full, checkpointing])],
        cwd=pytestconfig.rootpath / "tests" / "training", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    added, before = map(int, done.stdout.split())
    found = estimate(full, checkpointing)
    assert (added + before) / FACTOR < found.total < (added + before) * FACTOR, (added, before, str(found))
    if full:  # the step itself outweighs what torch imports and keeps for it
        assert added / 2 < found.total - found.process < added * 2, (added, before, str(found))


def test_what_makes_it_less_makes_it_less():
    whole = estimate(True, False)
    assert estimate(True, True).activations < whole.activations
    adapted = estimate(False, False)
    assert adapted.gradients < whole.gradients / 4 and adapted.optimizer == 2 * adapted.gradients
    assert whole.optimizer == 2 * whole.gradients == 2 * whole.average


def test_what_cannot_fit_is_refused_in_one_sentence():
    found = estimate(True, False)
    check_fits(found, torch.device("cpu"), free=2 * found.total)
    with pytest.raises(InputError, match="are free on cpu: lower --train-batch-size"):
        check_fits(found, torch.device("cpu"), free=found.total)

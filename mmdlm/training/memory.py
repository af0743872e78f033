"""What a training run needs in memory, told before it starts: weights, gradients, optimizer, average, activations.

    found = training_memory(model, trainable=..., rows=8, length=284)
    check_fits(found, device)                                     # InputError where it cannot fit

The parts that a step holds are counted from the shapes; what a process with torch needs comes on top as a constant.
The estimate is within a factor of 1.5 of the measured peak (`tests/training/test_memory.py`).

P trunk places (rows x length, folded places counted once), D width, F inner width, H heads, L layers.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor

# A process with torch, transformers and peft in it, once an optimizer has stepped (measured: 830 to 900 MB on Linux).
_PROCESS = 860 * 2**20
_LOSS_ROWS = 1024  # rows of logits that the chunked cross-entropy holds at once
_SPARE = 0.9  # of the free memory: a machine that is filled to the last byte swaps or kills


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by what they are for."""

    weights: int  # those of a teacher too
    gradients: int
    optimizer: int
    average: int
    activations: int
    process: int

    @property
    def total(self) -> int:
        return sum(int(getattr(self, field.name)) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {shown(getattr(self, field.name))}" for field in fields(self))
        return f"about {shown(self.total)}: {parts}"


def training_memory(
    model: MaskPredictor,
    *,
    rows: int,
    length: int,
    trainable: int | None = None,
    rank: int = 0,
    image_tokens: int = 0,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    average: bool = True,
    teacher: bool = False,
    on_cpu: bool = True,
) -> TrainingMemory:
    """The peak of one process that trains `model` on `rows` rows of at most `length` tokens a step.

    trainable: parameters that are trained, default all; rank: of LoRA, 0 for none. image_tokens: of the `length`, how
    many are codes of pictures (they fold). average: a moving average of the trained weights is kept. teacher: so is
    the model as it was, beside all of its weights being trained.
    """
    config = model.trunk.config
    everything = sum(value.numel() * value.element_size() for value in model.parameters())
    trained = sum(value.numel() for value in model.parameters()) if trainable is None else trainable
    added = trainable * 4 if rank and trainable is not None else 0
    fold = model.config.image_fold
    places = rows * (length - image_tokens + image_tokens // fold**2)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    size = 4 if mixed_precision == "no" else 2
    # Saved by a layer for its backward: two norms in and out (float32), q, k, v before and after the rotation, the
    # attention's output, two residuals; gate, up, their activation and product. LoRA adds what its own matrices give.
    adapted = (5 * width + 2 * inner + 7 * rank) * size if rank else 0
    one = places * (width * (4 * 4 + 8 * size) + inner * 4 * size + adapted)
    layer_sum = one * layers if not gradient_checkpointing else places * width * 4 * layers + one
    # Before and after the trunk every token has a place of its own; the loss holds chunks of logits, twice.
    outside = rows * length * width * 4 * 8
    columns = max(model.vocabulary.text_size, model.vocabulary.image_size)
    table = model.vocabulary.table_rows * width * 4 * (2 if model.config.code_bits else 0)
    logits = min(rows * length, _LOSS_ROWS) * columns * 4 * 3
    copies = everything // 2 if mixed_precision != "no" else 0  # autocast's half-precision weights
    return TrainingMemory(
        weights=everything * (1 + teacher) + added + copies,
        gradients=trained * 4,
        optimizer=trained * 8,
        average=trained * 4 * average,
        activations=layer_sum + outside + table + logits,
        process=_PROCESS if on_cpu else 0,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that a process on `device` may still take: of the GPU, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.exists():
        fields = dict(line.split(":", 1) for line in told.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    # elsewhere what the machine has: what others hold is not told without a package for it
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fits(needed: TrainingMemory, device: torch.device, *, free: int | None = None) -> None:
    """Raises InputError where `needed` is more than is free on the device, with what would make it less."""
    free = free_memory(device) if free is None else free
    if needed.total > _SPARE * free:
        raise InputError(
            f"Training needs {needed}; {shown(free)} are free on {device}: lower --train-batch-size, train an adapter "
            "instead of --full, or use --gradient-checkpointing or --mixed-precision bf16."
        )


def shown(count: int) -> str:
    """Bytes as people read them: "3.1 GB", "420 MB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

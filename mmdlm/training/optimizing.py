"""Optimizers and the learning rate over time: AdamW (arXiv 1711.05101), or Muon for the trunk's matrices first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor

LR_SCHEDULERS = ("cosine", "linear", "constant")


@dataclass
class OptimizerSettings:
    """How weights move: part of a training program's settings."""

    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.01
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 200
    lr_end: float = 0.02
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def build_optimizers(model: MaskPredictor, settings: OptimizerSettings) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, peak learning rate): AdamW for everything that is trained, or Muon (torch's own) for the trunk's
    matrices and AdamW for the rest. Raises InputError for another name and where torch has no Muon."""
    matrices = [p for n, p in model.trunk.named_parameters() if p.ndim == 2 and "embed" not in n and p.requires_grad]
    if settings.optimizer == "adamw":
        matrices = []
    elif settings.optimizer != "muon":
        raise InputError(f"optimizer is {settings.optimizer!r}, expected 'adamw' or 'muon'")
    elif not hasattr(torch.optim, "Muon"):
        raise InputError(
            f"optimizer is 'muon', which torch {torch.__version__} lacks: use torch 2.9 or later, or adamw"
        )
    chosen = {id(p) for p in matrices}
    trained = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim == 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim != 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    adamw = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
    optimizers: list[tuple[torch.optim.Optimizer, float]] = [(adamw, settings.learning_rate)]
    if matrices:
        muon = torch.optim.Muon(matrices, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
        optimizers.append((muon, settings.muon_learning_rate))
    return optimizers


def learning_share(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Share of the peak learning rate at `step` of `steps`: linear warm-up, then by lr_scheduler down to `lr_end`.

    Raises InputError for a scheduler that is none of LR_SCHEDULERS.
    """
    if settings.lr_scheduler not in LR_SCHEDULERS:
        raise InputError(f"lr_scheduler is {settings.lr_scheduler!r}, expected one of {', '.join(LR_SCHEDULERS)}")
    if step < settings.lr_warmup_steps:
        return (step + 1) / settings.lr_warmup_steps
    if settings.lr_scheduler == "constant":
        return 1.0
    share = min((step - settings.lr_warmup_steps) / max(steps - settings.lr_warmup_steps, 1), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * share)) if settings.lr_scheduler == "cosine" else 1 - share
    return settings.lr_end + (1 - settings.lr_end) * left

"""The loss of rows that are never trained on: fixed rows, fixed noise, so that steps and runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.training.masked_loss import MaskedLoss, NoiseSettings, corrupt, measured, normalisers
from mmdlm.training.rows import Rows


@torch.no_grad()
def validate(
    model: MaskPredictor, held_out: Sequence[Rows], settings: NoiseSettings, *, rows: int, batch_size: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean losses over about `rows` rows of each source, `held_out_image` and `held_out_text` (of several sources the
    mean by their weights); and their parts as `measured` names them, by source where there are several."""
    step, device = MaskedLoss(model.eval()), model.device
    weights = sum(each.pools[0].weight for each in held_out)
    means = {"held_out_image": 0.0, "held_out_text": 0.0} if held_out else {}
    details: dict[str, float] = {}
    for each in held_out:
        pool, generator = each.pools[0], torch.Generator().manual_seed(0)
        sums, counts, table = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(1).double()
        for number in range(max(rows // batch_size, 1)):
            noised = corrupt(
                *each.batch(number, batch_size),
                mask_id=model.vocabulary.mask_id,
                settings=settings,
                generator=generator,
            )
            found = step(noised.to(device))
            sums += torch.stack([found["text"], found["image"]]).double().cpu()
            counts += normalisers(noised).clamp_min(1)
            table = table + found["table"].cpu()
        text, image = (sums / counts * (pool.weight / weights)).tolist()
        means["held_out_image"] += image
        means["held_out_text"] += text
        prefix = f"held_out/{pool.name}/" if len(held_out) > 1 else "held_out/"
        details |= {prefix + name: value for name, value in measured(table).items()}
    return means, details

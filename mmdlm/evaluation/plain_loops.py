"""The published loops as their papers state them, for a yardstick: nothing is left out that need not be computed.

Each pass is one forward over all places of all rows, padding included, with the head over the whole vocabulary at every
place; guidance is a second full batch in the same forward. They differ from the released programs in two points that
cost nothing and make the tokens comparable: the mask token cannot be drawn, and a place takes ids of its own modality
only (as MMaDA's pictures do). Temperature is 0.

B rows, L places, V ids, V' ids of the modality.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmdlm.evaluation.bench_workloads import Rows, Workload


@torch.no_grad()
def plain(model: nn.Module, work: Workload) -> Iterator[Tensor]:
    """The published loop of a workload; yields the canvas's editable ids [B, E] after every pass."""
    loop = maskgit_guided(model, work) if work.task == "t2i" else low_confidence(model, work)
    editable = work.padded.canvas.editable
    for x in loop:
        yield x[editable].view(len(x), -1)


def low_confidence(model: nn.Module, work: Workload) -> Iterator[Tensor]:
    """LLaDA's semi-autoregressive low-confidence remasking: arXiv:2502.09992, 2.4 and Algorithm 5.

    Confidence is a softmax in float64 over the vocabulary at every place, as released.
    """
    x, editable = work.padded.canvas.ids.clone(), work.padded.canvas.editable
    length = int(editable.sum(dim=1).max())
    first, block = x.shape[1] - length, work.block or length
    start, stop = work.columns
    steps = work.steps // (length // block)
    for end in range(first + block, x.shape[1] + 1, block):
        masks = (x[:, end - block : end] == work.mask_id).sum(dim=1)
        for step in range(steps):
            logits = _forward(model, work.padded, x)[..., start:stop]
            logits[..., work.mask_id - start] = -torch.inf
            drawn = logits.argmax(dim=-1)
            odds = logits.double().softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            open_ = (x == work.mask_id) & editable
            open_[:, end:] = False
            odds = odds.masked_fill(~open_, -torch.inf)
            for row in range(len(x)):
                count = int(masks[row]) // steps + int(step < int(masks[row]) % steps)
                chosen = odds[row].topk(count).indices
                x[row, chosen] = drawn[row, chosen] + start
            yield x


def maskgit_guided(model: nn.Module, work: Workload) -> Iterator[Tensor]:
    """MaskGIT with classifier-free guidance as MMaDA draws pictures: arXiv:2202.04200, 3.2; arXiv:2505.15809.

    Confidence is a softmax over the codes at every place in the logits' type, as released.
    """
    x, places = work.padded.canvas.ids.clone(), work.padded.places()
    start, stop = work.columns
    count = places.shape[1]
    unprompted = None if work.padded_without is None else work.padded_without.canvas.ids.clone()
    for step in range(work.steps):
        logits = _forward(model, work.padded, x, work.padded_without, unprompted)
        if unprompted is not None:
            with_prompt, without = logits.chunk(2)
            logits = work.scale * with_prompt - (work.scale - 1) * without
        logits = logits.gather(1, places.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))[..., start:stop]
        odds = logits.softmax(dim=-1)
        drawn = odds.argmax(dim=-1)
        sure = odds.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        now = x.gather(1, places)
        open_ = now == work.mask_id
        now = torch.where(open_, drawn + start, now)
        sure = sure.masked_fill(~open_, torch.inf)
        # 1e-9: whole numbers (16 cos(pi/3)) must not be lost to the last bit of the cosine
        left = math.floor(count * math.cos(math.pi / 2 * (step + 1) / work.steps) + 1e-9)
        left = max(1, min(int(open_.sum(dim=1).min()) - 1, left)) if step + 1 < work.steps else 0
        ranks = sure.argsort(dim=1, stable=True).argsort(dim=1)
        now = now.masked_fill(ranks < left, work.mask_id)
        x = x.scatter(1, places, now)
        if unprompted is not None:  # both canvases are padded alike: the picture stands in the same places
            unprompted = unprompted.scatter(1, places, now)
        yield x


def _forward(
    model: nn.Module, rows: Rows, x: Tensor, others: Rows | None = None, y: Tensor | None = None
) -> Tensor:
    """Logits [B, L, V] of all places, or [2B, L, V] with the unprompted rows behind."""
    if others is None or y is None:
        masks, positions, grid = rows.mask, rows.canvas.positions, rows.canvas.grid
    else:
        x = torch.cat([x, y])
        seen = [torch.ones_like(part.canvas.ids, dtype=torch.bool)[:, None, None] if part.mask is None else part.mask
                for part in (rows, others)]
        masks = torch.cat(seen)
        positions = torch.cat([rows.canvas.positions, others.canvas.positions])
        grid = torch.cat([rows.canvas.grid, others.canvas.grid])
    return model(x, attention_mask=masks, position_ids=positions, grid=grid).logits

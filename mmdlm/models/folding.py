"""Folding: k x k neighbouring image tokens share a position of the trunk (after Meissonic, arXiv 2410.08261).

Which token goes where depends on the grid alone, so one `Folding` serves every pass over a canvas. It is where what is
asked of a grid is checked, and the only place that makes the host wait for the device.

Shape letters: B rows, L places, W asked places, M places after folding, k the side of a square, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Folding(NamedTuple):
    """How the places of a canvas fold; made by `folding`."""

    side: int
    grid: Tensor  # [B, L, 2], whose plan this is
    leads: Tensor  # int64 [B, M], the leaders' places in order; rows with fewer are filled up by place 0
    group: Tensor  # int64 [B, L], the rank of each place's leader
    members: Tensor  # int64 [B, M, k * k], the places of each square; text leaders repeat themselves
    image: Tensor  # bool [B, M, 1]
    before: Tensor  # int64 [B, M], places before a leader that lead nothing
    real: Tensor | None  # bool [B, M], no filling up; None where no row is filled up
    slot: Tensor  # int64 [B, L], an image token's number in its square, 0 at text

    def rows(self, rows: Tensor) -> Folding:
        """The plan of some rows, bool or int64 [b] of the B."""
        parts: dict[str, Any] = {name: part[rows] for name, part in self._asdict().items() if isinstance(part, Tensor)}
        return self._replace(**parts)

    def hidden(self, hidden: Tensor, fold: torch.nn.Module) -> Tensor:
        """[B, L, D] -> [B, M, D]: squares through `fold`, text as it is."""
        batch, _, width = hidden.shape
        index = self.members.flatten(1).unsqueeze(-1).expand(batch, -1, width)
        taken = hidden.gather(1, index).view(batch, -1, self.side**2 * width)
        return torch.where(self.image, fold(taken), taken[..., :width])

    def positions(self, position_ids: Tensor | None) -> Tensor:
        """[B, L] (default 0 .. L - 1) -> [B, M]: the places that folded away are not counted."""
        at = self.leads if position_ids is None else position_ids.expand(self.group.shape).gather(1, self.leads)
        return (at - self.before).clamp_min(0)

    def mask(self, mask: Tensor | None) -> Tensor | None:
        """bool [B, 1, 1 or L, L] or None -> bool [B, 1, 1 or M, M] or None. ValueError for a float mask."""
        if mask is None:
            return None if self.real is None else self.real[:, None, None]
        if mask.is_floating_point():
            raise ValueError("a folded model got a float mask, expected bool: folded places share what they see")
        leads, (batch, length) = self.leads, self.group.shape
        mask = mask.expand(batch, 1, -1, length)
        mask = mask.gather(3, leads[:, None, None].expand(-1, -1, mask.shape[2], -1))
        if mask.shape[2] > 1:
            mask = mask.gather(2, leads[:, None, :, None].expand(-1, -1, -1, leads.shape[1]))
        return mask if self.real is None else mask & self.real[:, None, None]

    def computed(self, computed: Tensor | None) -> Tensor | None:
        """bool [B, L] -> bool [B, M], True where any place of the square is."""
        if computed is None:
            return None
        return torch.zeros_like(self.leads, dtype=torch.bool).scatter_reduce(1, self.group, computed, "amax")

    def told_apart(self, out: Tensor, at: Tensor, where: Tensor | None, unfold: torch.nn.Module) -> Tensor:
        """The places `where` [B, W], default all, read off out [B, N, D]: place w from row at[:, w]; [B, W, D]."""
        batch, _, width = out.shape
        slot, grid_row = self.slot, self.grid[..., 0]
        if where is not None:
            slot, grid_row = slot.gather(1, where), grid_row.gather(1, where)
        squares = unfold(out).view(batch, -1, width)  # [B, N * k * k, D]
        image = squares.gather(1, (at * self.side**2 + slot).unsqueeze(-1).expand(-1, -1, width))
        text = out.gather(1, at.unsqueeze(-1).expand(-1, -1, width))
        return torch.where((grid_row >= 0).unsqueeze(-1), image, text)


def folding(grid: Tensor, side: int) -> Folding:
    """The plan of `grid` [B, L, 2]: see `fold_plan`, whose errors it raises."""
    leader, leads, group = fold_plan(grid, side)
    members = leads.unsqueeze(-1) + fold_offsets(grid, side, leads)
    image = (grid[..., 0] >= 0).gather(1, leads).unsqueeze(-1)
    before = (~leader).long().cumsum(1).gather(1, leads)
    real = torch.arange(leads.shape[1], device=grid.device) < leader.sum(1, keepdim=True)
    slot = ((grid[..., 0] % side) * side + grid[..., 1] % side).masked_fill(grid[..., 0] < 0, 0)
    return Folding(side, grid, leads, group, members, image, before, None if bool(real.all()) else real, slot)


def picture_widths(grid: Tensor) -> Tensor:
    """Codes per line of the picture each place belongs to: [B, L]; 0 at text places.

    A picture's places lie row by row, so the place of row r and column c is its start + r * width + c.
    """
    row, column = grid.unbind(-1)
    index = torch.arange(grid.shape[1], device=grid.device).expand_as(row)
    # Every place after a picture's (0, 0) shares that start; the widest column seen from it gives the width.
    start = torch.where((row == 0) & (column == 0), index, torch.zeros_like(index)).cummax(1).values
    last = torch.where(row >= 0, column + 1, torch.zeros_like(column))
    return torch.zeros_like(row).scatter_reduce(1, start, last, "amax").gather(1, start) * (row >= 0)


def fold_plan(grid: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which places lead a folded one.

    A text place leads itself; an image place leads its square when its row and column are multiples of `side`.

    Args:
        grid: [B, L, 2], pictures with sides that `side` divides (ValueError otherwise).

    Returns leader bool [B, L]; leads [B, M], the leaders' places in order, rows with fewer padded by place 0; and
    group [B, L], the rank of each place's leader.
    """
    row, column = grid.unbind(-1)
    image = row >= 0
    leader = ~image | ((row % side == 0) & (column % side == 0))
    if int(image.sum()) != int((image & leader).sum()) * side * side:
        raise ValueError(f"a picture's code grid has a side that is no multiple of image_fold {side}: use such a size")
    count = leader.sum(1)
    order = torch.sort((~leader).to(torch.uint8), dim=1, stable=True).indices[:, : int(count.max())]
    real = torch.arange(order.shape[1], device=grid.device) < count.unsqueeze(1)
    index = torch.arange(grid.shape[1], device=grid.device)
    back = (row % side) * picture_widths(grid) + column % side
    rank = leader.long().cumsum(1) - 1
    group = rank.gather(1, torch.where(image, index - back, index))
    return leader, torch.where(real, order, torch.zeros_like(order)), group


def fold_offsets(grid: Tensor, side: int, leads: Tensor) -> Tensor:
    """Distance from each leader to the members of its square, row by row: [B, M, side * side]; zero at text."""
    step = torch.arange(side, device=grid.device)
    width = picture_widths(grid).gather(1, leads)[:, :, None, None]
    offsets = step.view(1, 1, side, 1) * width + step.view(1, 1, 1, side)
    return (offsets * (width > 0)).flatten(2)

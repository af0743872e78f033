"""Several rules over one canvas: each kind of place, or each row, under a policy and a draw of its own.

The loop knows nothing of it: a mixture is a policy, or a draw, that asks others, each about its own places only. They
see a View as the loop would have made it for those places alone, so a rule gives the same answer in a mixture as by
itself, noise included.

Shape letters: B rows, L positions, W asked places, w those of one kind, V columns of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import Decision, Policy, View
from mmdlm.sampling.draws import Draw


def by_modality(
    modality: Tensor, masked: Tensor, *, text: Policy, image: Policy, block_of: Tensor | None = None
) -> Policy:
    """`text` decides about the places where modality is 0, `image` about those where it is 1.

    modality: int [B, L], a canvas's (UniDisc, arXiv:2503.20853; MMaDA, arXiv:2505.15809, decode each so).
    masked: bool [B, L], what is to be filled when denoise begins: a rule that plans its counts (`maskgit`, `top_k`)
        shares its own places out over the passes. block_of: int [B, L], the blocks where denoise is given such.
    """
    if modality.shape != masked.shape or (block_of is not None and block_of.shape != masked.shape):
        raise ValueError(f"by_modality got modality {tuple(modality.shape)} for masked {tuple(masked.shape)}, expected "
                         "[B, L] each")

    def policy(view: View) -> Decision:
        kind_of = modality.gather(1, view.where)
        here = masked
        if block_of is not None:
            blocks = block_of.gather(1, view.where).masked_fill(~view.editable, -1)
            here = masked & (block_of == blocks.amax(dim=1, keepdim=True))
        decisions = []
        for kind, rule in ((0, text), (1, image)):
            asked = view.editable & (kind_of == kind)
            order, part = _only(view, asked)
            part = part._replace(n_start=(here & (modality == kind)).sum(dim=1))
            decisions.append(_spread(rule(part), order, asked))
        return _merge(decisions)

    return policy


def draw_by_modality(modality: Tensor, *, text: Draw, image: Draw) -> Draw:
    """`text` draws at the places where modality [B, L] is 0, `image` where it is 1."""

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        kind_of = modality.gather(1, where)
        columns, sure = torch.zeros_like(where), torch.zeros(where.shape, dtype=logits.dtype, device=logits.device)
        for kind, rule in ((0, text), (1, image)):
            mine = asked & (kind_of == kind)
            order = _order(mine)
            picked = logits.gather(1, order.unsqueeze(-1).expand(*order.shape, logits.shape[-1]))
            found = rule(picked, where.gather(1, order), mine.gather(1, order), generators)
            columns = torch.where(mine, columns.scatter(1, order, found[0]), columns)
            sure = torch.where(mine, sure.scatter(1, order, found[1].to(sure.dtype)), sure)
        return columns, sure

    return draw


def per_row(policies: Sequence[Policy]) -> Policy:
    """Row b under policies[b]: requests with other settings share a batch. InputError where the rows are not as many.

    The same policy object in several rows is asked once for all of them.
    """

    def policy(view: View) -> Decision:
        _check_rows(len(policies), len(view.x))
        decisions = []
        for rows in _groups(policies, view.x.device):
            parts: dict[str, Any] = {
                name: part[rows] for name, part in view._asdict().items() if isinstance(part, Tensor)
            }
            here = view._replace(**parts, generator=[view.generator[row] for row in rows.tolist()])
            decisions.append((rows, policies[int(rows[0])](here)))
        return _merge([_placed(decision, rows, view) for rows, decision in decisions])

    return policy


def draw_per_row(draws: Sequence[Draw]) -> Draw:
    """Row b by draws[b]. InputError where the rows are not as many."""

    def draw(
        logits: Tensor, where: Tensor, asked: Tensor, generators: list[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        _check_rows(len(draws), len(where))
        columns, sure = torch.zeros_like(where), torch.zeros(where.shape, dtype=logits.dtype, device=logits.device)
        for rows in _groups(draws, where.device):
            chosen = [generators[row] for row in rows.tolist()]
            columns[rows], found = draws[int(rows[0])](logits[rows], where[rows], asked[rows], chosen)
            sure[rows] = found.to(sure.dtype)
        return columns, sure

    return draw


def _order(asked: Tensor) -> Tensor:
    """The asked places first, in order of position, then others of the row: [B, w], w the widest row's."""
    return (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(int(asked.sum(dim=1).max()), 1)]


def _only(view: View, asked: Tensor) -> tuple[Tensor, View]:
    """The view of the asked places [B, W] alone, packed to the left as the loop packs them, and where they were."""
    order = _order(asked)
    wide = order.unsqueeze(-1).expand(*order.shape, view.logits.shape[-1])
    mine = asked.gather(1, order)
    return order, view._replace(
        x=view.x.gather(1, order),
        x0=view.x0.gather(1, order),
        confidence=view.confidence.gather(1, order).masked_fill(~mine, 0.0),
        logits=view.logits.gather(1, wide),
        masked=view.masked.gather(1, order) & mine,
        editable=mine,
        where=view.where.gather(1, order),
    )


def _spread(decision: Decision, order: Tensor, asked: Tensor) -> Decision:
    """A decision over packed places [B, w] -> over all of them [B, W]; nothing at places not asked."""
    none = torch.zeros_like(asked)
    write = none.scatter(1, order, decision.write) & asked
    remask = None if decision.remask is None else none.scatter(1, order, decision.remask) & asked
    if decision.insert is not None:
        raise ValueError("a rule of a mixture inserts places, expected rules that write and remask: use it alone")
    return Decision(write, remask, settled=decision.settled)


def _placed(decision: Decision, rows: Tensor, view: View) -> Decision:
    """A decision about some rows -> about all, nothing in the others."""
    if decision.insert is not None:
        raise ValueError("a rule of a mixture inserts places, expected rules that write and remask: use it alone")
    none = torch.zeros_like(view.editable)
    write = none.index_copy(0, rows, decision.write)
    remask = None if decision.remask is None else none.index_copy(0, rows, decision.remask)
    # other rows agree with whatever their own rules say; a rule that says nothing uses all its steps
    settled = torch.ones_like(none[:, 0])
    said = torch.zeros_like(rows, dtype=torch.bool) if decision.settled is None else decision.settled
    return Decision(write, remask, settled=settled.index_copy(0, rows, said))


def _merge(decisions: Sequence[Decision]) -> Decision:
    """Decisions about different places of one view -> one. A row is settled when every rule says so."""
    write = torch.stack([decision.write for decision in decisions]).any(dim=0)
    masks = [decision.remask for decision in decisions if decision.remask is not None]
    settled = [decision.settled for decision in decisions if decision.settled is not None]
    return Decision(
        write,
        torch.stack(masks).any(dim=0) if masks else None,
        settled=torch.stack(settled).all(dim=0) if len(settled) == len(decisions) else None,
    )


def _groups(rules: Sequence[object], device: torch.device) -> list[Tensor]:
    """The rows of each rule, the same object counted as one."""
    rows: dict[int, list[int]] = {}
    for row, rule in enumerate(rules):
        rows.setdefault(id(rule), []).append(row)
    return [torch.tensor(of_one, device=device) for of_one in rows.values()]


def _check_rows(given: int, rows: int) -> None:
    if given != rows:
        raise InputError(f"got {given} policies or draws for {rows} rows, expected one for each row: pass as many.")

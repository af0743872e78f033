"""denoise(): the only loop. It fills masked places of a canvas, a few per pass, until none is left.

Masked diffusion's reverse process (MDLM, arXiv:2406.07524; LLaDA, arXiv:2502.09992; MaskGIT, arXiv:2202.04200): each
pass asks a predictor for the tokens behind the masks and a policy which of them to write. What differs between the
published samplers is the policy, the draw and the predictor; all three are callables and the loop knows none of them.

Shape letters: B rows, L positions, W asked places (the widest row's), V columns of the logits, K blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.draws import Draw, greedy, row_generators

# (ids [B, L], where [B, W]: the positions wanted) -> logits [B, W, V]
Predictor = Callable[[Tensor, Tensor], Tensor]
# The id of a place that a row does not have, where rows of unlike lengths share a canvas; never editable, no id of any
# vocabulary: a predictor for such canvases has to hide these places from the model (`mmdlm.sampling.lengths.ragged`).
ABSENT = -1


class View(NamedTuple):
    """What a policy may look at: the asked places of this pass, packed to the left of each row in order of position.

    Rows with fewer places than the widest are filled up with other positions of theirs; there `editable` and `masked`
    are False and `confidence` is 0. Only with `revise=True` are written places asked too: editable and not masked.
    """

    x: Tensor  # [B, W] the ids as they stand
    x0: Tensor  # [B, W] the ids just drawn
    confidence: Tensor  # [B, W] their probability under the model
    logits: Tensor  # [B, W, V] float32 or better, the mask token's column at -inf
    masked: Tensor  # [B, W] bool: may be written
    editable: Tensor  # [B, W] bool: asked, and no filling
    where: Tensor  # [B, W] their positions
    n_start: Tensor  # [B] masked places when the row's present block began
    step: Tensor  # [B] passes the row has made in this block, from 0
    steps: Tensor  # [B] passes it has for this block
    generator: list[torch.Generator]  # one per row
    first_id: int = 0  # the id of the logits' first column


class Decision(NamedTuple):
    """What a policy answers: the places to write x0 into and, with `revise=True`, those to mask again; [B, W] bool.

    `insert` int64 [B, W]: so many new masks right after the place (DAEDAL, arXiv:2508.00819); see `longest`.
    `settled` [B] bool, with `revise=True`: the row's block may end before its steps are used up if no mask is left.
    """

    write: Tensor
    remask: Tensor | None = None
    insert: Tensor | None = None
    settled: Tensor | None = None


Policy = Callable[[View], Decision]


class State(NamedTuple):
    """The canvas after one pass. Every State has tensors of its own: keeping them all is safe.

    L grows where a policy inserts; a row shorter than the widest then ends in ABSENT places.
    """

    x: Tensor  # [B, L] ids, masks included
    x0: Tensor  # [B, L] the best guess everywhere: x where it is written, else the last draw
    confidence: Tensor  # [B, L] float32: 1 where given, the probability at which it was last drawn elsewhere, 0 before
    written: Tensor  # [B, L] bool: written in this pass
    step: int  # passes made so far
    done: Tensor  # [B] bool: nothing left to do in the row
    forwards: int  # calls of the predictor so far


def denoise(
    predict: Predictor,
    x: Tensor,
    policy: Policy,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int | Tensor | None,
    block: int | Tensor | None = None,
    draw: Draw = greedy,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    first_id: int = 0,
    revise: bool = False,
    keep_masks: bool = False,
    longest: int | Tensor | None = None,
) -> Iterator[State]:
    """Fill the masked editable places of x [B, L]; yield a State after each pass (just one if nothing is masked).

    `editable` [B, L] bool: everything else comes back as it was. Rows are independent: each has its own steps, blocks,
    generator and end, and its result depends neither on its neighbours nor on padding (if the predictor's does not).

    `steps`: passes per row, int or [B] >= 1. With blocks they are shared out evenly over the row's blocks that hold
    masks, the first ones getting the remainder. None: as many as there are masks. On the last pass of a block all that
    is still masked is written whatever the policy says, so the loop ends and no mask remains.

    `block`: None, or the length of a block: the row's k-th editable place (from 0) belongs to block k // block, and
    blocks are filled one after the other (semi-autoregressive, arXiv:2502.09992 2.4); or the index >= 0 of every
    position's block, [B, L].

    `draw`: `greedy`, `categorical(...)`. `generator`: one per row, or one that is split, or None (torch's global one);
    see `row_generators`. `first_id`: the id of the logits' first column, where the predictor is restricted.

    `revise`: ask written editable places of the block too, so that a policy may remask or rewrite them; a row
    then uses all its steps, unless the policy calls it settled. `keep_masks`: as LLaDA's and MMaDA's released loops,
    the mask token may be predicted; a place that got it counts as written and stays masked, nothing is forced on the
    last pass, and masks may remain.

    `longest`: the most places a row may have, int or [B], for policies that insert; such a policy also needs
    `steps=None`. A row that is full takes no more, and what an insertion pushes past `longest` is cut off at the row's
    end. The blocks of a row that grew are counted anew, and so are its steps.

    InputError where steps or block are out of range or steps do not reach for the blocks; ValueError for shapes.
    """
    loop = passes(
        x, policy, editable=editable, mask_id=mask_id, steps=steps, block=block, draw=draw, generator=generator,
        first_id=first_id, revise=revise, keep_masks=keep_masks, longest=longest,
    )
    for asked in loop:
        state = asked if isinstance(asked, State) else loop.send(predict(*asked))
        assert isinstance(state, State)  # logits are always answered with one
        yield state


class Asked(NamedTuple):
    """What `passes` wants to know next: logits [B, W, V] at the positions `where` [B, W] of the canvas `x` [B, L]."""

    x: Tensor
    where: Tensor


def passes(
    x: Tensor,
    policy: Policy,
    *,
    editable: Tensor,
    mask_id: int,
    steps: int | Tensor | None,
    block: int | Tensor | None = None,
    draw: Draw = greedy,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    first_id: int = 0,
    revise: bool = False,
    keep_masks: bool = False,
    longest: int | Tensor | None = None,
) -> Generator[Asked | State, Tensor, None]:
    """`denoise` turned inside out: it yields what it asks, is sent the logits and answers that with a State.

    For whoever lets several loops share one forward of the model (`mmdlm.serving.engine`). A canvas without masks
    yields its one State unasked. Everything else is as in `denoise`, which is this with a predictor.
    """
    block_of, counts, shares = _plan(x, editable, mask_id, steps, block)
    generators = row_generators(generator, x.shape[0], x.device)
    masked = editable & (x == mask_id)
    x0, confidence, made = x, (~masked).float(), 0
    progress = _advance(None, masked, block_of, counts, shares, revise)
    shut = torch.tensor([mask_id - first_id], device=x.device)
    while True:
        reached = (block_of <= progress.block.unsqueeze(1)) & ~progress.done.unsqueeze(1)
        asked = reached & (editable if revise else masked)
        # a row that is not done asks something: the one number of a pass that the host waits for also ends the loop
        width = int(asked.sum(dim=1).max())
        if width == 0:
            break
        # A stable sort packs the asked places to the left in order of position and fills up with other places of the
        # row, never twice the same: writing back cannot collide.
        where = (~asked).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        asked, open_, now = asked.gather(1, where), (asked & masked).gather(1, where), x.gather(1, where)

        logits = yield Asked(x, where)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if not keep_masks and 0 <= mask_id - first_id < logits.shape[-1]:
            logits = logits.index_fill(-1, shut, -torch.inf)
        columns, sure = draw(logits, where, asked, generators)
        drawn = columns + first_id

        n_start, step, n_steps = progress[1:4]
        view = View(now, drawn, sure, logits, open_, asked, where, n_start, step, n_steps, generators, first_id)
        write, remask, insert, settled = policy(view)
        write, remask = write & asked, torch.zeros_like(asked) if remask is None else remask & asked & ~write
        if not keep_masks:
            last = (step + 1 >= n_steps).unsqueeze(1)
            write, remask = write | (open_ & last), remask & ~last

        x = x.scatter(1, where, torch.where(write, drawn, torch.where(remask, mask_id, now)))
        fresh = write | open_
        x0 = x0.scatter(1, where, torch.where(fresh, drawn, x0.gather(1, where)))
        confidence = confidence.scatter(1, where, torch.where(fresh, sure.float(), confidence.gather(1, where)))
        written = torch.zeros_like(masked).scatter(1, where, write)
        if insert is not None:
            if steps is not None or longest is None:
                raise InputError("the policy inserts places, expected steps=None and longest, a row's most places: "
                                 "pass both to denoise")
            extra = torch.zeros_like(x).scatter(1, where, insert.masked_fill(~asked, 0))
            grown, spread = _spread(x, extra, longest)
            x, x0, confidence = spread(x, mask_id, ABSENT), spread(x0, mask_id, ABSENT), spread(confidence, 0, 1)
            written, editable = spread(written, False, False), spread(editable, True, False)
            block = spread(block, None, 0) if isinstance(block, Tensor) else block
            plan = _plan(x, editable, mask_id, None, block)
            block_of, counts, shares, progress = _replan(grown, progress, (counts, shares), plan)
        masked, made = editable & (x == mask_id), made + 1
        progress = _advance(progress, masked, block_of, counts, shares, revise, settled)
        yield State(x, x0, confidence, written, made, progress.done, made)
    if made == 0:
        yield State(x, x0, confidence, torch.zeros_like(masked), 0, progress.done, 0)


class _Progress(NamedTuple):
    """Where each row stands, [B] each; `block` is the number of blocks when the row is done."""

    block: Tensor
    n_start: Tensor
    step: Tensor
    steps: Tensor
    done: Tensor


def _advance(
    before: _Progress | None,
    masked: Tensor,
    block_of: Tensor,
    counts: Tensor,
    shares: Tensor,
    revise: bool,
    settled: Tensor | None = None,
) -> _Progress:
    """Count the pass just made, and take the rows whose block is over to their next block that holds masks.

    A block is over when its steps are used up, or when nothing in it is masked and, where written places are revised,
    the policy calls it settled.
    """
    end = counts.shape[1] - 1
    if before is None:
        block = step = torch.full_like(counts[:, 0], -1)
        over = torch.ones_like(block, dtype=torch.bool)
    else:
        block, step = before.block, before.step + 1
        over = step >= before.steps
        if settled is not None or not revise:
            filled = ~(masked & (block_of <= block.unsqueeze(1))).any(dim=1)
            over = over | (filled & settled if revise and settled is not None else filled)
    later = masked & (block_of > block.unsqueeze(1))
    block = torch.where(over, block_of.masked_fill(~later, end).amin(dim=1), block)
    at = block.unsqueeze(1)
    return _Progress(
        block, counts.gather(1, at).squeeze(1), step.masked_fill(over, 0), shares.gather(1, at).squeeze(1), block == end
    )


def _plan(
    x: Tensor, editable: Tensor, mask_id: int, steps: int | Tensor | None, block: int | Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The block of each position [B, L], and per block the masks at the start and the steps, [B, K+1] each.

    The last column stands for "no block left" and holds zeros.
    """
    if x.dim() != 2 or editable.shape != x.shape or editable.dtype != torch.bool:
        raise ValueError(f"x is {tuple(x.shape)}, editable {editable.dtype} {tuple(editable.shape)}: pass x [B, L] "
                         "and editable bool [B, L]")
    if isinstance(block, Tensor):
        if block.shape != x.shape:
            raise ValueError(f"block is {tuple(block.shape)} for x {tuple(x.shape)}: pass a block index per position")
        if bool((block < 0).any()):
            raise InputError(f"block has the index {int(block.min())}, expected 0 or more: number the blocks from 0")
        block_of = block
    elif block is None:
        block_of = torch.zeros_like(x)
    elif block < 1:
        raise InputError(f"block is {block}, expected a length of 1 or more: leave it out to fill all places together")
    else:
        # by rank among the row's editable places, not by position: padding and given text do not move the borders
        block_of = (editable.long().cumsum(dim=1) - 1).clamp(min=0) // block

    masked = editable & (x == mask_id)
    counts = torch.zeros(x.shape[0], int(block_of.max()) + 2, dtype=torch.long, device=x.device)
    counts = counts.scatter_add(1, block_of, masked.long())
    if steps is None:
        return block_of, counts, counts
    total = torch.as_tensor(steps, device=x.device)
    if total.dim() > 0 and total.shape != x.shape[:1]:
        raise ValueError(f"steps is {tuple(total.shape)} for {x.shape[0]} rows: pass an int or one per row")
    total = total.expand(x.shape[0]).unsqueeze(1)
    filled = counts > 0
    needed = filled.sum(dim=1, keepdim=True)
    short = total < needed.clamp(min=1)
    if bool(short.any()):
        raise InputError(f"steps is {int(total[short].min())} for {int(needed[short].max())} blocks, expected one or "
                         "more for each block: raise steps or the block length")
    rank = filled.long().cumsum(dim=1) - 1
    shares = total // needed.clamp(min=1) + (rank < total % needed.clamp(min=1)).long()
    return block_of, counts, shares.masked_fill(~filled, 0)


# ---------------------------------------------------------------- rows that grow

# (part [B, L], its value at inserted places or None for that of the place before, its value at absent ones) -> [B, L']
_Spread = Callable[[Tensor, float | None, float], Tensor]


def _spread(x: Tensor, extra: Tensor, longest: int | Tensor) -> tuple[Tensor, _Spread]:
    """Which rows grow [B] bool, and what moves any [B, L] tensor to the places [B, L'] after `extra` int [B, L] more.

    Absent places at a row's end make room, those at its start stay, so that a prompt padded on the left does not move.
    """
    present = x != ABSENT
    size = present.sum(dim=1)
    limit = torch.as_tensor(longest, device=x.device).expand_as(size)
    extra = extra * (present & (size < limit).unsqueeze(1))
    kept = present.flip(1).cumsum(dim=1).flip(1) > 0  # up to the row's last present place
    ends = ((1 + extra) * kept).cumsum(dim=1)
    length = ends[:, -1].minimum((limit + (kept & ~present).sum(dim=1)).maximum(kept.sum(dim=1)))
    places = torch.arange(int(length.max()), device=x.device).expand(x.shape[0], -1).contiguous()
    source = torch.searchsorted(ends, places, right=True).clamp(max=x.shape[1] - 1)
    inserted = F.pad(source[:, 1:] == source[:, :-1], (1, 0))
    missing = places >= length.unsqueeze(1)

    def spread(part: Tensor, new: float | None, absent: float) -> Tensor:
        moved = part.gather(1, source)
        moved = moved if new is None else moved.masked_fill(inserted, new)
        return moved.masked_fill(missing, absent)

    return extra.any(dim=1), spread


def _replan(
    grown: Tensor, progress: _Progress, before: tuple[Tensor, Tensor], plan: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, _Progress]:
    """The new plan for the rows that grew, the old one for the others: a row must not feel that its neighbour grew."""
    block_of, counts, shares = plan
    width = max(before[0].shape[1], counts.shape[1])

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        new, old = F.pad(new, (0, width - new.shape[1])), F.pad(old, (0, width - old.shape[1]))
        return torch.where(grown.unsqueeze(1), new, old)

    # a row that is before its first block and out of steps: _advance takes it to its first block that holds masks
    block, steps = progress.block.masked_fill(grown, -1), progress.steps.masked_fill(grown, 0)
    progress = progress._replace(block=block, steps=steps)
    return block_of, chosen(counts, before[0]), chosen(shares, before[1]), progress

"""One training step of masked diffusion: rows -> what the model sees and is asked -> sums of losses, and their parts.

    corrupt(rows, ...)          rows of clean ids -> NoisedRows: masked ids, targets, weights
    MaskedLoss(model)(noised)   sums over the supervised places (MDLM arXiv:2406.07524, LLaDA arXiv:2502.09992), and a
                                table of nats by source, modality and share masked
    measured(table, ...)        that table as numbers for a log

A step's rows are one batch, whoever computes them: any number of processes and of accumulated parts gives the same
loss and the same gradient, because noise is drawn for the whole batch and the normalisers are counted over all of it.

B rows, L positions, S sources of data, K buckets of masked shares.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdlm import attention
from mmdlm.corruption import mask
from mmdlm.models.adapters import without_adapters
from mmdlm.models.mask_predictor import MaskPredictor
from mmdlm.models.packed_attention import BY_DOCUMENT
from mmdlm.objectives import Taught, linear_cross_entropy_with_nats, supervised_places
from mmdlm.schedules import Schedule, by_modality, sample_t, schedule_by_name
from mmdlm.sequence import IMAGE, Canvas

BUCKETS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the share masked
MODALITIES = ("text", "image")  # as `modality` counts them


@dataclass
class NoiseSettings:
    """How much is hidden: part of a training program's settings."""

    image_schedule: str = "maskgit"
    text_schedule: str = "linear"
    minimum_t: float = 0.02


@dataclass(frozen=True)
class NoisedRows:
    """Rows as the model sees them and as it is asked; each field [B, L], grid [B, L, 2].

    No tuple, on purpose: FSDP casts every float tensor that it finds in a tuple to bfloat16, the weights of the loss
    too; what it does not know it leaves alone.
    """

    ids: Tensor  # int64: x_t
    targets: Tensor  # int64: x0
    supervised: Tensor  # bool: in the loss
    weight: Tensor  # float: in the loss, 0 where not supervised
    bound_weight: Tensor  # float: in the likelihood bound, likewise
    share: Tensor  # float: 1 - alpha(t), the probability of being masked
    corruptible: Tensor  # bool
    modality: Tensor  # int64
    positions: Tensor  # int64
    grid: Tensor  # int64 [B, L, 2]
    source: Tensor  # int64: which source of data
    documents: Tensor  # int64: which row a place came from, -1 at padding
    packed: bool = False

    def to(self, device: torch.device) -> NoisedRows:
        return self._each(lambda part: part.to(device))

    def parts(self, count: int) -> Iterator[NoisedRows]:
        """`count` parts of as many rows each (the last may have fewer), without columns that are padding only."""
        for rows in torch.arange(len(self.ids)).chunk(count):
            part = self._each(lambda field, rows=rows: field[rows[0] : rows[-1] + 1])  # type: ignore[misc]
            length = int((part.documents >= 0).sum(1).max())
            yield part if length == part.ids.shape[1] else part._each(lambda field, n=length: field[:, :n])

    def _each(self, change) -> NoisedRows:  # type: ignore[no-untyped-def]
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(part) for name, part in found.items() if isinstance(part, Tensor)})


def corrupt(
    canvas: Canvas,
    valid: Tensor,
    source: Sequence[int],
    *,
    mask_id: int,
    settings: NoiseSettings,
    generator: torch.Generator,
    share: tuple[int, int] = (0, 1),
) -> NoisedRows:
    """Masks a batch of rows [B, L], padded on the right, as the schedules say; at least one place of every row.

    share: (n, of) where these rows are the n-th part of `of` equal ones of a batch: the noise is that part of the
    batch's, so every part has to be padded to the same L. source: which source of data each of the B rows is from.
    """
    number, parts = share
    rows = len(canvas.ids)
    t = sample_t(rows * parts, generator=generator, minimum=settings.minimum_t)[number * rows : (number + 1) * rows]
    torch.rand((number * rows, canvas.ids.shape[1]), generator=generator)  # the noise of the parts before this one
    text, image = schedule_by_name(settings.text_schedule), schedule_by_name(settings.image_schedule)
    schedule = by_modality(canvas.modality, text=text, image=image)
    corrupted = mask(
        canvas.ids,
        t.to(canvas.ids.device),
        corruptible=canvas.editable,
        mask_id=mask_id,
        schedule=schedule,
        generator=generator,
        at_least_one=True,
    )
    bound = by_modality(canvas.modality, text=_of_the_bound(text), image=_of_the_bound(image)).weight(t)
    numbers = torch.arange(rows)[:, None].expand_as(canvas.ids)
    return NoisedRows(
        ids=corrupted.x_t,
        targets=canvas.ids,
        supervised=corrupted.supervised,
        weight=corrupted.weight,
        bound_weight=bound.masked_fill(~corrupted.supervised, 0.0),
        share=1 - schedule.alpha(t),
        corruptible=canvas.editable,
        modality=canvas.modality,
        positions=canvas.positions,
        grid=canvas.grid,
        source=torch.as_tensor(source)[:, None].expand_as(canvas.ids),
        documents=torch.where(valid, numbers, -1),
    )


def _of_the_bound(schedule: Schedule) -> Schedule:
    """The schedule with the weight of the likelihood bound, where training leaves it out."""
    return schedule_by_name("cosine" if schedule.name == "maskgit" else schedule.name.removeprefix("unweighted_"))


def pack(noised: NoisedRows, length: int, *, image_fold: int = 1) -> NoisedRows:
    """Puts several short rows into one of at most `length` places, each seeing its own document only; a row that is
    longer than `length` stays alone. First fit, longest rows first. The model's loss stays what it was.

    image_fold: the model's. A folded model takes off a place's position all folded places before it, those of earlier
    documents in the row too: they are added here.
    """
    rows, width = noised.ids.shape
    lengths = (noised.documents >= 0).sum(1).tolist()
    folded = ((noised.modality == IMAGE).sum(1) * (image_fold**2 - 1) // image_fold**2).tolist()
    bins: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(rows), key=lambda row: -lengths[row]):
        at = next((n for n, left in enumerate(room) if left >= lengths[row]), None)
        if at is None:
            at = len(bins)
            bins.append([])
            room.append(max(length, lengths[row]))
        bins[at].append(row)
        room[at] -= lengths[row]
    index = torch.full((len(bins), max(sum(lengths[row] for row in rows_) for rows_ in bins)), -1)
    shift = torch.zeros_like(index)
    for at, chosen in enumerate(bins):
        start = gone = 0
        for row in chosen:
            end = start + lengths[row]
            index[at, start:end] = torch.arange(lengths[row]) + row * width
            shift[at, start:end] = gone
            start, gone = end, gone + folded[row]
    empty = index < 0
    moved = noised._each(lambda part: part.flatten(0, 1)[index.clamp_min(0)])
    return replace(
        moved,
        supervised=moved.supervised & ~empty,
        corruptible=moved.corruptible & ~empty,
        weight=moved.weight.masked_fill(empty, 0.0),
        bound_weight=moved.bound_weight.masked_fill(empty, 0.0),
        modality=moved.modality.masked_fill(empty, 0),
        positions=(moved.positions + shift).masked_fill(empty, 0),
        grid=moved.grid.masked_fill(empty[..., None], -1),
        documents=moved.documents.masked_fill(empty, -1),
        packed=True,
    )


def normalisers(noised: NoisedRows) -> Tensor:
    """By how much each modality's sum is divided, float64 [2] as MODALITIES: images by the number of masked places
    (MaskGIT), text by the length of the answers (LLaDA, equation 5)."""
    image = (noised.supervised & (noised.modality == IMAGE)).sum()
    text = (noised.corruptible & (noised.modality != IMAGE)).sum()
    return torch.stack([text, image]).double()


def per_written_token(noised: NoisedRows, end_id: int) -> NoisedRows:
    """The rows with each one's text weighed by its written tokens (words and one end) instead of by its places.

    An answer area is as long as the longest answer, so a "yes" is one token of sixteen and hardly counts beside a
    caption of ten. The weights of a row of L text places, n of them written, are multiplied by L / n.
    """
    text = noised.corruptible & (noised.modality != IMAGE)
    places = text.sum(1, keepdim=True)
    written = (text & (noised.targets != end_id)).sum(1, keepdim=True) + 1
    factor = places.clamp_min(1) / torch.minimum(written, places.clamp_min(1))
    return replace(noised, weight=torch.where(text, noised.weight * factor, noised.weight))


class Lesson(NamedTuple):
    """Rows that are not to be learned but kept: their target is what a teacher says, the model before its training.

    Learning without forgetting (arXiv:1606.09282): where the model says what it said, such a row has no gradient, while
    the same row as data would be learned by heart, its mistakes included.

    What it says alone is a weak hold: near the teacher's odds their cross entropy is flat, and words decided by a hair
    come out otherwise. So its last hidden states are held too, by `closeness` times their squared distance from the
    teacher's, as a share of these (arXiv:1412.6550, arXiv:1607.00122), weighed and summed as the odds are.
    """

    sources: tuple[int, ...]  # whose rows
    teacher: MaskPredictor | None = None  # None: the model itself without its adapter
    new_words: int = 0  # the last text ids, of which the teacher knows nothing
    closeness: float = 0.0


def lesson_for(
    keep: Sequence[bool],
    model: MaskPredictor,
    *,
    copied: bool,
    new_words: Sequence[str] = (),
    closeness: float = 0.0,
) -> Lesson | None:
    """The lesson of the sources that are to be kept, None where there are none. copied: the teacher is a copy of
    `model` as it stands, for all of its weights will change; else the model without its adapter."""
    sources = tuple(number for number, kept in enumerate(keep) if kept)
    teacher = copy.deepcopy(model) if copied and sources else None
    return Lesson(sources, teacher, len(new_words), closeness) if sources else None


class MaskedLoss(nn.Module):
    """The model and its loss as one module: what data-parallel wrappers wrap, for under FSDP the head's weights are
    whole inside `forward` only."""

    def __init__(self, model: MaskPredictor, lesson: Lesson | None = None):
        super().__init__()
        self.model, self.lesson = model, lesson
        self.teacher = None if lesson is None or lesson.teacher is None else lesson.teacher.requires_grad_(False)

    def forward(self, noised: NoisedRows, sources: int = 1) -> dict[str, Tensor]:
        """{"text", "image": sum of the weighted cross entropies of the supervised places, and of a lesson's distances,
        "table": float64 [4, S, 2, K], see `measured`}. The head runs over those places and their modality's columns
        only, in chunks."""
        where = supervised_places(noised.supervised)
        source = noised.source.gather(1, where)
        parts = self._parts(noised, where, source)  # before the model's own pass: a teacher's needs no gradient
        hidden = _hidden(self.model, noised, where)
        asked = noised.supervised.gather(1, where)
        targets, weights = noised.targets.gather(1, where), noised.weight.gather(1, where)
        bound, share = noised.bound_weight.gather(1, where), noised.share.gather(1, where)
        is_image = noised.modality.gather(1, where) == IMAGE
        vocabulary = self.model.vocabulary
        table = _places(noised, sources)
        losses: dict[str, Tensor] = {}
        for kind, name, of_kind, columns in (
            (1, "image", asked & is_image, vocabulary.image_columns),
            (0, "text", asked & ~is_image, vocabulary.text_columns),
        ):
            head = self.model.head_rows(columns)
            for part, said in parts:
                chosen = of_kind & part
                taught = None if said is None else self._taught(said[chosen], columns)
                loss, nats = linear_cross_entropy_with_nats(
                    hidden[chosen], head, targets[chosen] - columns[0], weights[chosen], taught=taught
                )
                if said is not None and self.lesson and self.lesson.closeness:
                    far = _distances(hidden[chosen], said[chosen])
                    loss = loss + self.lesson.closeness * (far * weights[chosen]).sum()
                losses[name] = losses[name] + loss if name in losses else loss
                at = _cell(source[chosen], kind, share[chosen])
                nats = nats.to(table.dtype)
                for row, values in enumerate((nats, nats * bound[chosen], torch.ones_like(nats))):
                    table[row].view(-1).index_add_(0, at, values)
        return losses | {"table": table}

    def _parts(self, noised: NoisedRows, where: Tensor, source: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """(places bool [B, W], what the teacher has to say there [B, W, D], None for the data's own targets)."""
        every = torch.ones_like(source, dtype=torch.bool)
        if self.lesson is None:
            return [(every, None)]
        taught = torch.isin(source, source.new_tensor(self.lesson.sources))
        rows = taught.any(dim=1)
        if not bool(rows.any()):
            return [(every, None)]
        mine = noised._each(lambda part: part[rows])
        with torch.no_grad():
            if self.teacher is not None:
                found = _hidden(self.teacher, mine, where[rows])
            else:
                with without_adapters(self.model):
                    found = _hidden(self.model, mine, where[rows])
        said = found.new_zeros((*where.shape, found.shape[-1]))
        said[rows] = found
        return [(~taught, None), (taught, said)]

    def _taught(self, said: Tensor, columns: tuple[int, int]) -> Taught:
        """What the teacher says [N, D] as odds over the columns."""
        end, new = self.model.vocabulary.text_size, self.lesson.new_words if self.lesson else 0
        teacher = self.model if self.teacher is None else self.teacher
        absent = (end - new - columns[0], end - columns[0]) if columns == self.model.vocabulary.text_columns else (0, 0)
        with torch.no_grad():
            return Taught(said, teacher.head_rows(columns), absent)


def _distances(hidden: Tensor, said: Tensor) -> Tensor:
    """[N, D] twice -> [N]: the squared distances of hidden states from what is said, as a share of that, in float32 or
    better."""
    hidden, said = (part if part.dtype == torch.float64 else part.float() for part in (hidden, said))
    return (hidden - said).pow(2).sum(-1) / said.pow(2).sum(-1)


def _hidden(model: MaskPredictor, noised: NoisedRows, where: Tensor) -> Tensor:
    """[B, W, D]: the model's last hidden states at the places `where`."""
    seen = attention.full(noised.documents >= 0)
    if noised.packed:
        by_document = model.trunk.config._attn_implementation == BY_DOCUMENT
        seen = noised.documents[:, None, None] if by_document else attention.documents(noised.documents)
    hidden: Tensor = model(
        noised.ids,
        attention_mask=seen,
        position_ids=noised.positions,
        grid=noised.grid,
        where=where,
        columns=(0, 0),
    ).hidden
    return hidden


def _cell(source: Tensor, kind: int | Tensor, share: Tensor) -> Tensor:
    """Where a place with this source, modality and share masked is counted, in a flat [S, 2, K]."""
    inner = torch.tensor(BUCKETS[1:-1], device=share.device, dtype=share.dtype)
    return (source * 2 + kind) * (len(BUCKETS) - 1) + torch.bucketize(share.contiguous(), inner, right=True)


def _places(noised: NoisedRows, sources: int) -> Tensor:
    """The table with its last row filled in: the corruptible places."""
    device = noised.ids.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    table = torch.zeros(4, sources, 2, len(BUCKETS) - 1, dtype=dtype, device=device)
    at = _cell(noised.source, noised.modality, noised.share)[noised.corruptible]
    table[3].view(-1).index_add_(0, at, torch.ones_like(at, dtype=dtype))
    return table


def measured(table: Tensor, names: Sequence[str] = ("",)) -> dict[str, float]:
    """A table [4, S, 2, K] of sums over (nats, nats with the bound's weight, masked places, corruptible places) as
    numbers, in nats per token: `image/nats` per masked place, unweighted; `image/bound` per corruptible place, an
    upper bound of -log p; both also by the share masked (`image/nats/20-40` percent) and, where there are several
    sources, by their names (`image/nats/stickers`). What was never seen is left out."""
    found = {}
    groups = {"": table.sum(dim=(1, 3))}  # each [4, 2]
    for bucket, (low, high) in enumerate(pairwise(BUCKETS)):
        groups[f"/{low * 100:.0f}-{high * 100:.0f}"] = table[..., bucket].sum(1)
    if len(names) > 1:
        groups |= {f"/{name}": table[:, number].sum(-1) for number, name in enumerate(names)}
    for suffix, sums in groups.items():
        for kind, modality in enumerate(MODALITIES):
            nats, weighted, masked, places = sums[:, kind].tolist()
            if masked:
                found[f"{modality}/nats{suffix}"] = nats / masked
                found[f"{modality}/bound{suffix}"] = weighted / places
    return found

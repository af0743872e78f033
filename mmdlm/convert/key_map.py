"""Which part of which published tensor is which part of ours: one list of pieces, read in both directions.

A piece says that a region of a tensor in a published file and a region of one of our tensors hold the same numbers.
Most pieces are whole tensors under another name; a fused projection is several pieces of one published tensor, an
expert's matrix is a piece of one of our stacked tensors. Since a piece only copies, the way there and back is
bit-identical whenever the dtype is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdlm.errors import InputError

Region = tuple[slice | int, ...]  # an index; () is the whole tensor
Shapes = Mapping[str, tuple[int, ...]]


class Piece(NamedTuple):
    """`source[source_at]` and `target[target_at]` are the same numbers; `source_shape` is that of the whole source."""

    source: str
    source_shape: tuple[int, ...]
    target: str
    source_at: Region = ()
    target_at: Region = ()


def whole(source: str, target: str, shapes: Shapes) -> Piece:
    """The piece of a tensor that only changes its name; `shapes` are those of our tensors."""
    return Piece(source, shapes[target], target)


def source_shapes(pieces: Iterable[Piece]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that `pieces` speak of, in their order."""
    return {piece.source: piece.source_shape for piece in pieces}


def by_source(pieces: Iterable[Piece]) -> dict[str, list[Piece]]:
    """The pieces of each published tensor."""
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        found.setdefault(piece.source, []).append(piece)
    return found


def check_names(got: Iterable[str], pieces: Sequence[Piece], where: str) -> None:
    """InputError when `got`, the names in the files of `where`, are not those that its configuration asks for."""
    got, expected = set(got), {piece.source for piece in pieces}
    if missing := sorted(expected - got):
        raise InputError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors, the first is {missing[0]}: its config.json and "
            "its weights do not belong together, or a shard is missing; copy or download all of it again."
        )
    if unknown := sorted(got - expected):
        raise InputError(
            f"{where} has {len(unknown)} tensors that its config.json knows nothing of, the first is {unknown[0]}: "
            "its config.json and its weights do not belong together; copy or download all of it again."
        )


def check_shape(name: str, got: Sequence[int], pieces: Sequence[Piece], where: str) -> None:
    """InputError when the tensor `name` has not the shape that the configuration gives it."""
    expected = pieces[0].source_shape
    if tuple(got) != expected:
        raise InputError(
            f"{where}: {name} has the shape {list(got)}, its config.json says {list(expected)}: the configuration "
            "and the weights do not belong together; copy or download both again."
        )


def to_mmdlm(state: Mapping[str, Tensor], pieces: Sequence[Piece], shapes: Shapes) -> dict[str, Tensor]:
    """Published tensors -> ours, of the same dtype. InputError for a missing, unknown or misshapen tensor."""
    check_names(state, pieces, "The state dict")
    found: dict[str, Tensor] = {}
    for name, parts in by_source(pieces).items():
        check_shape(name, state[name].shape, parts, "The state dict")
        for piece in parts:
            place_piece(found, piece, state[name], shapes)
    return found


def place_piece(found: dict[str, Tensor], piece: Piece, source: Tensor, shapes: Shapes) -> None:
    """Put one piece of `source` where it belongs among our tensors `found`, which gains the target when it is new."""
    part = source[piece.source_at] if piece.source_at else source
    if not piece.target_at:
        # A slice of a fused tensor is copied out, so that the rest of it can be freed.
        found[piece.target] = part.clone() if piece.source_at else part
        return
    if piece.target not in found:
        found[piece.target] = torch.empty(shapes[piece.target], dtype=source.dtype, device=source.device)
    found[piece.target][piece.target_at].copy_(part)


def from_mmdlm(state: Mapping[str, Tensor], pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """Ours -> published tensors, of the same dtype; the way back of `to_mmdlm`."""
    found: dict[str, Tensor] = {}
    for name, parts in by_source(pieces).items():
        found[name] = take_source(name, parts, state)
    return found


def take_source(name: str, parts: Sequence[Piece], state: Mapping[str, Tensor]) -> Tensor:
    """One published tensor, put together from ours."""
    if missing := [piece.target for piece in parts if piece.target not in state]:
        raise InputError(
            f"The state dict has no {missing[0]}, which {name} is made of: give all tensors of the model, under the "
            "names of its state_dict()."
        )
    first = state[parts[0].target]
    if len(parts) == 1 and not parts[0].source_at:
        return first[parts[0].target_at].clone() if parts[0].target_at else first
    source = torch.empty(parts[0].source_shape, dtype=first.dtype, device=first.device)
    for piece in parts:
        ours = state[piece.target]
        source[piece.source_at].copy_(ours[piece.target_at] if piece.target_at else ours)
    return source

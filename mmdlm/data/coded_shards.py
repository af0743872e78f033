"""A large set of pictures as code shards on disk (what `mmdlm data tokenize` writes), read as rows to train on.

A shard (`mmdlm.data.shards`) has per row: `key`, `hash` of the picture, `texts`, `questions`; tensors `codes` [n, h, w]
and, in a shard with edits, `sources` [n, h, w] with the rows' own `source` true where there is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdlm.data.coded_pairs import CodedPairs, pixels_of
from mmdlm.data.paired import Problem, held_out_hashes, look_at_row
from mmdlm.data.paired_rows import Row
from mmdlm.data.picture_contents import picture
from mmdlm.data.shards import SETTINGS, read_shards, shard_settings, write_shard
from mmdlm.errors import InputError


def is_coded(directory: str | Path) -> bool:
    """Whether this is a directory of shards."""
    return (Path(directory) / SETTINGS).is_file()


def tokenizer_hash(directory: Path) -> str:
    """Of a saved visual tokenizer's weights and settings: 16 hex digits, the same wherever it was saved."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        weights = [path.read_bytes() for path in sorted(directory.glob("*.safetensors"))]
    except (OSError, ValueError) as error:
        raise InputError(f"{directory} is no saved visual tokenizer ({error}): check the path.") from error
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for content in weights:
        digest.update(content)
    return digest.hexdigest()[:16]


def encode_rows(
    rows: Sequence[Row], encode: Callable[[Tensor], Tensor], out: Path, *, resolution: int, fit: str
) -> tuple[int, list[Problem]]:
    """Encodes rows and writes them as one shard of `out`: (how many, those that are broken and left out)."""
    good, problems, hashes = [], [], []
    for row in rows:
        try:
            hashes.append(look_at_row(row).hash)
            good.append(row)
        except InputError as error:
            problems.append(Problem(row.where, str(error)))
    if not good:
        return 0, problems
    edits = [row for row in good if row.source is not None]
    pictures = [picture(row.image) for row in good] + [picture(row.source) for row in edits if row.source]
    made = encode(pixels_of(pictures, resolution, fit)).cpu()
    # Half the bytes where they suffice; a larger codebook needs four.
    made = made.to(torch.int16 if int(made.max()) < 2**15 else torch.int32)
    tensors = {"codes": made[: len(good)]}
    if edits:
        tensors["sources"] = torch.zeros_like(tensors["codes"])
        places = [number for number, row in enumerate(good) if row.source is not None]
        tensors["sources"][places] = made[len(good) :]
    lines: list[dict[str, Any]] = [
        {"key": row.key, "hash": found, "texts": row.texts, "questions": row.questions, "source": bool(row.source)}
        for row, found in zip(good, hashes, strict=True)
    ]
    write_shard(out, lines, tensors)
    return len(good), problems


def open_coded(
    directory: str | Path, *, tokenizer: str | None = None, held_out_share: float = 0.0, seed: int = 0
) -> tuple[CodedPairs, CodedPairs]:
    """(train, held out) of a directory of code shards; the same pictures are held out as `split_pairs` would.

    tokenizer: the hash that the codes have to be of, see `tokenizer_hash`. Raises InputError where they are of another,
    and for shards that hold no codes.
    """
    place = Path(directory)
    settings = shard_settings(place)
    if settings.get("kind") != "codes":
        raise InputError(f"{place} holds {settings.get('kind')!r}, expected codes: `mmdlm data tokenize` writes them.")
    if tokenizer is not None and settings["tokenizer"] != tokenizer:
        raise InputError(
            f"{place} holds codes of the tokenizer {settings['tokenizer']}, expected {tokenizer}: tokenize the "
            "pictures again with this model's tokenizer."
        )
    rows: dict[str, tuple[Mapping[str, Any], Tensor, Tensor | None]] = {}
    for shard in read_shards(place):
        for number, row in enumerate(shard.rows):
            source = shard.tensors["sources"][number].int() if row["source"] else None
            rows[row["key"]] = (row, shard.tensors["codes"][number].int(), source)
    ordered = [rows[key] for key in sorted(rows)]
    away = held_out_hashes([row["hash"] for row, _, _ in ordered], held_out_share, seed, str(directory))
    halves = [[one for one in ordered if (one[0]["hash"] in away) == held] for held in (False, True)]
    return _coded(halves[0]), _coded(halves[1])


def _coded(rows: Sequence[tuple[Mapping[str, Any], Tensor, Tensor | None]]) -> CodedPairs:
    return CodedPairs(
        codes=torch.stack([codes for _, codes, _ in rows]) if rows else torch.zeros(0, 0, 0).int(),
        captions=[list(row["texts"]) for row, _, _ in rows],
        questions=[[(question, answer) for question, answers in row["questions"] for answer in answers]
                   for row, _, _ in rows],
        kinds=["edit" if row["source"] else "pair" for row, _, _ in rows],
        sources=[source for _, _, source in rows],
        keys=[row["key"] for row, _, _ in rows],
    )

"""Paired data as image codes and words: what the predictor trains on. Each picture is encoded once, ever.

Codes are kept in shards (`mmdlm.data.shards`), keyed by the picture's pixels, its size in the model, and the hash of
the tokenizer: one more picture encodes one picture, another tokenizer begins a cache of its own, and a kill or a second
process at the same time costs nothing but work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from mmdlm.data.paired import PairedData
from mmdlm.data.picture_contents import Content, picture, picture_hash
from mmdlm.data.shards import open_shards, read_shards, write_shard
from mmdlm.picture_reading import fit_square

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CodedPairs:
    """N rows, with the fields that `CodedScenes` has: `codes` int32 [N, h, w]; `captions[n]` phrasings (perhaps none,
    where there are questions only); `questions[n]` pairs of question and answer, one for each accepted answer;
    `kinds[n]` "pair", or "edit" where there is a source. `sources[n]`: the source's codes int32 [h, w], or None.
    `keys[n]`: the row's key in its data."""

    codes: Tensor
    captions: list[list[str]]
    questions: list[list[tuple[str, str]]]
    kinds: list[str]
    sources: list[Tensor | None] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.kinds)


def coded_pairs(
    data: PairedData, encode: Encode, *, resolution: int, cache: Path, tokenizer_hash: str, fit: str = "pad",
    batch_size: int = 64,
) -> CodedPairs:
    """The rows of `data` with their pictures, and the sources of edits, as codes.

    encode: pixels [B, 3, S, S] in [-1, 1], S = resolution -> codes [B, h, w]. cache: a directory for codes, which may
    be shared by any number of data sets, runs and tokenizers; `tokenizer_hash` names the tokenizer's weights. fit: how
    a picture becomes square, see `mmdlm.picture_reading.fit_square`.
    """
    wanted: dict[str, Content] = {row_hash: row.image for row_hash, row in zip(data.hashes, data.rows, strict=True)}
    source_hashes = [picture_hash(picture(row.source)) if row.source else None for row in data.rows]
    wanted |= {found: row.source for found, row in zip(source_hashes, data.rows, strict=True) if found and row.source}
    codes = cached_codes(wanted, encode, resolution=resolution, cache=cache, tokenizer_hash=tokenizer_hash, fit=fit,
                         batch_size=batch_size)
    return CodedPairs(
        codes=torch.stack([codes[found] for found in data.hashes]) if data.rows else torch.zeros(0, 0, 0).int(),
        captions=[list(row.texts) for row in data.rows],
        questions=[[(question, answer) for question, answers in row.questions for answer in answers]
                   for row in data.rows],
        kinds=["edit" if row.source else "pair" for row in data.rows],
        sources=[codes[found] if found else None for found in source_hashes],
        keys=[row.key for row in data.rows],
    )


def cached_codes(
    pictures: Mapping[str, Content], encode: Encode, *, resolution: int, cache: Path, tokenizer_hash: str,
    fit: str = "pad", batch_size: int = 64,
) -> dict[str, Tensor]:
    """{picture hash: codes int32 [h, w]} of `pictures` {picture hash: its content}; encodes what the cache lacks."""
    settings = {"tokenizer": tokenizer_hash, "resolution": resolution, "fit": fit}
    name = hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:16]
    place = cache / f"codes-{name}"
    open_shards(place, settings)
    known: dict[str, Tensor] = {}
    for shard in read_shards(place):
        for number, row in enumerate(shard.rows):
            if row["key"] in pictures:
                known[row["key"]] = shard.tensors["codes"][number].int()
    missing = [found for found in pictures if found not in known]
    starts = range(0, len(missing), batch_size)
    for start in tqdm(starts, desc="encoding pictures", unit="batch", mininterval=5, disable=len(starts) < 2):
        keys = missing[start : start + batch_size]
        pixels = pixels_of([picture(pictures[key]) for key in keys], resolution, fit)
        codes = encode(pixels).cpu().to(torch.int32)
        write_shard(place, [{"key": key} for key in keys], {"codes": codes})
        known.update(zip(keys, codes, strict=True))
    return known


def pixels_of(pictures: Sequence[Image.Image], side: int, fit: str = "pad") -> Tensor:
    """RGB pictures -> float32 [B, 3, side, side] in [-1, 1]."""
    levels = np.stack([np.asarray(fit_square(one, side, fit)) for one in pictures])
    return torch.from_numpy(levels).movedim(-1, 1).float() / 127.5 - 1

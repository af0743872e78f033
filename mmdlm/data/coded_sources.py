"""From what a training run was told to train on to coded rows: picture worlds, paired data, code shards, or several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmdlm.data.coded import CodedScenes, coded_scenes
from mmdlm.data.coded_pairs import CodedPairs, Encode, coded_pairs
from mmdlm.data.coded_shards import is_coded, open_coded, tokenizer_hash
from mmdlm.data.drawings import STYLES
from mmdlm.data.paired import open_pairs, split_pairs
from mmdlm.data.scenes import PictureWorld


class CodedSource(NamedTuple):
    """A source's name (its folder's), its rows, and how often it is drawn from, relative to the others."""

    name: str
    rows: CodedScenes | CodedPairs
    weight: float


def open_sources(
    sources: Sequence[tuple[str, float]],
    encode: Encode,
    *,
    resolution: int,
    cache: Path,
    tokenizer: str,
    fit: str = "pad",
    scenes: tuple[int, int],
    world: dict[str, Any],
    held_out_share: float,
    seed: int,
) -> tuple[list[CodedSource], list[CodedSource]]:
    """(training, held-out) rows of every source (path, weight); a source may be without held-out rows.

    encode, resolution, cache, fit: as for `coded_pairs`; tokenizer: hash of its weights. scenes: how many of a picture
    world are trained on and held out, `world` the rest of its settings. held_out_share, seed: of paired data. Prints
    one line where rows of paired data are broken and left out.
    """
    trained: list[CodedSource] = []
    held_out: list[CodedSource] = []
    for path, weight in sources:
        name = Path(path).name
        if is_picture_world(Path(path)):
            for split, count, found in (("train", scenes[0], trained), ("held_out", scenes[1], held_out)):
                settings = world | {"resolution": resolution, "split": split}
                key = settings | {"tokenizer": tokenizer}
                drawn = coded_scenes(PictureWorld(path, **settings), range(count), encode, cache=cache, key=key)
                found.append(CodedSource(name, drawn, weight))
            continue
        if is_coded(path):
            coded = open_coded(path, tokenizer=tokenizer, held_out_share=held_out_share, seed=seed)
            for rows, found in zip(coded, (trained, held_out), strict=True):
                found += [CodedSource(name, rows, weight)] if len(rows) else []
            continue
        data = open_pairs(path)
        if data.problems:
            where, reason = data.problems[0]
            print(f"{name}: {len(data.problems)} rows left out, the first at {where}: {reason}", flush=True)
        halves = split_pairs(data, held_out_share=held_out_share, seed=seed)
        for half, found in zip(halves, (trained, held_out), strict=True):
            if len(half):
                pairs = coded_pairs(half, encode, resolution=resolution, cache=cache, tokenizer_hash=tokenizer, fit=fit)
                found.append(CodedSource(name, pairs, weight))
    return trained, held_out


def is_picture_world(path: Path) -> bool:
    """Whether this is an archive that `mmdlm data build pictures` wrote."""
    return any((path / f"{style}.zip").is_file() and (path / f"{style}.json").is_file() for style in STYLES)


def folder_hash(folder: Path) -> str:
    """Of the weights and settings of a saved tokenizer: keys its codes, in caches and in code shards alike."""
    return tokenizer_hash(folder)

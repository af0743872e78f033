"""A pool of scenes as image codes and words: what the predictor trains on, encoded once.

Encoding a picture costs about as much as a tenth of a training step, and the same scenes come round many times, so a
pool of them is encoded at the start and kept beside the run, keyed by the world's settings and the tokenizer's weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mmdlm.data.scenes import PictureWorld


@dataclass(frozen=True)
class CodedScenes:
    """N scenes: `codes` int32 [N, h, w]; `captions[n]` phrasings, the canonical one first; `questions[n]` pairs of
    question and answer; `kinds[n]` the composition's kind."""

    codes: Tensor
    captions: list[list[str]]
    questions: list[list[tuple[str, str]]]
    kinds: list[str]

    def __len__(self) -> int:
        return len(self.kinds)


def coded_scenes(
    world: PictureWorld,
    seeds: Sequence[int],
    encode: Callable[[Tensor], Tensor],
    *,
    cache: Path | None = None,
    key: dict[str, Any] | None = None,
    batch_size: int = 64,
) -> CodedScenes:
    """Composes and encodes the scenes of `seeds`.

    encode: pixels [B, 3, H, W] in [-1, 1] -> codes [B, h, w]. With `cache`, a pool made before from an equal `key` is
    read back instead; `key` must name all that the pool depends on besides the seeds.
    """
    if cache is not None:
        text = json.dumps([key, len(seeds), list(seeds[:2])], sort_keys=True)
        stem = cache / f"scenes-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        if stem.with_suffix(".safetensors").exists() and stem.with_suffix(".json").exists():
            words = json.loads(stem.with_suffix(".json").read_text())
            questions = [[(q, a) for q, a in pairs] for pairs in words["questions"]]
            return CodedScenes(
                load_file(stem.with_suffix(".safetensors"))["codes"], words["captions"], questions, words["kinds"]
            )
    codes, captions, questions, kinds = [], [], [], []
    for start in tqdm(range(0, len(seeds), batch_size), desc="encoding scenes", unit="batch", mininterval=5):
        scenes = [world.scene(seed) for seed in seeds[start : start + batch_size]]
        pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).movedim(-1, 1).float() / 127.5 - 1
        codes.append(encode(pixels).cpu().to(torch.int32))
        captions += [list(scene.captions) for scene in scenes]
        questions += [[(question, answer) for question, answer, _ in scene.questions] for scene in scenes]
        kinds += [str(scene.facts["kind"]) for scene in scenes]
    pool = CodedScenes(torch.cat(codes), captions, questions, kinds)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        beside = stem.with_name(f".{stem.name}-{os.getpid()}")
        beside.write_text(json.dumps({"captions": captions, "questions": questions, "kinds": kinds}))
        os.replace(beside, stem.with_suffix(".json"))
        save_file({"codes": pool.codes}, beside)
        os.replace(beside, stem.with_suffix(".safetensors"))
    return pool

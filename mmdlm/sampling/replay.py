"""Every step's decisions in a file, and the same steps again without asking the model.

One safetensors file holds the facts of the command (text) and, for every call of the loop, the canvas it began with and
each State. Played back, whatever watched the steps (pictures of the process, confidences, the result) sees the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mmdlm.errors import InputError
from mmdlm.sampling.denoise import State

FORMAT = "mmdlm steps 1"
_FIELDS = ("x", "x0", "confidence", "written", "done")


class Recording:
    """Plays `path` where it is there; else records, and `content()` is what to write to it.

    `facts`: whatever must be equal for the steps to be the same, as the command knows it. InputError where the file is
    no recording. `states` then refuses one whose facts or canvas are others.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.playing, self.facts, self._calls = path, path.exists(), {}, 0
        self._tensors: dict[str, Tensor] = {}
        if not self.playing:
            return
        try:
            with safe_open(str(path), "pt") as opened:
                about = opened.metadata() or {}
                self._tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is no recording of steps: give a file that --replay wrote, or a new name.") from (
                error
            )
        if about.get("format") != FORMAT:
            raise InputError(f"{path} is no recording of this version: give a file that --replay wrote, or a new name.")
        self.facts = json.loads(about["facts"])

    def check(self, facts: Mapping[str, object]) -> None:
        """Remember the command's facts; where a recording is played, InputError unless they are those recorded."""
        told = {name: str(value) for name, value in facts.items()}
        for name in sorted(told.keys() | self.facts.keys()) if self.playing else ():
            if told.get(name) != self.facts.get(name):
                raise InputError(
                    f"{self.path} was recorded with {name} {self.facts.get(name)!r}, now it is {told.get(name)!r}: "
                    "give the same command, or another file to record to."
                )
        self.facts = told

    def states(self, x: Tensor, live: Iterator[State]) -> Iterator[State]:
        """The next call of the loop, that begins with x [B, L]: its states as recorded, or `live` ones, kept."""
        call, self._calls = self._calls, self._calls + 1
        if not self.playing:
            self._tensors[f"{call}.start"] = x.int().cpu()
            for step, state in enumerate(live):
                for field in _FIELDS:
                    value = getattr(state, field).cpu()
                    self._tensors[f"{call}.{step}.{field}"] = value.int() if field in ("x", "x0") else value
                yield state
            return
        start = self._tensors.get(f"{call}.start")
        if start is None or start.shape != x.shape or not bool((start == x.cpu()).all()):
            raise InputError(
                f"{self.path} was recorded from another start (prompt, picture, mask or model): give the same command, "
                "or another file to record to."
            )
        step = 0
        while f"{call}.{step}.x" in self._tensors:
            ids, guess, confidence, written, done = (
                self._tensors[f"{call}.{step}.{field}"].to(x.device) for field in _FIELDS
            )
            step += 1
            yield State(ids.long(), guess.long(), confidence, written, step, done, step)

    def content(self) -> bytes:
        """The recording as bytes of a safetensors file."""
        return save(
            {name: tensor.contiguous() for name, tensor in self._tensors.items()},
            metadata={"format": FORMAT, "facts": json.dumps(self.facts)},
        )

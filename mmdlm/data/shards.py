"""Long work over many items, in shards that a kill cannot spoil: done items are known, nothing is done or kept twice.

A shard is a directory `shard-<hash of its keys>` with `rows.jsonl` (one JSON object a line, each with its `key`) and,
where there are tensors, `tensors.safetensors` (row n of each belongs to line n). It is written under another name and
renamed, so a directory of that name is whole, and the shards themselves say which keys are done: there is no second
list that could disagree. The same keys written twice, as after a worker that died between renaming and reporting, give
the same name, and the first stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mmdlm.errors import InputError
from mmdlm.picture_files import write_whole

if TYPE_CHECKING:  # whoever writes rows only need not wait for torch
    from torch import Tensor

ROWS, TENSORS, SETTINGS = "rows.jsonl", "tensors.safetensors", "shards.json"


class Shard(NamedTuple):
    """`rows` with their `key`; `tensors`, each [len(rows), ...], empty where the shard has none."""

    rows: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def open_shards(out: Path, settings: Mapping[str, Any]) -> set[str]:
    """Makes `out` ready to be filled, or to be filled further, and says which keys are done.

    settings: what the rows depend on besides their items (a model's hash, a size), as JSON can hold it. They are kept
    in `out/shards.json`; one process calls this, before any writes. Raises InputError where `out` holds shards of
    other settings or other files, or cannot be written.
    """
    wanted = json.loads(json.dumps(settings))
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in out.iterdir())
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another directory.") from error
    if SETTINGS in there:
        found = shard_settings(out)
        if found != wanted:
            differing = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
            raise InputError(
                f"{out} holds shards made with another {', '.join(differing)}: give the same settings, "
                "or another directory."
            )
    elif any(not name.startswith(".") for name in there):
        raise InputError(f"{out} holds other files, {there[0]!r} for one: give an empty directory or a new name.")
    else:
        write_whole(out / SETTINGS, (json.dumps(wanted, indent=1, sort_keys=True) + "\n").encode())
    _sweep(out)
    return done_keys(out)


def shard_settings(out: Path) -> dict[str, Any]:
    """The settings that `open_shards` was given; InputError where `out` has none."""
    try:
        found = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{out} is no directory of shards, expected {SETTINGS} in it: check the path.") from error
    if not isinstance(found, dict):
        raise InputError(f"{out / SETTINGS} holds no object, expected settings: make the shards again.")
    return found


def write_shard(out: Path, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor] | None = None) -> Path:
    """Writes one shard, whole or not at all, and returns its directory; any number of processes may do so at once.

    rows: each with a `key` (a string, unique among all items) and anything else that JSON can hold. Where a shard of
    just these keys is there already it stays as it is.
    """
    keys = [row["key"] for row in rows]
    if not keys or len(set(keys)) != len(keys) or not all(isinstance(key, str) for key in keys):
        raise ValueError(f"a shard has {len(keys)} rows with {len(set(keys))} keys, expected as many different strings")
    target = out / f"shard-{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:24]}"
    if target.is_dir():
        return target
    place = out / f".writing-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    place.mkdir()
    try:
        lines = "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        _write_through(place / ROWS, lines.encode())
        if tensors:
            from safetensors.torch import save

            if any(len(tensor) != len(rows) for tensor in tensors.values()):
                raise ValueError(f"a shard of {len(rows)} rows has tensors of {[len(t) for t in tensors.values()]}")
            _write_through(place / TENSORS, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        try:
            os.rename(place, target)
        except OSError:
            if not target.is_dir():  # another process was first
                raise
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return target


def shards(out: Path) -> list[Path]:
    """The whole shards of `out`, in the order of their names."""
    return sorted(path for path in out.glob("shard-*") if (path / ROWS).is_file())


def shard_rows(shard: Path) -> list[dict[str, Any]]:
    """The rows of one shard."""
    with (shard / ROWS).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def done_keys(out: Path) -> set[str]:
    """The keys of all rows of all whole shards."""
    return {row["key"] for shard in shards(out) for row in shard_rows(shard)}


def read_shards(out: Path) -> Iterator[Shard]:
    """Every row once: where two runs beside each other did an item twice, the first shard by name counts."""
    from safetensors.torch import load_file

    seen: set[str] = set()
    for shard in shards(out):
        rows = shard_rows(shard)
        tensors = load_file(shard / TENSORS) if (shard / TENSORS).exists() else {}
        new = [n for n, row in enumerate(rows) if row["key"] not in seen]
        seen.update(row["key"] for row in rows)
        if len(new) == len(rows):
            yield Shard(rows, tensors)
        elif new:
            yield Shard([rows[n] for n in new], {name: tensor[new] for name, tensor in tensors.items()})


def _write_through(path: Path, content: bytes) -> None:
    """To the disk itself: after a power cut a renamed directory must not hold empty files."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sweep(out: Path) -> None:
    """Removes what killed processes of this machine left half-written; what a living one writes is left alone."""
    for place in out.glob(f".writing-{socket.gethostname()}-*"):
        pid = place.name.rsplit("-", 2)[1]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(place, ignore_errors=True)
        except (PermissionError, ValueError):
            continue

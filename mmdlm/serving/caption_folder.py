"""Captions of every picture below a folder, in shards that a kill leaves whole; on one machine or through Ray Data.

    summary = caption_folder(Path("photos"), Path("captions"), load=lambda: ImageToText.from_pretrained())

OUT/manifest.json names the pictures by their relative path, with size and time, and the model. OUT/shards/ holds what
is done, each file written beside its place and renamed. What a manifest names and no shard holds is still to be done:
that is all a later run needs to know, so a run that was killed goes on where it was, and pictures that are new or have
changed are captioned at the next. At the end OUT/captions.parquet and OUT/captions.jsonl hold one row a picture, in the
order of their paths: file, caption, confidence, width, height, error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mmdlm.errors import InputError
from mmdlm.picture_files import write_whole

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"),
)
SHARD_BATCHES = 8  # batches of a shard, which is what a kill can cost of each process
COLUMNS = ("file", "caption", "confidence", "width", "height", "error")
FORMAT = 1

Load = Callable[[], Any]  # makes the pipeline `ImageToText`, in the process that will use it


class Entry(NamedTuple):
    """A picture as the manifest knows it; where any of this changes it is captioned again."""

    file: str  # relative to the folder, with /
    bytes: int
    modified_ns: int


class Summary(NamedTuple):
    """What a run did."""

    pictures: int  # rows of the result
    errors: int  # rows with an error and no caption
    before: int  # rows that an earlier run had done
    ignored: int  # other files


def caption_folder(
    source: Path,
    out: Path,
    *,
    load: Load,
    model_hash: str,
    batch_size: int = 16,
    steps: int | None = None,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] = lambda done, total, errors: None,
) -> Summary:
    """Caption every picture below `source` into `out`. `workers`: actors of a Ray Data pool; None is this process.

    `progress(pictures done, of so many, errors)` is called at the start and after every shard. A picture that cannot
    be read is a row with an error. Raises InputError for a folder without pictures, an `out` of another model or other
    settings, and one at which another run is at work.
    """
    if batch_size < 1 or (workers is not None and workers < 1):
        raise InputError(f"The batch size is {batch_size}, workers {workers}, expected 1 or more of both.")
    entries, ignored = pictures_below(source)
    about = {"format": FORMAT, "model_hash": model_hash, "steps": steps}
    with _alone(out):
        _check_manifest(out, about)
        listed = {entry.file: {"bytes": entry.bytes, "modified_ns": entry.modified_ns} for entry in entries}
        write_whole(out / "manifest.json", json.dumps({**about, "files": listed}, ensure_ascii=False).encode())
        done = finished(out)
        pending = [entry for entry in entries if entry not in done]
        before = len(entries) - len(pending)
        errors = sum(done[entry]["error"] is not None for entry in entries if entry in done)
        size = batch_size * SHARD_BATCHES
        shards = [pending[start : start + size] for start in range(0, len(pending), size)]
        settings = {"source": str(source), "out": str(out), "load": load, "batch_size": batch_size, "steps": steps}
        count = before
        progress(count, len(entries), errors)
        for told in _local(shards, settings) if workers is None else _with_ray(shards, settings, workers):
            count, errors = count + told["pictures"], errors + told["errors"]
            progress(count, len(entries), errors)
        rows = finished(out)
        errors = _write_result(out, [rows[entry] for entry in entries])
    return Summary(len(entries), errors, before, ignored)


def pictures_below(source: Path) -> tuple[list[Entry], int]:
    """Every picture file below `source` by its name, sorted by path, and how many other files there are.

    Links to folders are not followed: they may lead in circles. Raises InputError where there is no picture.
    """
    if not source.is_dir():
        raise InputError(f"There is no folder at {source}: check the path.")
    found, ignored = [], 0
    for directory, _, names in os.walk(source):
        for name in names:
            path = Path(directory) / name
            if path.suffix.lower() not in SUFFIXES or not path.is_file():
                ignored += 1
                continue
            state = path.stat()
            found.append(Entry(path.relative_to(source).as_posix(), state.st_size, state.st_mtime_ns))
    if not found:
        raise InputError(f"There is no picture below {source}, expected files ending in .png, .jpg, .webp ...")
    unwritable = [entry.file for entry in found if not _is_text(entry.file)]
    if unwritable:
        raise InputError(f"The file name {unwritable[0]!r} is no valid UTF-8: rename it.")
    return sorted(found), ignored


class Captioner:
    """Captions one shard after the other; one in each process that works."""

    def __init__(self, *, source: str, out: str, load: Load, batch_size: int, steps: int | None) -> None:
        self.source, self.shards, self.batch_size, self.steps = Path(source), Path(out) / "shards", batch_size, steps
        self.pipe = load()

    def __call__(self, item: Mapping[str, Any]) -> dict[str, int]:
        """Write the shard of the pictures `item` lists, as `_item` makes it; returns how many, and how many failed.

        Its name is that of what it holds: doing it twice, as Ray does where an actor dies, replaces it by itself.
        """
        entries = [Entry(*row) for row in zip(item["file"], item["bytes"], item["modified_ns"], strict=True)]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(entries), self.batch_size):
            rows += self._batch(entries[start : start + self.batch_size])
        name = hashlib.sha256("\n".join(map(repr, entries)).encode()).hexdigest()[:24]
        write_whole(self.shards / f"{name}.parquet", _parquet(rows))
        return {"pictures": len(rows), "errors": sum(row["error"] is not None for row in rows)}

    def _batch(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        from mmdlm.processing import fit_square, load_image

        rows: list[dict[str, Any]] = []
        squares, described = [], []
        processor = self.pipe.processor
        for entry in entries:
            row = {**dict.fromkeys(COLUMNS), **entry._asdict()}
            rows.append(row)
            try:
                picture = load_image((self.source / entry.file).read_bytes())
                row["width"], row["height"] = picture.size
                # small from here on: a batch of large photographs is never held whole
                squares.append(fit_square(picture, processor.image_size, processor.picture_fit))
                described.append(row)
            except Exception as error:  # whatever a decoder does with a broken file, it costs this one row
                reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
                row["error"] = " ".join(reason.split())[:500]
        if squares:
            told = self.pipe(squares, num_inference_steps=self.steps)
            for row, text, sure in zip(described, told.texts, told.confidences, strict=True):
                row["caption"], row["confidence"] = text, sure
        return rows


def finished(out: Path) -> dict[Entry, dict[str, Any]]:
    """What is done: every picture's row of the shards. A shard that cannot be read is deleted, to be done again."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    rows = {}
    for path in sorted((out / "shards").glob("*.parquet")):
        try:
            table = parquet.read_table(path)
        except (pyarrow.ArrowException, OSError):
            path.unlink()
            continue
        rows.update({Entry(row["file"], row["bytes"], row["modified_ns"]): row for row in table.to_pylist()})
    return rows


def _local(shards: Sequence[Sequence[Entry]], settings: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    if shards:
        yield from map(Captioner(**settings), map(_item, shards))


def _with_ray(
    shards: Sequence[Sequence[Entry]], settings: Mapping[str, Any], workers: int
) -> Iterator[dict[str, int]]:
    """The same by a pool of Ray actors, each with a model of its own; shards come as they are finished."""
    if not shards:
        return
    from mmdlm.serving.ray_serve import connect

    connect()
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    items = ray.data.from_items([_item(shard) for shard in shards], override_num_blocks=len(shards))
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(shards)))
    # absolute: the actors run in a directory of their own
    placed = {**settings, **{name: os.path.abspath(settings[name]) for name in ("source", "out")}}
    yield from items.map(Captioner, fn_constructor_kwargs=placed, compute=pool, num_cpus=1).iter_rows()


def _item(shard: Sequence[Entry]) -> dict[str, list[Any]]:
    return {name: [getattr(entry, name) for entry in shard] for name in Entry._fields}


def _check_manifest(out: Path, about: Mapping[str, Any]) -> None:
    """Raises InputError where `out` was begun with another model or other settings, or is no such folder at all."""
    (out / "shards").mkdir(exist_ok=True)
    path = out / "manifest.json"
    if not path.is_file():
        others = sorted(set(os.listdir(out)) - {"shards", ".lock"})
        if others:
            raise InputError(f"{out} is not empty and holds no manifest.json but {others[0]!r}: choose a new folder.")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differs = [name for name, value in about.items() if found[name] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no manifest of captions ({error}): choose a new folder.") from error
    if differs:
        name = differs[0]
        raise InputError(
            f"{out} was begun with {name} {found[name]!r}, this run has {about[name]!r}: go on with the same, or "
            "choose a new folder."
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """No second run at `out`; the lock ends with the process, however that ends. Leftovers of a kill are taken out."""
    import fcntl

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): choose another place.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"Another run is at work at {out}: wait for it, or choose another folder.") from error
        for leftover in [*out.glob(".*.part"), *out.glob("shards/.*.part")]:
            leftover.unlink()
        yield


def _write_result(out: Path, rows: Sequence[Mapping[str, Any]]) -> int:
    """captions.parquet and captions.jsonl; returns how many rows have an error."""
    kept = [{name: row[name] for name in COLUMNS} for row in rows]
    write_whole(out / "captions.parquet", _parquet(kept))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    write_whole(out / "captions.jsonl", lines.encode())
    return sum(row["error"] is not None for row in kept)


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet as parquet

    kinds = {"confidence": pyarrow.float64(), "width": pyarrow.int32(), "height": pyarrow.int32(),
             "bytes": pyarrow.int64(), "modified_ns": pyarrow.int64()}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in rows[0]])
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows), schema=schema), sink)
    return bytes(sink.getvalue())


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

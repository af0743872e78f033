"""A large set of pictures into code shards: in this process, or by a pool of Ray Data actors on one or many machines.

Work is cut into batches of rows; each becomes one shard, renamed into place when it is whole. Whatever is killed (a
worker, the driver, the machine), the shards say what is done: a worker's batch is given to another by Ray, a new start
takes what is left, and a batch that was done twice has the same name and stays once.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from mmdlm.data.coded_shards import encode_rows, tokenizer_hash
from mmdlm.data.paired import Problem
from mmdlm.data.paired_rows import Row, row
from mmdlm.data.paired_sources import find_records
from mmdlm.data.shards import open_shards
from mmdlm.errors import InputError


class Tokenized(NamedTuple):
    """`rows` made now, `before` done earlier, `problems` left out."""

    rows: int
    before: int
    problems: list[Problem]


def tokenize(
    source: str, out: Path, *, model: Path, split: str = "train", batch_size: int = 64, device: str = "cpu",
    workers: int | None = None,
) -> Tokenized:
    """Encodes the rows of `source` (anything that `open_pairs` takes) into shards of `out`; goes on where it stopped.

    model: a model directory, or a saved visual tokenizer. workers: as many Ray actors, on the cluster that RAY_ADDRESS
    names or on this machine; None works in this process. Messages and masks are not kept: only pictures, sources,
    captions and questions. Raises InputError for what cannot be read or written, and without Ray where it is asked for.
    """
    place, resolution, fit = tokenizer_of(model)
    settings = {"kind": "codes", "tokenizer": tokenizer_hash(place), "resolution": resolution, "fit": fit}
    find = find_records(source, split=split)
    out = out.absolute()
    done = open_shards(out, settings)
    rows, problems = _rows(find)
    left = [one for one in rows if one.key not in done]
    batches = [left[start : start + batch_size] for start in range(0, len(left), batch_size)]
    arguments: dict[str, Any] = {"place": str(place.absolute()), "out": str(out), "device": device}
    arguments |= {"resolution": resolution, "fit": fit}
    made = 0
    for count, found in _by_ray(batches, arguments, workers) if workers else _here(batches, arguments):
        made += count
        problems += found
    return Tokenized(made, len(rows) - len(left), problems)


def tokenizer_of(model: Path) -> tuple[Path, int, str]:
    """The visual tokenizer's directory, the side of its pictures in pixels, and how they become square."""
    if (model / "visual_tokenizer").is_dir():
        try:
            processor = json.loads((model / "processor" / "processor_config.json").read_text(encoding="utf-8"))
            return model / "visual_tokenizer", int(processor["image_size"]), str(processor.get("picture_fit", "pad"))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{model} is no whole model directory ({error}): check --model.") from error
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return model, int(config["sample_size"]), "pad"
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{model} is no model and no saved visual tokenizer ({error}): check --model.") from error


def load_encode(place: str, device: str) -> Callable[[Tensor], Tensor]:
    """The saved visual tokenizer at `place` as a function: pixels [B, 3, S, S] in [-1, 1] -> codes [B, h, w]."""
    from mmdlm.models.visual_tokenizer import LFQTokenizer
    from mmdlm.models.vq_tokenizer import VQTokenizer

    name = json.loads((Path(place) / "config.json").read_text(encoding="utf-8")).get("_class_name")
    kinds: dict[str, Any] = {"LFQTokenizer": LFQTokenizer, "VQTokenizer": VQTokenizer}
    if name not in kinds:
        raise InputError(f"{place} holds a {name}, expected one of {', '.join(kinds)}: check --model.")
    tokenizer = kinds[name].from_pretrained(place).to(device).eval()

    def encode(pixels: Tensor) -> Tensor:
        codes: Tensor = tokenizer.encode(pixels.to(device, tokenizer.dtype))
        return codes

    return encode


def _rows(records: Any) -> tuple[list[Row], list[Problem]]:
    """The rows of records, with different keys, no picture decoded; and what is broken already."""
    rows, problems = [], []
    keys: dict[str, int] = {}
    for record in records:
        if record.reason or not record.columns:
            problems += [Problem(record.where, record.reason)] if record.reason else []
            continue
        try:
            found = row(record)
        except InputError as error:
            problems.append(Problem(record.where, str(error)))
            continue
        keys[found.key] = count = keys.get(found.key, 0) + 1
        rows.append(found if count == 1 else replace(found, key=f"{found.key}#{count}"))
    return rows, problems


def _here(batches: list[list[Row]], arguments: dict[str, Any]) -> Iterator[tuple[int, list[Problem]]]:
    worker = _Worker(**arguments) if batches else None
    for batch in tqdm(batches, desc="encoding", unit="batch", mininterval=2):
        assert worker is not None
        yield worker.work(batch)


def _by_ray(
    batches: list[list[Row]], arguments: dict[str, Any], workers: int
) -> Iterator[tuple[int, list[Problem]]]:
    try:
        import ray
    except ImportError as error:
        raise InputError("a pool of workers is Ray's: pip install 'mmdlm[ray]', or leave out --ray.") from error
    if not batches:
        return
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
        here: dict[str, Any] = {}
        if "RAY_ADDRESS" not in os.environ:  # on this machine: no dashboard, and a store for rows and not for pictures
            here = {"num_cpus": workers + 1, "include_dashboard": False, "object_store_memory": 256 * 2**20}
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **here)
        except Exception as error:  # Ray raises plain exceptions, as where its own parts are too slow to answer
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(".")
            raise InputError(f"Ray could not be started ({reason}): try again, or leave out --ray.") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        items = [{"rows": pickle.dumps(batch)} for batch in batches]
        # One block for each batch: what a killed worker had in hand is one batch, and another worker gets it.
        found = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker, fn_constructor_kwargs=arguments, batch_size=1, num_cpus=1,
            num_gpus=1 if arguments["device"].startswith("cuda") else 0,
            compute=ray.data.ActorPoolStrategy(size=workers),  # whose actors Ray Data starts again as often as it takes
        )  # fmt: skip
        for answer in tqdm(found.iter_rows(), total=len(items), desc="encoding", unit="batch", mininterval=2):
            yield int(answer["count"]), [Problem(*problem) for problem in json.loads(answer["problems"])]
    finally:
        if started:
            ray.shutdown()


class _Worker:
    """One actor, or this process: the tokenizer in memory, one batch of rows after the other."""

    def __init__(self, place: str, out: str, resolution: int, fit: str, device: str) -> None:
        self.encode, self.out = load_encode(place, device), Path(out)
        self.resolution, self.fit = resolution, fit

    def work(self, rows: list[Row]) -> tuple[int, list[Problem]]:
        return encode_rows(rows, self.encode, self.out, resolution=self.resolution, fit=self.fit)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What Ray Data calls: a batch of one pickled list of rows -> how many were made and which were left out."""
        answers = [self.work(pickle.loads(bytes(content))) for content in batch["rows"]]
        return {
            "count": [count for count, _ in answers],
            "problems": [json.dumps(problems) for _, problems in answers],
        }

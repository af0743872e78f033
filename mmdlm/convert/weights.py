"""Reading published weights: one file at a time, safetensors first, pickles only where nothing in them can run.

What is in the files is asked of their headers before a tensor is read, so that a missing shard, a file cut short or a
shape that the configuration does not know is one sentence at the start and not a traceback after minutes.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmdlm.errors import InputError

# Weights under the names that transformers, diffusers and Show-o's tokenizer give them, the safest first.
SINGLE_FILES = (
    "model.safetensors",
    "pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
_INDEXES = tuple(f"{name}.index.json" for name in SINGLE_FILES)
_PICKLES = (".bin", ".pth", ".pt", ".ckpt")
log = logging.getLogger(__name__)
# What is asked of the Hub: weights, tables and texts, and no program.
HUB_PATTERNS = ("*.json", "*.safetensors", "*.yaml", "*.txt", "*.model", "*.jinja")


def find_directory(source: str | Path) -> Path:
    """The directory of `source`: a path, or the name of a repository of the Hub, whose files are fetched.

    Fetched are JSON, YAML, safetensors and tokenizer files; pickles only from a repository that has no safetensors; a
    program never. Raises InputError when there is no such directory or repository.
    """
    path = Path(source)
    if path.is_dir():
        return path
    name = str(source)
    if path.exists():
        raise InputError(f"{name} is a file, expected the directory of a published model: give its directory.")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"There is no directory {name}: give a directory, or a name of the Hub such as owner/model.")
    from huggingface_hub import HfApi, snapshot_download

    try:
        offered = HfApi().list_repo_files(name)
        patterns = list(HUB_PATTERNS)
        if not any(file.endswith(".safetensors") for file in offered):
            patterns += [f"*{suffix}" for suffix in _PICKLES]
        log.info("Fetching %s from the Hub: the files that match %s.", name, ", ".join(patterns))
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the client raises a dozen kinds; each means that nothing was fetched
        try:
            return Path(snapshot_download(name, allow_patterns=list(HUB_PATTERNS), local_files_only=True))
        except Exception:
            raise InputError(
                f"{name} is no directory here and could not be fetched from the Hub "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}): check the name and the network."
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises InputError when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): copy or download it again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a table: copy or download it again.")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files that hold a published model's weights. Raises InputError when there are none or a shard is missing."""
    for index, single in zip(_INDEXES, SINGLE_FILES, strict=True):
        if (directory / index).is_file():
            weight_map = read_json(directory / index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{directory / index} has no weight_map: copy or download it again.")
            shards = sorted({str(name) for name in weight_map.values()})
            # An index is a stranger's file: it names files of its own directory and nothing else.
            if any(Path(name).name != name for name in shards):
                raise InputError(f"{directory / index} names files outside its directory, which is refused.")
            if missing := [name for name in shards if not (directory / name).is_file()]:
                raise InputError(
                    f"{directory} lacks the shard {missing[0]} ({len(missing)} of {len(shards)} are missing): copy or "
                    "download it again."
                )
            return [directory / name for name in shards]
        if (directory / single).is_file():
            return [directory / single]
    for suffix in (".safetensors", *_PICKLES):
        found = sorted(directory.glob(f"*{suffix}"))
        if len(found) == 1:
            return found
        if found:
            raise InputError(
                f"{directory} has {len(found)} {suffix} files and no index that says which belong together: copy the "
                "index file too, or leave one."
            )
    raise InputError(f"{directory} has no weights, expected safetensors (or .bin, .pth, .ckpt): copy it again.")


def read_shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors; of safetensors only the headers are read. Raises InputError for a broken file
    and for a name that two files have."""
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        if path.suffix == ".safetensors":
            with _open(path) as content:
                shapes = {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in _unpickle(path).items()}
        if twice := sorted(found.keys() & shapes.keys()):
            raise InputError(f"{path} holds {twice[0]} once more: the shards do not belong together; copy all again.")
        found |= shapes
    return found


def stored_dtype(files: list[Path], name: str) -> torch.dtype:
    """The dtype that the tensor `name` is stored in; KeyError where none of the files holds it."""
    for path in files:
        if path.suffix != ".safetensors":
            content = _unpickle(path)
            if name in content:
                return content[name].dtype
            continue
        with _open(path) as opened:
            if name in opened.keys():  # noqa: SIM118 (no mapping)
                found: torch.dtype = opened.get_slice(name)[:0].dtype
                return found
    raise KeyError(name)


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, one after another, on the CPU and as they are stored. Raises InputError when broken.

    A tensor may share memory with the file: copy what is to outlive the reading of it.
    """
    if path.suffix != ".safetensors":
        yield from _unpickle(path).items()
        return
    with _open(path) as content:
        for name in content.keys():  # noqa: SIM118 (no mapping)
            yield name, content.get_tensor(name)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path} is broken or cut short ({str(error).splitlines()[0]}): copy or download it again."
        ) from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The state dict of a pickle that holds tensors and plain values only: nothing in it is ever run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values, and loading it could run code of a stranger's: it is "
            "not loaded; get the weights as safetensors."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(
            f"{path} is no checkpoint that can be read ({(str(error).splitlines() or ['empty'])[0]}): copy or "
            "download it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # Lightning's checkpoints
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a state dict: copy or download it again.")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}

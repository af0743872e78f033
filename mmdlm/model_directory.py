"""A model directory on disk: what has to be in it, its sampling presets, its hash.

diffusers' layout: `model_index.json` names the class of every component, each component has a folder of that name,
weights are safetensors. Everything is looked at before anything is loaded, so that a wrong directory is one sentence
and not a traceback from three libraries down. No torch here: the command line asks these questions first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmdlm.errors import InputError

INDEX = "model_index.json"
PRESETS = "generation_config.json"
FORMAT_KEY, FORMAT = "_mmdlm_format", 1  # raised when an older mmdlm could no longer read what is saved
COMPONENTS = ("model", "visual_tokenizer", "processor")
_WITH_WEIGHTS = ("model", "visual_tokenizer")


def check_model_directory(directory: Path) -> None:
    """Raises InputError when `directory` is no mmdlm model, was saved in another format, or is incomplete or broken."""
    if not os.path.isdir(directory):  # False where Path would raise: a name that is too long
        raise InputError(f"There is no model directory at {directory}: check the path given to --model.")
    if not (directory / INDEX).is_file():
        raise InputError(
            f"{directory} is no model directory, it has no {INDEX}: give the directory that save_pretrained wrote."
        )
    index = _read_json(directory / INDEX)
    for component in COMPONENTS:
        entry = index.get(component)
        # Only our own modules are imported for a component, whatever a stranger's index says.
        if not (isinstance(entry, list) and len(entry) == 2 and str(entry[0]).startswith("mmdlm.")):
            raise InputError(
                f"{directory} is a model of {index.get('_class_name', 'another kind')}, its {component!r} is "
                f"{entry!r}, expected one of mmdlm's classes: give an mmdlm model, or convert this one first."
            )
        if not (directory / component).is_dir():
            raise InputError(f"{directory} is incomplete, it has no folder {component}: copy all of it again.")
    found = index.get(FORMAT_KEY)
    if found != FORMAT:
        raise InputError(
            f"{directory} was saved by another version of mmdlm (format {found}, this version reads {FORMAT}): "
            "update mmdlm, or save the model again with this version."
        )
    for component in _WITH_WEIGHTS:
        _check_weights(directory / component)


def finish_model_directory(directory: Path) -> None:
    """After diffusers has saved: write the format number, and take out the path the model was once loaded from."""
    for path in (directory / INDEX, directory / "visual_tokenizer" / "config.json"):
        content = _read_json(path)
        content.pop("_name_or_path", None)
        if path.name == INDEX:
            content[FORMAT_KEY] = FORMAT
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_presets(directory: Path, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sampling presets of every task in `defaults`, overridden by the directory's own where it has any."""
    path = directory / PRESETS
    saved = _read_json(path) if path.is_file() else {}
    for task, preset in saved.items():
        if task in defaults and not isinstance(preset, dict):
            raise InputError(f"{path} has {preset!r} for {task!r}, expected a table of settings: mend the file.")
    return {task: {**preset, **saved.get(task, {})} for task, preset in defaults.items()}


def write_presets(directory: Path, presets: Mapping[str, Mapping[str, Any]]) -> None:
    (directory / PRESETS).write_text(json.dumps(presets, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def weight_names(directory: Path) -> set[str]:
    """The names of all tensors in a component's safetensors files."""
    names: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as weights:
            names.update(weights.keys())
    return names


def model_hash(directory: Path) -> str:
    """The first 16 hex digits of the SHA-256 over the weights and the text tokenizer: what the model is.

    Configurations are left out: saving a model again may rewrite them, and what the presets set is recorded elsewhere.
    """
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for path in sorted((directory / component).iterdir()):
            if path.suffix == ".safetensors" or path.name == "tokenizer.json":
                digest.update(path.relative_to(directory).as_posix().encode() + b"\0")
                with path.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_weights(component: Path) -> None:
    if not (component / "config.json").is_file():
        raise InputError(f"{component} is incomplete, it has no config.json: copy the whole model directory again.")
    files = sorted(component.glob("*.safetensors"))
    if not files:
        raise InputError(f"{component} has no safetensors weights, no other kind is read: save them as safetensors.")
    for path in files:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is broken or cut short ({str(error).splitlines()[0]}): copy or download it again."
            ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): copy the model directory again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a table: copy the model directory again.")
    return content

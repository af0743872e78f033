"""What ships with the package: the small model that draws, describes and answers."""

from __future__ import annotations

from pathlib import Path

from mmdlm.errors import InputError


def shipped_model() -> Path:
    """The directory of the shipped model. InputError where this installation has none."""
    directory = Path(__file__).resolve().parent / "pictures"
    if not (directory / "model_index.json").is_file():
        raise InputError(
            f"This installation has no shipped model at {directory}: name one with --model DIR, or train it with "
            "`mmdlm run train/pictures`."
        )
    return directory

"""The vocabulary of a published model: what its config.json says, its tokenizer's length, and what its authors fixed.

Several families wrote their special ids, and where the image codes start, into their programs and not into config.json.
Those ids are known here for tables of the published size only: a smaller model has other ids, and a guess would draw
noise without an error. What cannot be known has to be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from mmdlm.errors import InputError
from mmdlm.vocabulary import Vocabulary

SPECIAL = ("bos_id", "eos_id", "pad_id", "boi_id", "eoi_id", "draw_id", "describe_id", "ask_id")


def tokenizer_length(directory: Path) -> int | None:
    """Entries of the text tokenizer in `directory`, added ones included; None where there is no tokenizer.json.

    Raises InputError when the file is broken.
    """
    tokenizer = read_tokenizer(directory)
    return None if tokenizer is None else len(tokenizer)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    """The text tokenizer in `directory`; None where there is no tokenizer.json. No class of the directory's is run.

    Raises InputError when the file is broken.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers package raises bare exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is no tokenizer that can be read ({reason}): copy or download it again.") from error


def token_id(config: Mapping[str, Any], name: str) -> int | None:
    """One special id of a config.json; the first where there are several, None where there is none."""
    value = config.get(name)
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and value >= 0 else None


def text_vocabulary(rows: int, known: Mapping[str, int | None], given: Mapping[str, int], family: str) -> Vocabulary:
    """The ids of a model of text only: a table of `rows`, of which the tokenizer names the first `text_size`.

    `known` is what was found out and `given` what the caller says instead. Raises InputError where an id does not fit.
    """
    found = {"text_size": rows, "image_start": rows, "image_size": 0} | _without_none(known) | dict(given)
    return _vocabulary(found, rows, family)


def shared_vocabulary(rows: int, known: Mapping[str, int | None], given: Mapping[str, int], family: str) -> Vocabulary:
    """The ids of a model of text and pictures: image codes start at `image_start` in a table of `rows`.

    Raises InputError where nobody says where the image codes start or how many they are, or an id does not fit.
    """
    found = _without_none(known) | dict(given)
    if "image_start" not in found and "text_size" in found:
        found["image_start"] = found["text_size"]
    if "text_size" not in found and "image_start" in found:
        found["text_size"] = found["image_start"]
    for name in ("image_start", "image_size"):
        if name not in found:
            raise InputError(
                f"This {family} model of {rows} ids has no tokenizer.json and is not of the published size, so its "
                f"{name} is unknown: put its tokenizer beside the weights, or give vocabulary={{'{name}': ...}} "
                f"(--id {name}=... where a command takes it)."
            )
    return _vocabulary(found, rows, family)


def _vocabulary(found: dict[str, int], rows: int, family: str) -> Vocabulary:
    if "mask_id" not in found:
        raise InputError(
            f"This {family} model's config.json has no mask_token_id and its table of {rows} ids no known one: give "
            "vocabulary={'mask_id': ...} (--id mask_id=... where a command takes it)."
        )
    if found["text_size"] > rows:
        raise InputError(
            f"The tokenizer has {found['text_size']} entries, but this {family} model's table has {rows} rows: it is "
            "another model's tokenizer; copy or download the tokenizer of this one."
        )
    size = found["image_start"] + found["image_size"]
    if size > rows:
        raise InputError(
            f"{found['image_size']} image codes from id {found['image_start']} on need {size} rows, but this {family} "
            f"model's table has {rows}: its tokenizer has the wrong length, or its config.json is another model's."
        )
    for name in SPECIAL:
        found.setdefault(name, -1)
    try:
        return Vocabulary.from_dict(found | {"rows": rows if rows > size else 0})
    except ValueError as error:
        raise InputError(
            f"The ids of this {family} model do not fit together ({error}): its tokenizer or its config.json is "
            "another model's."
        ) from error


def _without_none(values: Mapping[str, int | None]) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}

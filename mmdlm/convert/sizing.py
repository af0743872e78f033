"""How much memory a model takes, from its configuration alone, and how it would best be loaded.

What is counted exactly are the weights. What a forward pass needs on top is an estimate: the widest activations of one
layer and the logits in float32, for the rows that run at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from mmdlm.convert import families
from mmdlm.convert.predictor import model_folder, predictor_config
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictorConfig

# Bytes per number of a matrix in each form. bitsandbytes' 8 bits keep a float32 scale per row, too few to count; its
# 4 bits (nf4) a float32 scale per 64 numbers.
MATRIX_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}
OTHER_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 2.0, "4bit": 2.0}  # what is never quantised stays in bfloat16
CHOICES = ("bfloat16", "8bit", "4bit")  # the best that fits is chosen
GIB = 2**30
_HUB_FILES = ("config.json", "tokenizer.json", "model/config.json")


class Size(NamedTuple):
    """Numbers of a model: all, those in matrices that can be quantised, those in the embedding and the head."""

    parameters: int
    matrices: int
    tables: int


class Plan(NamedTuple):
    """How a model would be loaded on an accelerator: in which form, and how many full rows run at once."""

    form: str
    rows: int


def find_configuration(source: str | Path, *, vocabulary: Mapping[str, int] | None = None) -> MaskPredictorConfig:
    """The configuration of a directory, or of a name of the Hub, of which nothing but configurations is fetched.

    Raises InputError for an unknown format and for a name that cannot be found.
    """
    path = Path(source)
    if not path.is_dir() and str(source).count("/") == 1 and not str(source).startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(str(source), allow_patterns=list(_HUB_FILES)))
        except Exception as error:  # the client raises a dozen kinds; each means that nothing was fetched
            raise InputError(
                f"{source} is no directory here and its config.json could not be fetched from the Hub "
                f"({(str(error).splitlines() or [type(error).__name__])[0]}): check the name and the network."
            ) from error
    if not path.is_dir():
        raise InputError(f"There is no directory {source}: give a directory, or a name of the Hub such as owner/model.")
    return predictor_config(model_folder(path), vocabulary)


def size_of(config: MaskPredictorConfig) -> Size:
    """Counted on an empty model: nothing is allocated."""
    model = families.empty_model(config)
    if config.tie_word_embeddings:
        model.tie_weights()
    matrices = sum(module.weight.numel() for module in model.trunk.modules() if isinstance(module, nn.Linear))
    tables = model.head.weight.numel() * (1 if config.tie_word_embeddings else 2)  # the embedding is as large
    total = sum(parameter.numel() for parameter in model.parameters())
    return Size(total, matrices, tables)


def weight_bytes(size: Size, form: str) -> int:
    """Bytes of the weights in a form of `MATRIX_BYTES`."""
    return round(size.matrices * MATRIX_BYTES[form] + (size.parameters - size.matrices) * OTHER_BYTES[form])


def working_bytes(config: MaskPredictorConfig, form: str) -> int:
    """Estimated bytes that one full row of `max_positions` needs beside the weights."""
    trunk = config.trunk_config()
    width = 4 if form == "float32" else 2
    layer = 8 * trunk.hidden_size + 3 * trunk.intermediate_size
    return config.max_positions * (layer * width + config.shared_vocabulary.table_rows * (width + 4))


def plan(config: MaskPredictorConfig, size: Size, vram: float) -> Plan | None:
    """The best form whose weights and one full row fit into `vram` GiB, and the rows that do; None where none fits."""
    for form in CHOICES:
        left = vram * GIB - weight_bytes(size, form)
        rows = int(left // working_bytes(config, form))
        if rows >= 1:
            return Plan(form, rows)
    return None

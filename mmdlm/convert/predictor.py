"""Loading a language model from a directory or the Hub, straight onto the device and into the dtype asked for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from transformers.utils import logging as transformers_logging

from mmdlm.convert import families
from mmdlm.convert.ids import tokenizer_length
from mmdlm.convert.key_map import Piece, Shapes, by_source, check_names, check_shape, place_piece
from mmdlm.convert.placement import DeviceMap, device_for, device_map_of
from mmdlm.convert.weights import find_directory, read_json, read_shapes, read_tensors, stored_dtype, weight_files
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig

log = logging.getLogger(__name__)
QUANTIZE = ("8bit", "4bit")


def load_predictor(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    quantize: str | None = None,
    vocabulary: Mapping[str, int] | None = None,
    progress: bool = False,
) -> MaskPredictor:
    """The mask predictor of a published model's directory, of a name of the Hub, or of an mmdlm `model/` folder.

    Args:
        source: the directory, or owner/name. A program that lies beside the weights is neither fetched nor run.
        dtype: default the one that the embedding is stored in.
        device_map: a device ("cuda", "cpu"; default), "auto" to spread the model over all devices there are, or
            {module: device}.
        quantize: "8bit" or "4bit" through transformers' own bitsandbytes configuration.
        vocabulary: single ids that replace what was found, such as {"image_start": 126349}.
        progress: show a bar over the bytes read, then what was read; that is logged (INFO) in any case.

    Shards are read one at a time: the host holds at most the largest of them beside the model. Raises InputError for an
    unknown format, a missing or broken file, weights that disagree with config.json, and ids that do not fit.
    """
    if quantize is not None:
        check_quantize(quantize)
    directory = model_folder(find_directory(source))
    config = predictor_config(directory, vocabulary)
    if families.recognise(directory) == families.OWN:
        with bars(progress):
            return _load_own(directory, config, dtype, device_map, quantize)
    files, pieces = checked_files(directory, config)
    if dtype is None:
        table = next(piece.source for piece in pieces if piece.target == "trunk.embed_tokens.weight")
        dtype = stored_dtype(files, table)
    model = families.empty_model(config)
    shapes = families.shapes_of(model)
    placed = {"": torch.device("cpu")} if quantize else device_map_of(model, device_map, dtype)
    state = _read(files, pieces, shapes, dtype, lambda name: device_for(name, placed), progress)
    done = (
        f"Read {directory} ({(config.published or {})['family']}): {len(by_source(pieces))} tensors "
        f"of {len(files)} files, {sum(value.nbytes for value in state.values()) / 2**30:.2f} GiB in {dtype} on "
        f"{', '.join(sorted({str(value.device) for value in state.values()}))}."
    )
    log.info(done)
    if progress:
        tqdm.write(done, file=sys.stderr)
    if quantize:
        with bars(progress):
            return _quantized(None, config, quantize, device_map, dtype, state_dict=state)
    _fill(model, state, placed)
    return model.eval()


def model_folder(directory: Path) -> Path:
    """The folder of the language model: `model/` in a whole model directory of ours, else the directory itself."""
    inside = directory / "model"
    return inside if (inside / "config.json").is_file() and not (directory / "config.json").is_file() else directory


def predictor_config(directory: Path, vocabulary: Mapping[str, int] | None = None) -> MaskPredictorConfig:
    """Our configuration of the model in `directory`; nothing but its config.json and its tokenizer is read.

    Raises InputError for an unknown format, for what cannot be mapped, and for ids that do not fit.
    """
    families.recognise(directory)
    return families.configuration(
        read_json(directory / "config.json"),
        text_length=tokenizer_length(directory),
        vocabulary=vocabulary,
        where=str(directory),
    )


def checked_files(directory: Path, config: MaskPredictorConfig) -> tuple[list[Path], list[Piece]]:
    """The files of a published model and the pieces in them, after their headers were held against its config.json.

    Raises InputError for a missing or broken file and for a tensor that is missing, unknown or misshapen.
    """
    shapes = families.shapes_of(families.empty_model(config))
    pieces, files = families.pieces_of(config, shapes), weight_files(directory)
    stored = {name: shape for name, shape in read_shapes(files).items() if not passed_over(name, config)}
    check_names(stored, pieces, str(directory))
    for name, parts in by_source(pieces).items():
        check_shape(name, stored[name], parts, str(directory))
    return files, pieces


def passed_over(name: str, config: MaskPredictorConfig) -> bool:
    """Whether a published tensor is no part of the model: a computed table, the copy of a tied head, an eye."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if config.tie_word_embeddings and name in ("lm_head.weight", "model.transformer.ff_out.weight"):
        return True
    assert config.published is not None
    others: Sequence[str] = getattr(families.family_module(config.published["family"]), "PASSED_OVER", ())
    return name.startswith(tuple(others))


def _read(
    files: Sequence[Path],
    pieces: Sequence[Piece],
    shapes: Shapes,
    dtype: torch.dtype,
    device_of: Callable[[str], torch.device],
    progress: bool,
) -> dict[str, Tensor]:
    """Our tensors, each placed as soon as it is read."""
    parts, found = by_source(pieces), dict[str, Tensor]()
    total = sum(path.stat().st_size for path in files)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=not progress)
    for path in files:
        for name, tensor in read_tensors(path):
            for piece in parts.get(name, ()):
                # A copy, also where nothing changes: what shares memory with the file would keep all of it.
                moved = tensor.to(device_of(piece.target), dtype, copy=True)
                place_piece(found, piece, moved, shapes)
            bar.update(tensor.nbytes)
    bar.close()
    return found


def _fill(model: MaskPredictor, state: dict[str, Tensor], placed: Mapping[str, torch.device]) -> None:
    """Give an empty model its tensors; computed tables follow to the device of the embedding."""
    if model.config.tie_word_embeddings:
        state["head.weight"] = state["trunk.embed_tokens.weight"]
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    embedding = state["trunk.embed_tokens.weight"]
    model.config.dtype = embedding.dtype
    if len(placed) == 1:
        model.to(embedding.device)
    else:
        from accelerate import dispatch_model

        dispatch_model(model, {name: str(device) for name, device in placed.items()}, main_device=str(embedding.device))


def check_quantize(quantize: str) -> None:
    """InputError for a name that is no quantisation and where bitsandbytes, which computes it, is not installed."""
    if quantize not in QUANTIZE:
        raise InputError(f"quantize is {quantize!r}, expected one of {', '.join(QUANTIZE)}.")
    if not is_bitsandbytes_available():
        raise InputError(
            f"quantize={quantize!r} needs the package bitsandbytes, which is not installed: pip install bitsandbytes."
        )


def _load_own(
    directory: Path,
    config: MaskPredictorConfig,
    dtype: torch.dtype | None,
    device_map: DeviceMap | None,
    quantize: str | None,
) -> MaskPredictor:
    """An mmdlm `model/` folder, which transformers reads by itself."""
    weight_files(directory)
    try:
        if quantize:
            return _quantized(directory, config, quantize, device_map, dtype)
        placed = device_map_of(families.empty_model(config), device_map, dtype)
        model, report = MaskPredictor.from_pretrained(
            directory,
            config=config,
            dtype=dtype or "auto",
            device_map={name: str(device) for name, device in placed.items()},
            output_loading_info=True,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{directory} cannot be loaded ({str(error).splitlines()[0]}): copy all of it again."
        ) from error
    if wrong := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise InputError(f"{directory}: its config.json and its weights disagree about {wrong[0]}: copy both again.")
    loaded: MaskPredictor = model.eval()
    return loaded


def _quantized(
    directory: Path | None,
    config: MaskPredictorConfig,
    quantize: str,
    device_map: DeviceMap | None,
    dtype: torch.dtype | None,
    **settings: Any,
) -> MaskPredictor:
    """The trunk's matrices in 8 or 4 bits. The embedding and the head are used by rows, and stay as they are."""
    compute = dtype or torch.bfloat16
    how = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=["head"],
    )
    target = device_map if device_map is not None else ("cuda:0" if torch.cuda.is_available() else "cpu")
    model: MaskPredictor = MaskPredictor.from_pretrained(
        directory, config=config, dtype=compute, device_map=target, quantization_config=how, **settings
    )
    return model.eval()


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """transformers' own bars over what it reads and writes, only where bars are asked for."""
    before = transformers_logging.is_progress_bar_enabled()
    if not shown:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            transformers_logging.enable_progress_bar()

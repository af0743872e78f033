"""Writing a published model once in our format, and ours back in the format it came in.

Everything is written beside its place and renamed at the end, so that a run that is stopped leaves nothing behind that
looks like a model.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from huggingface_hub import save_torch_state_dict

from mmdlm.convert import families, visual
from mmdlm.convert.ids import read_tokenizer
from mmdlm.convert.predictor import bars, load_predictor, model_folder
from mmdlm.convert.weights import find_directory
from mmdlm.errors import InputError
from mmdlm.model_directory import INDEX as OWN_INDEX
from mmdlm.model_directory import finish_model_directory
from mmdlm.models.mask_predictor import MaskPredictor

SHARD = "5GB"
_INDEX = {
    "_class_name": "TextToImage",
    "_diffusers_version": diffusers.__version__,
    "model": ["mmdlm.models.mask_predictor", "MaskPredictor"],
    "processor": ["mmdlm.processing", "MMDLMProcessor"],
}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    visual_tokenizer: str | Path | None = None,
    vocabulary: Mapping[str, int] | None = None,
    progress: bool = False,
) -> Path:
    """Write the published model `source`, a directory or a name of the Hub, as a model directory of ours.

    A language model becomes `model/`, with its text tokenizer `processor/`. With `visual_tokenizer`, the source of a
    visual tokenizer, or where one lies in the source itself, the directory gets that too and an index, as a whole model
    directory has; a visual tokenizer alone becomes a component. `dtype` defaults to the stored one, `vocabulary` is
    `load_predictor`'s. Returns the destination. Raises InputError where the destination exists, and what
    `load_predictor` and `load_visual_tokenizer` raise; nothing is left behind then.
    """
    destination = Path(destination)
    refuse_existing(destination)
    directory = find_directory(source)
    if _is_visual_tokenizer(directory):
        tokenizer = visual.load_visual_tokenizer(directory, dtype=dtype)
        with beside(destination) as place:
            tokenizer.save_pretrained(place, max_shard_size=SHARD)
        return destination
    if families.recognise(model_folder(directory)) == families.OWN:
        raise InputError(f"{directory} is an mmdlm model already: copy it, or load it in another dtype.")
    if visual_tokenizer is not None and not (directory / "tokenizer.json").is_file():
        raise InputError(f"{directory} has no tokenizer.json, which a whole model needs: put its text tokenizer there.")
    if visual_tokenizer is None and (directory / "vqvae" / "config.json").is_file():
        visual_tokenizer = directory  # Lumina-DiMOO's lies in its own repository
    with beside(destination) as place, bars(progress):
        model = load_predictor(directory, dtype=dtype, vocabulary=vocabulary, progress=progress)
        model.save_pretrained(place / "model", max_shard_size=SHARD)
        text_tokenizer, pictures = read_tokenizer(directory), dict[str, object]()
        if text_tokenizer is not None and visual_tokenizer is not None:
            tokenizer = visual.load_visual_tokenizer(visual_tokenizer, dtype=dtype)
            _check_codes(model, tokenizer.codebook_size)
            pictures = {"image_size": _picture_side(model, tokenizer.downsample)}
            if tokenizer.config.get("layout") == "magvitv2":
                pictures["picture_fit"] = "crop"  # as Show-o and MMaDA prepare theirs
            tokenizer.save_pretrained(place / "visual_tokenizer", max_shard_size=SHARD)
            _write_json(
                place / OWN_INDEX, _INDEX | {"visual_tokenizer": [type(tokenizer).__module__, type(tokenizer).__name__]}
            )
            finish_model_directory(place)
        if text_tokenizer is not None:
            text_tokenizer.save_pretrained(place / "processor")
            # What MMDLMProcessor reads, which stands on the same floor as this and is not imported.
            processor = {"processor_class": "MMDLMProcessor", "vocabulary": model.vocabulary.to_dict()}
            _write_json(place / "processor" / "processor_config.json", processor | pictures)
    return destination


def write_published(model: MaskPredictor, destination: str | Path) -> Path:
    """Write a model in the format it was published in: its config.json and safetensors, sharded where they are large.

    Raises InputError for a model that came from no published one, and where the destination exists.
    """
    destination = Path(destination)
    refuse_existing(destination)
    state, config = families.from_mmdlm(model.state_dict(), model.config)
    with beside(destination) as place:
        save_torch_state_dict({name: value.contiguous() for name, value in state.items()}, place, max_shard_size=SHARD)
        _write_json(place / "config.json", config)
    return destination


def refuse_existing(destination: Path) -> None:
    """InputError when there is something at `destination` already."""
    if destination.exists() or destination.is_symlink():
        raise InputError(f"{destination} exists already and is not written over: name a new directory, or remove it.")


@contextmanager
def beside(destination: Path) -> Iterator[Path]:
    """A directory beside `destination` that takes its name when all went well, and is removed when not."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        place = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise InputError(f"{destination} cannot be written ({error.strerror}): choose another place.") from error
    try:
        yield place
        place.chmod(0o755)  # mkdtemp's own is closed to everybody else
        refuse_existing(destination)
        place.rename(destination)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise


def _is_visual_tokenizer(directory: Path) -> bool:
    """Whether the directory is one of a visual tokenizer. InputError when it is of no kind that is known."""
    try:
        families.recognise(model_folder(directory))
        return False
    except InputError as error:
        try:
            visual.recognise_visual_tokenizer(visual.read_configuration(directory), str(directory))
            return True
        except InputError:
            raise error from None


def _picture_side(model: MaskPredictor, downsample: int) -> int:
    """Pixels on a side of the square pictures that a published model draws by default; 32 x 32 codes where unsaid."""
    codes = (model.config.published or {}).get("config", {}).get("num_vq_tokens") or 1024
    return math.isqrt(int(codes)) * downsample


def _check_codes(model: MaskPredictor, codes: int) -> None:
    if codes != model.vocabulary.image_size:
        raise InputError(
            f"The visual tokenizer has {codes} codes, the model was made for {model.vocabulary.image_size}: give the "
            "visual tokenizer the model was trained with."
        )


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

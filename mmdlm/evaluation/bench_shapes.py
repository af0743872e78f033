"""Models to be timed when none is at hand: named shapes with random weights, and a small trained model made as wide.

Arithmetic of `small`. For a place, a forward multiplies with the trunk's 4 D^2 + 3 D M weights a layer and with the
head's D V. MMaDA-8B (arXiv:2505.15809): D = 4,096, M = 12,288, 32 layers, V = 134,656 rows, 8,192 of them image codes:
trunk 6.979e9, head 0.552e9, head over trunk 7.9 %, codes 6.08 % of the rows, M = 3 D. With D = 512, M = 1,536 and 8
layers the trunk has 27.26e6 weights, so 7.9 % of it is a head of 4,208 rows: 3,952 text ids and 256 codes (6.08 %). A
picture is 16 x 16 codes, not 32 x 32, and the room for its prompt again half as many places as codes: 128, not 512.

D width, M width of the MLP, V rows of the head.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmdlm.convert import mmada, sizing
from mmdlm.errors import InputError
from mmdlm.models.mask_predictor import MaskPredictor, MaskPredictorConfig
from mmdlm.vocabulary import Vocabulary

_SPECIAL = ("pad", "mask", "bos", "eos", "boi", "eoi", "draw", "describe", "ask")


class Shape(NamedTuple):
    """A model's configuration, and the published workloads at its size."""

    name: str
    config: MaskPredictorConfig
    grid: tuple[int, int]  # codes of a picture
    room: int  # places that the published loop pads a picture's prompt to
    prompt: tuple[int, int]  # tokens of a picture's prompt, from and to
    given: tuple[int, int] = (64, 128)  # tokens of a text's prompt, from and to
    answer: int = 128  # LLaDA's: 128 new tokens in blocks of 32, one a pass
    block: int = 32
    answer_steps: int = 128
    picture_steps: int = 18  # MMaDA's
    scale: float = 4.5  # MMaDA's guidance_scale 3.5, which is counted from 0


def named_shape(name: str) -> Shape:
    """The shape `small` or `8b`; InputError for another name."""
    if name == "small":
        return Shape(name, _small_config(), (16, 16), 128, (4, 16))
    if name == "8b":
        config = mmada.configuration(mmada.PUBLISHED_CONFIG)
        return Shape(name, config, (32, 32), 512, (16, 64))
    raise InputError(f"--shape is {name!r}, expected small (for a CPU) or 8b (for a GPU).")


def with_answer(shape: Shape, length: int | None) -> Shape:
    """The shape with answers of `length` tokens, a pass each; None leaves it. InputError where blocks do not divide."""
    if length is None:
        return shape
    block = min(shape.block, length)
    if length < 1 or length % block:
        raise InputError(f"--answer is {length}, expected a multiple of {block}, the length of a block.")
    return shape._replace(answer=length, block=block, answer_steps=length)


def shape_of(config: MaskPredictorConfig) -> Shape:
    """The published workloads for a predictor of any size, as large as its positions allow, up to the 8B's."""
    positions = config.max_positions
    side = next((side for side in (32, 16, 8, 4) if side * side * 3 // 2 + 8 <= positions), 2)
    room = max(side * side // 2, 4)
    answer = next((length for length in (128, 64, 32, 16, 8) if 3 * length <= positions), 4)
    return Shape(
        "directory", config, (side, side), room, (max(room // 32, 1), max(room // 8, 1)),
        (answer // 2, answer), answer, max(answer // 4, 1), answer,
    )  # fmt: skip


def _small_config() -> MaskPredictorConfig:
    trunk = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
    }  # fmt: skip
    special = {f"{word}_id": number for number, word in enumerate(_SPECIAL)}
    vocabulary = Vocabulary(text_size=3952, image_start=3952, image_size=256, **special)
    return MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), max_positions=1024)


def head_over_trunk(config: MaskPredictorConfig) -> float:
    """Weights of the head over those of the trunk's layers, which is their share of the products per place."""
    trunk = config.trunk_config()
    heads = trunk.num_attention_heads
    kv = trunk.hidden_size * getattr(trunk, "num_key_value_heads", heads) // heads
    attention = 2 * trunk.hidden_size**2 + 2 * trunk.hidden_size * kv
    layer = attention + 3 * trunk.hidden_size * trunk.intermediate_size
    return config.shared_vocabulary.table_rows * trunk.hidden_size / (layer * trunk.num_hidden_layers)


def random_model(shape: Shape, *, device: str, dtype: torch.dtype, seed: int) -> MaskPredictor:
    """A model of random weights, for timing: it has learned nothing, but its places differ and it has favourites.

    Weights of variance 1 / fan-in and embeddings of variance 1. With a training run's small start all masked places
    would look alike, and which is surest would hang on the last bit. InputError where memory is lacking.
    """
    check_fits(shape.config, device, dtype)
    before = torch.get_default_dtype()
    torch.manual_seed(seed)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = MaskPredictor(shape.config)
    finally:
        torch.set_default_dtype(before)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    return model.eval()


def check_fits(config: MaskPredictorConfig, device: str, dtype: torch.dtype) -> None:
    """InputError where a model of this size does not fit into the device's free memory, before anything is made."""
    form = "float32" if dtype == torch.float32 else "bfloat16"
    # two rows of guidance at once, as the published loop runs them
    need = sizing.weight_bytes(sizing.size_of(config), form) + 2 * sizing.working_bytes(config, form)
    free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else _free_memory()
    if need > free:
        raise InputError(
            f"A model of this shape takes about {need / sizing.GIB:.1f} GiB in {form}, on {device} "
            f"{free / sizing.GIB:.1f} GiB are free: take --shape small, a larger machine, or another --dtype."
        )


def _free_memory() -> float:
    """Bytes of main memory that are free; infinite where the system does not tell."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {line.split(":")[0]: line.split()[1] for line in lines}
        return int(found["MemAvailable"]) * 1024.0
    except (OSError, KeyError, ValueError, IndexError):
        return math.inf


# ---------------------------------------------------------------- a trained model at another width


def widened(model: MaskPredictor, config: MaskPredictorConfig) -> MaskPredictor:
    """`model` inside the wider trunk and the larger head of `config`, all other weights zero: the same predictions.

    What it computes is the small model's to rounding, what it costs is the large one's: every product has the large
    shape, and zeros multiply no faster. So the approximate settings are timed at one size on what another has learned.
    Codes' bits, folding and image places stay the model's own. Norms divide by the root mean square of D features,
    now mostly zeros: their weights are scaled by sqrt(d / D) and their epsilon by d / D. InputError where it does not
    fit into the shape.
    """
    small, large = model.config.trunk_config(), config.trunk_config()
    ratio = small.hidden_size / large.hidden_size
    per_head = small.hidden_size // small.num_attention_heads
    if small.model_type != "llama" or ratio > 1 or large.hidden_size % per_head or (
        small.num_hidden_layers > large.num_hidden_layers or small.num_key_value_heads != small.num_attention_heads
    ):
        raise InputError("This model does not fit into the shape, expected a smaller Llama: take another model.")
    heads = large.hidden_size // per_head
    trunk: dict[str, Any] = {
        **model.config.trunk, "hidden_size": large.hidden_size, "intermediate_size": large.intermediate_size,
        "num_hidden_layers": large.num_hidden_layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": per_head, "rms_norm_eps": small.rms_norm_eps * ratio, "layer_types": None,
    }  # fmt: skip
    vocabulary = Vocabulary.from_dict(
        model.vocabulary.to_dict() | {"rows": max(model.vocabulary.table_rows, config.shared_vocabulary.table_rows)}
    )
    own = ("code_bits", "bit_order", "image_side", "image_fold", "prediction_offset", "max_positions")
    settings = {name: getattr(model.config, name) for name in own}
    wide = MaskPredictor(MaskPredictorConfig(trunk=trunk, vocabulary=vocabulary.to_dict(), **settings))
    wide = wide.to(model.dtype).eval()
    fold = settings["image_fold"] ** 2
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.zero_()
        target = wide.state_dict()
        for name, weight in model.state_dict().items():
            if name in ("fold.weight", "unfold.weight"):  # k*k pieces of D features side by side
                split = target[name].unflatten(int(name == "fold.weight"), (fold, large.hidden_size))
                _put(split, weight.unflatten(int(name == "fold.weight"), (fold, small.hidden_size)))
            elif weight.dim() == 1:
                _put(target[name], weight * math.sqrt(ratio))
            else:
                _put(target[name], weight)
    return wide


def _put(into: Tensor, weight: Tensor) -> None:
    into[tuple(slice(0, size) for size in weight.shape)] = weight

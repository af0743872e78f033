"""Open-MAGVIT2's picture tokenizer (arXiv 2409.04410): LFQTokenizer's layout "open_magvit2".

Channel 0 weighs least in a code. Published are Lightning checkpoints: beside the tokenizer's tensors they hold the
discriminator's (`loss.*`, left out) and, with `use_ema`, the averaged weights under `model_ema.` and the names without
their dots. The averaged ones are what the authors measure with, and what is read unless asked otherwise.

Up-sampling unfolds 4C channels as (row, column, C), our pixel shuffle as (C, row, column): the rows of that one
convolution are reordered, and the block is ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdlm.convert import key_map
from mmdlm.convert.key_map import Piece, Shapes
from mmdlm.convert.level_names import COMMON, only, source_name, whole_number, whole_numbers, widths
from mmdlm.errors import InputError
from mmdlm.models.visual_tokenizer import LFQTokenizer

FAMILY = "Open-MAGVIT2"
CLASS_PATH = "src.Open_MAGVIT2.models.lfqgan.VQModel"

RULES = (
    *COMMON,
    (r"^encoder\.downs\.(\d+)\.1\.", r"encoder.down.\1.downsample."),
    (r"^decoder\.ups\.(\d+)\.0\.", r"decoder.up.\1.upsample.conv1."),
    (r"^decoder\.modulations\.(\d+)\.scale\.", r"decoder.adaptive.\1.gamma."),
    (r"^decoder\.modulations\.(\d+)\.shift\.", r"decoder.adaptive.\1.beta."),
    (r"\.middle\.", ".mid_block."),
)
AVERAGED, _LEFT_OUT = "model_ema.", ("loss.", "model_ema.")


def build(config: Mapping[str, Any]) -> LFQTokenizer:
    """The tokenizer that config.json describes, its weights as they are drawn."""
    return LFQTokenizer(**configuration(config))


def arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """`model.init_args` of the published YAML, or of the same tables in a config.json."""
    model = config.get("model")
    found = model.get("init_args") if isinstance(model, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(found.get("ddconfig"), Mapping):
        raise InputError("The configuration has no model.init_args.ddconfig: copy the tokenizer's YAML beside it.")
    return dict(found)


def uses_average(config: Mapping[str, Any]) -> bool:
    """Whether the authors use the moving average of the weights."""
    return bool(arguments(config).get("use_ema", False))


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json (or the YAML it mirrors) -> LFQTokenizer's arguments. InputError where it cannot be."""
    where, settings = "The ddconfig in config.json", arguments(config)
    shape = dict(settings["ddconfig"])
    only(shape, where, in_channels=3, out_ch=3, double_z=False)
    bits = whole_number(shape, "z_channels", where)
    entries, dimension = settings.get("n_embed", 2**bits), settings.get("embed_dim", bits)
    if (entries, dimension) != (2**bits, bits):
        raise InputError(
            f"The config.json has z_channels {bits}, n_embed {entries} and embed_dim {dimension}, expected n_embed "
            f"{2**bits} and embed_dim {bits}: copy or download it again."
        )
    factors = tuple(settings.get("factorized_bits") or ()) or None
    levels = widths(whole_number(shape, "ch", where), whole_numbers(shape, "ch_mult", where))
    blocks = (whole_number(shape, "num_res_blocks", where),) * len(levels)
    return {
        "layout": "open_magvit2",
        "sample_size": whole_number(shape, "resolution", where),
        "codebook_bits": bits,
        "code_factors": factors,
        "encoder_widths": levels,
        "decoder_widths": levels,
        "encoder_blocks": blocks,
        "decoder_blocks": blocks,
        "stem_width": shape["ch"],
        "stem_patch": 1,
        "code_modulation": True,
        "bit_order": "little",
    }


def published_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """LFQTokenizer's config -> the published tables, for weights under their plain names (no `use_ema`)."""
    stem, blocks = config["stem_width"], set(config["encoder_blocks"]) | set(config["decoder_blocks"])
    same = list(config["encoder_widths"]) == list(config["decoder_widths"])
    if not same or len(blocks) > 1 or any(width % stem for width in config["encoder_widths"]):
        raise InputError(
            f"The tokenizer has widths {config['encoder_widths']} and {config['decoder_widths']} and blocks "
            f"{sorted(blocks)}, expected the same multiples of {stem} on both sides and one number of blocks: the "
            "published class cannot say anything else."
        )
    shape = {
        "double_z": False,
        "z_channels": config["codebook_bits"],
        "resolution": config["sample_size"],
        "in_channels": 3,
        "out_ch": 3,
        "ch": stem,
        "ch_mult": [width // stem for width in config["encoder_widths"]],
        "num_res_blocks": blocks.pop(),
    }
    settings = {
        "ddconfig": shape,
        "n_embed": 2 ** config["codebook_bits"],
        "embed_dim": config["codebook_bits"],
        "use_ema": False,
        "token_factorization": False,
    }
    if config["code_factors"]:
        settings["factorized_bits"] = list(config["code_factors"])
    return {"model": {"class_path": CLASS_PATH, "init_args": settings}}


def pieces(shapes: Shapes) -> list[Piece]:
    """Every published tensor of the tokenizer itself; `shapes` are those of our tensors."""
    found = []
    for name, shape in shapes.items():
        source = source_name(name, shapes, RULES)
        if ".ups." not in name:
            found.append(Piece(source, shape, name))
            continue
        quarter = shape[0] // 4
        found += [
            Piece(source, shape, name, (slice(place * quarter, (place + 1) * quarter),), (slice(place, None, 4),))
            for place in range(4)
        ]
    return found


def to_mmdlm(state: Mapping[str, Tensor], shapes: Shapes, *, averaged: bool = False) -> dict[str, Tensor]:
    """Published tensors -> ours; `averaged` takes the moving average instead of the last weights.

    Raises InputError for missing, unknown or misshapen tensors.
    """
    parts = pieces(shapes)
    if averaged:
        names = {AVERAGED + name.replace(".", ""): name for name in key_map.source_shapes(parts)}
        if not any(name in state for name in names):
            raise InputError(
                "The checkpoint has no averaged weights (model_ema.*), though its configuration has use_ema: load it "
                "with averaged=False."
            )
        chosen = {names[name]: tensor for name, tensor in state.items() if name in names}
    else:
        chosen = {name: tensor for name, tensor in state.items() if not name.startswith(_LEFT_OUT)}
    return key_map.to_mmdlm(chosen, parts, shapes)


def from_mmdlm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> published tensors under their plain names."""
    return key_map.from_mmdlm(state, pieces({name: tuple(tensor.shape) for name, tensor in state.items()}))

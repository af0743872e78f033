"""The `magvitv2` tokenizer of Show-o and MMaDA (arXiv 2408.12528, 2505.15809): LFQTokenizer's layout "magvitv2".

Channel 0 weighs most in a code. The published config.json names no architecture: it is then the one the weights of
showlab/magvitv2 have, 16 pixels per code and 2^13 codes. Its training losses are LFQ's with one entropy per bit:
commitment times 0.1 x 1.25, and 0.1 x (per-sample - codebook entropy) / d at temperature 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmdlm.convert import key_map
from mmdlm.convert.key_map import Piece, Shapes
from mmdlm.convert.level_names import COMMON, level_pieces, only, whole_number, whole_numbers, widths
from mmdlm.errors import InputError
from mmdlm.models.lfq import bit_weights, codes_to_bits
from mmdlm.models.visual_tokenizer import LFQTokenizer

FAMILY = "MAGVITv2"
PUBLISHED_ENCODER = {
    "ch": 128,
    "ch_mult": [1, 2, 2, 4, 4],
    "num_res_blocks": [4, 3, 4, 3, 4],
    "attn_resolutions": [5],
    "resolution": 256,
    "z_channels": 13,
}
PUBLISHED_DECODER = PUBLISHED_ENCODER | {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": [4, 4, 3, 4, 3]}
# Weights of the training losses beside LFQ's own: commitment (with beta on top), entropies.
COMMITMENT_WEIGHT, ENTROPY_WEIGHT = 0.1 * (1 + 0.25), 0.1

RULES = (
    *COMMON,
    (r"^encoder\.projection\.", "encoder.quant_conv."),
    (r"^decoder\.projection\.", "decoder.post_quant_conv."),
    (r"^encoder\.downs\.(\d+)\.1\.", r"encoder.down.\1.downsample.conv."),
    (r"^decoder\.ups\.(\d+)\.1\.", r"decoder.up.\1.upsample.conv."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"\.attn_1\.query\.", ".attn_1.q."),
    (r"\.attn_1\.key\.", ".attn_1.k."),
    (r"\.attn_1\.value\.", ".attn_1.v."),
    (r"\.attn_1\.out\.", ".attn_1.proj_out."),
)
_EMBEDDING, _WEIGHTS = "quantize.embedding", "quantize.power_vals"


def build(config: Mapping[str, Any]) -> LFQTokenizer:
    """The tokenizer that config.json describes, its weights as they are drawn."""
    return LFQTokenizer(**configuration(config))


def configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> LFQTokenizer's arguments; what it does not say is as published. InputError where it cannot be."""
    encoder: dict[str, Any] = {**PUBLISHED_ENCODER, **(config.get("encoder") or {})}
    decoder: dict[str, Any] = {**PUBLISHED_DECODER, **(config.get("decoder") or {})}
    found: dict[str, Any] = {}
    for name, settings in (("encoder", encoder), ("decoder", decoder)):
        where = f"The {name} in config.json"
        only(settings, where, in_ch=3, out_ch=3, double_z=False)
        found[f"{name}_widths"] = widths(whole_number(settings, "ch", where), whole_numbers(settings, "ch_mult", where))
        found[f"{name}_blocks"] = _blocks(settings, where)
        resolutions = [
            whole_number(settings, "resolution", where) // 2**level for level in range(len(settings["ch_mult"]))
        ]
        if attending := sorted(set(resolutions) & set(settings["attn_resolutions"])):
            raise InputError(
                f"{where} asks for attention at a resolution of {attending[0]}, expected none: only the middle "
                "attends in the published weights, and nothing else can be run here."
            )
    bits = whole_number(encoder, "z_channels", "The encoder in config.json")
    dimension = (config.get("quantize") or {}).get("codebook_dim", bits)
    if not bits == decoder["z_channels"] == dimension:
        raise InputError(
            f"The config.json has z_channels {bits} in the encoder and {decoder['z_channels']} in the decoder and "
            f"codebook_dim {dimension}, expected three times the same: copy or download it again."
        )
    return found | {
        "layout": "magvitv2",
        "sample_size": encoder["resolution"],
        "codebook_bits": bits,
        "stem_width": encoder["ch"],
        "stem_patch": 1,
        "entropy_temperature": 1.0,
        "entropy_group_bits": 1,
        "bit_order": "big",
    }


def published_configuration(config: Mapping[str, Any]) -> dict[str, Any]:
    """LFQTokenizer's config -> the arguments of the published classes, as `configuration` reads them."""
    shared = {
        "ch": config["stem_width"],
        "attn_resolutions": [],
        "resolution": config["sample_size"],
        "z_channels": config["codebook_bits"],
        "in_ch": 3,
        "out_ch": 3,
        "double_z": False,
    }
    found: dict[str, Any] = {"_class_name": FAMILY, "quantize": {"codebook_dim": config["codebook_bits"]}}
    for name in ("encoder", "decoder"):
        if odd := [width for width in config[f"{name}_widths"] if width % config["stem_width"]]:
            raise InputError(
                f"The {name} has {odd[0]} channels, expected multiples of the stem's {config['stem_width']}: the "
                "published classes cannot say anything else."
            )
        multipliers = [width // config["stem_width"] for width in config[f"{name}_widths"]]
        found[name] = shared | {"ch_mult": multipliers, "num_res_blocks": list(config[f"{name}_blocks"])}
    return found


def pieces(shapes: Shapes) -> list[Piece]:
    """Every published tensor but the two tables of bits, which say nothing of their own."""
    return level_pieces(shapes, RULES)


def to_mmdlm(state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Published tensors -> ours. InputError for missing, unknown or misshapen ones, and for another order of bits."""
    state = dict(state)
    for name, expected in _tables(shapes).items():
        found = state.pop(name, expected)
        if found.shape != expected.shape or not torch.equal(found.to("cpu", expected.dtype), expected):
            raise InputError(
                f"{name} is not the table of {expected.shape[0]} rows whose first channel weighs most: the weights "
                "are of another tokenizer, or the config.json is."
            )
    return key_map.to_mmdlm(state, pieces(shapes), shapes)


def from_mmdlm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours -> published tensors, the two tables of bits included."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return key_map.from_mmdlm(state, pieces(shapes)) | _tables(shapes)


def _tables(shapes: Shapes) -> dict[str, Tensor]:
    bits = shapes["encoder.out.weight"][0]
    return {_EMBEDDING: codes_to_bits(torch.arange(2**bits), bits, "big"), _WEIGHTS: bit_weights(bits, "big")}


def _blocks(settings: dict[str, Any], where: str) -> tuple[int, ...]:
    if isinstance(settings["num_res_blocks"], int):
        return (whole_number(settings, "num_res_blocks", where),) * len(settings["ch_mult"])
    return whole_numbers(settings, "num_res_blocks", where)

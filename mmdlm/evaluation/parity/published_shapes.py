"""The published architectures at their full size, without weights: every tensor's name and shape.

A model of the published size is built on the meta device and named as its authors name it; nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmdlm.convert import configuration, families, llada, magvitv2, mmada, open_magvit2, visual
from mmdlm.convert.key_map import source_shapes
from mmdlm.convert.weights import read_json
from mmdlm.evaluation.parity import Case, Check

Shapes = dict[str, tuple[int, ...]]
# The language models are told apart by the rows of their embedding.
_LANGUAGE = {module.PUBLISHED_ROWS: module.PUBLISHED_CONFIG for module in (llada, mmada)}
_EMBEDDING = "model.transformer.wte.weight"


def checks(case: Case) -> Iterator[Check]:
    """For every recorded architecture: its names and shapes, and the numbers in all."""
    for name in case.spec["files"]:
        recorded = read_json(case.directory / f"{name}.json")
        expected = {key: tuple(shape) for key, (shape, _) in recorded["keys"].items()}
        found = built(expected, recorded)
        if found is None:
            yield Check(f"{name} shapes", "unknown", False, "no published architecture has an embedding of this size")
            continue
        yield _same(f"{name} names and shapes", found, expected)
        got, wanted = sum(math.prod(shape) for shape in found.values()), int(recorded["parameters"])
        yield Check(f"{name} parameters", "equal" if got == wanted else f"{got}, expected {wanted}", got == wanted)


def built(expected: Shapes, recorded: Mapping[str, Any]) -> Shapes | None:
    """Names and shapes as the authors have them, of the model that we build; None for a size that nobody published."""
    if _EMBEDDING in expected:
        config = _LANGUAGE.get(expected[_EMBEDDING][0])
        return None if config is None else language_shapes(config)
    if "ddconfig" in recorded:
        bits = recorded["ddconfig"]["z_channels"]
        arguments = {"ddconfig": recorded["ddconfig"], "embed_dim": bits, "n_embed": 2**bits}
        tokenizer = visual.empty_tokenizer(open_magvit2, {"model": {"init_args": arguments}})
        back = open_magvit2.from_mmdlm(tokenizer.state_dict())
    else:
        tokenizer = visual.empty_tokenizer(magvitv2, {"_class_name": magvitv2.FAMILY})
        back = magvitv2.from_mmdlm(tokenizer.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in back.items()}


def language_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a language model's tensors in its published form, from its config.json alone."""
    ours = configuration(config)
    return source_shapes(families.pieces_of(ours, families.shapes_of(families.empty_model(ours))))


def _same(name: str, found: Shapes, expected: Shapes) -> Check:
    wrong = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
    if not wrong:
        return Check(name, f"equal ({len(expected)})", True)
    first = f"{wrong[0]}: {found.get(wrong[0])}, expected {expected.get(wrong[0])}"
    return Check(name, f"{len(wrong)} of {len(expected)} differ", False, first)

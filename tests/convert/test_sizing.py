"""Parameters and memory from the configuration alone."""

from __future__ import annotations

import pytest

from mmdlm.convert import configuration
from mmdlm.convert.llada import PUBLISHED_CONFIG as LLADA_8B
from mmdlm.convert.sizing import GIB, find_configuration, plan, size_of, weight_bytes
from mmdlm.errors import InputError


@pytest.fixture(scope="module")
def large():
    """LLaDA-8B's configuration and size."""
    config = configuration(LLADA_8B)
    return config, size_of(config)


def test_llada_8b_is_counted_exactly(large):
    _, size = large
    assert size.parameters == 8015581184  # as published, see tests/parity/recorded/published-shapes
    assert size.tables == 2 * 126464 * 4096
    assert size.matrices == 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
    assert weight_bytes(size, "float32") == 4 * size.parameters == 2 * weight_bytes(size, "bfloat16")
    others = size.parameters - size.matrices
    assert weight_bytes(size, "8bit") == size.matrices + 2 * others
    assert weight_bytes(size, "4bit") == size.matrices // 2 + size.matrices // 16 + 2 * others


def test_the_best_form_that_fits_is_chosen(large):
    config, size = large
    assert plan(config, size, 80).form == "bfloat16"
    assert plan(config, size, 14).form == "8bit"
    assert plan(config, size, 10).form == "4bit"
    assert plan(config, size, 4) is None
    assert plan(config, size, 80).rows > plan(config, size, 24).rows >= 1
    assert weight_bytes(size, "bfloat16") / GIB == pytest.approx(14.93, abs=0.01)


def test_a_tied_table_is_counted_once(llada):
    config = llada[0]
    apart, tied = size_of(configuration(config)), size_of(configuration(config | {"weight_tying": True}))
    assert apart.parameters - tied.parameters == tied.tables == 72 * 32


def test_our_own_model_is_sized_too(tiny_model):
    config = find_configuration(tiny_model)
    assert size_of(config).parameters > 0
    with pytest.raises(InputError, match="There is no directory"):
        find_configuration(tiny_model / "nothing")

"""Who sees whom, written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmdlm import attention


def drawing(mask: torch.Tensor) -> list[str]:
    """The first row's mask [1, 1, queries, keys], one string per query: x seen, . not seen."""
    return ["".join("x" if seen else "." for seen in query) for query in mask[0, 0].tolist()]


def test_full():
    assert attention.full(torch.ones(2, 3, dtype=torch.bool)) is None
    seen = attention.full(torch.tensor([[True, True, False], [True, True, True]]))
    assert seen is not None and seen.shape == (2, 1, 1, 3)
    assert seen[:, 0, 0].tolist() == [[True, True, False], [True, True, True]]


def test_documents():
    assert drawing(attention.documents(torch.tensor([[4, 4, 7, 7, 7, -1]]))) == [
        "xx....",
        "xx....",
        "..xxx.",
        "..xxx.",
        "..xxx.",
        ".....x",
    ]


def test_block_causal():
    assert drawing(attention.block_causal(torch.tensor([[0, 0, 1, 2, 2]]))) == [
        "xx...",
        "xx...",
        "xxx..",
        "xxxxx",
        "xxxxx",
    ]


def test_block_causal_in_documents():
    blocks, ids = torch.tensor([[0, 1, 0, 0, 1]]), torch.tensor([[0, 0, 1, 1, 1]])
    assert drawing(attention.block_causal(blocks, document_ids=ids)) == ["x....", "xx...", "..xx.", "..xx.", "..xxx"]


def test_noisy_clean():
    assert drawing(attention.noisy_clean(torch.tensor([[0, 0, 1, 2]]))) == [
        "xx......",  # noisy: its own noisy block, and the clean blocks before it
        "xx......",
        "..x.xx..",
        "...xxxx.",
        "....xx..",  # clean: the clean blocks up to its own
        "....xx..",
        "....xxx.",
        "....xxxx",
    ]


def test_noisy_clean_in_documents():
    blocks, ids = torch.tensor([[0, 1, 0, 1]]), torch.tensor([[0, 0, 1, 1]])
    assert drawing(attention.noisy_clean(blocks, document_ids=ids)) == [
        "x.......",
        ".x..x...",
        "..x.....",
        "...x..x.",
        "....x...",
        "....xx..",
        "......x.",
        "......xx",
    ]


def test_every_query_sees_something_and_attention_takes_the_masks():
    ids = torch.tensor([[0, 0, 1, -1], [2, 2, 2, 2]])
    blocks = torch.tensor([[0, 1, 0, 0], [0, 0, 1, 1]])
    values = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0))
    for seen in (
        attention.documents(ids),
        attention.block_causal(blocks, document_ids=ids),
        attention.noisy_clean(blocks, document_ids=ids),
    ):
        rows = values[:, :, : seen.shape[-1]]
        assert F.scaled_dot_product_attention(rows, rows, rows, attn_mask=seen).isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected bool \[B, L\]"):
        attention.full(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected integers \[B, L\]"):
        attention.documents(torch.ones(3, dtype=torch.long))

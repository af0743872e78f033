"""The lookup-free quantizer: the cheap entropy against the form that lists all codes, and the codes themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdlm.models.lfq import (
    Entropies,
    FiniteScalarQuantizer,
    LookupFreeQuantizer,
    bit_weights,
    bits_to_codes,
    codes_to_bits,
    entropies,
    entropies_dense,
    join_codes,
    split_codes,
)


def vectors(count: int, bits: int, scale: float = 0.5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(count, bits, generator=torch.Generator().manual_seed(bits), dtype=dtype) * scale


def gradients(found: Entropies, z: torch.Tensor) -> list[torch.Tensor]:
    return [torch.autograd.grad(value, z, retain_graph=True)[0] for value in found]


@pytest.mark.parametrize("temperature", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("bits", [1, 2, 5, 8, 9])
def test_the_cheap_entropies_equal_the_dense_ones(bits: int, temperature: float):
    z = vectors(7, bits).requires_grad_()
    cheap, dense = entropies(z, temperature), entropies_dense(z, temperature)
    torch.testing.assert_close(cheap, dense, rtol=1e-11, atol=1e-11)
    # where a gradient is 1 / temperature times a difference of nearly equal numbers, rounding grows with it
    torch.testing.assert_close(gradients(cheap, z), gradients(dense, z), rtol=1e-9, atol=1e-11 / temperature)


def test_entropies_on_a_hand_case():
    # Two vectors of two bits. The first bit is undecided, the second certain and different in both.
    z = torch.tensor([[0.0, 5.0], [0.0, -5.0]], dtype=torch.float64)
    found = entropies(z, 0.01)
    assert float(found.per_sample) == pytest.approx(math.log(2), abs=1e-12)
    assert float(found.codebook) == pytest.approx(math.log(4), abs=1e-12)


def test_no_precision_is_lost_far_from_the_border():
    # H of a coin with logit x = 4 z / temperature is (1 + x) e^-x there, to first order.
    z = torch.tensor([[0.06, -0.06]], dtype=torch.float64)
    assert float(entropies(z, 0.01).per_sample) == pytest.approx(2 * (1 + 24) * math.exp(-24), rel=1e-6, abs=0)
    extreme = torch.tensor([[300.0, -300.0]], requires_grad=True)
    found = entropies(extreme, 0.01)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(found, extreme))
    assert [value.item() for value in found] == [0.0, 0.0]


@pytest.mark.parametrize("inverse_temperature", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("bits", [1, 3, 6])
def test_entropies_equal_those_of_vector_quantize_pytorch(bits: int, inverse_temperature: float):
    from vector_quantize_pytorch import LFQ

    # Its codes are +-codebook_scale = +-1, its logits 2 * inv_temperature * z . code: its temperature is our inverse.
    theirs = LFQ(codebook_size=2**bits, dim=bits, force_quantization_f32=False).double().train()
    z = vectors(12, bits)
    _, breakdown = theirs(z.unsqueeze(0), inv_temperature=inverse_temperature, return_loss_breakdown=True)
    ours = entropies(z, 1 / inverse_temperature)
    # Its logarithm is clamped at 1e-5: a probability p below that is off by p ln(1e-5 / p), at most 1e-5 / e.
    slack = 2**bits * 1e-5 / math.e if inverse_temperature >= 1 else 0.0
    assert float(ours.per_sample) == pytest.approx(float(breakdown.per_sample_entropy), abs=1e-12 + slack)
    assert float(ours.codebook) == pytest.approx(float(breakdown.batch_entropy), abs=1e-12 + slack)


def test_both_quantizers_number_the_codes_alike():
    from vector_quantize_pytorch import LFQ

    z = vectors(50, 6, dtype=torch.float32)
    _, codes, _ = LFQ(codebook_size=64, dim=6).eval()(z.unsqueeze(0))
    assert torch.equal(bits_to_codes(z), codes[0].long())


def test_groups_of_bits_bound_the_codebook_entropy_from_above():
    z = vectors(64, 9)
    z[:, 5] = z[:, 0]  # bits of different groups that say the same: the bound is not tight
    joint = entropies(z, 0.3)
    for group_bits in (1, 2, 4, 7):
        grouped = entropies(z, 0.3, group_bits=group_bits)
        assert float(grouped.per_sample) == float(joint.per_sample)
        assert float(joint.codebook) + 0.01 < float(grouped.codebook) <= 9 * math.log(2)
    assert float(entropies(z, 0.3, group_bits=9).codebook) == float(joint.codebook)


def test_groups_are_exact_where_they_are_independent():
    # Every first pair of bits with every second pair: the batch mean is a product over the groups.
    pair = vectors(4, 2)
    z = torch.cat([pair.repeat_interleave(4, 0), pair.flip(0).repeat(4, 1)], 1)
    assert float(entropies(z, 0.5, group_bits=2).codebook) == pytest.approx(
        float(entropies(z, 0.5).codebook), abs=1e-12
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation makes, backward included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
        return out


@pytest.mark.parametrize(("count", "largest"), [(40, 2**18), (600, 600 * 2**9)])
def test_two_to_the_eighteen_codes_need_no_table_of_them_per_vector(count: int, largest: int):
    z = vectors(count, 18, dtype=torch.float32).requires_grad_()
    with LargestTensor() as seen:
        found = entropies(z, 0.01)
        (found.per_sample - found.codebook).backward()
    assert 0 < seen.elements <= largest
    with LargestTensor() as seen:
        LookupFreeQuantizer(18, group_bits=6).train()(z.detach().view(1, -1, 18, 1).movedim(2, 1))
    assert seen.elements <= count * 18 * 4


def test_the_product_of_the_tables_stays_in_float32_under_autocast():
    z = vectors(32, 8, dtype=torch.float32)
    plain = entropies(z, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(entropies(z, 0.3).codebook, plain.codebook)
        assert entropies(z.bfloat16(), 0.3).codebook.dtype == torch.float32


def test_codes_and_bits_go_both_ways():
    assert bit_weights(3).tolist() == [4, 2, 1] and bit_weights(3, "little").tolist() == [1, 2, 4]
    signs = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, 0.5], [0.0, 0.0, 0.0]])  # a zero is a -1
    assert bits_to_codes(signs).tolist() == [4, 1, 0]
    assert bits_to_codes(signs, "little").tolist() == [1, 4, 0]
    for order in ("big", "little"):
        codes = torch.arange(32).view(2, 4, 4)
        bits = codes_to_bits(codes, 5, order)
        assert bits.shape == (2, 4, 4, 5) and bits.abs().eq(1).all()
        assert torch.equal(bits_to_codes(bits, order), codes)
    with pytest.raises(ValueError, match="bit order is 'middle', expected 'big' or 'little'"):
        bit_weights(3, "middle")


@pytest.mark.parametrize("wrong", [-1, 8])
def test_a_code_out_of_range_is_an_error(wrong: int):
    codes = torch.tensor([[[0, wrong]]])
    with pytest.raises(ValueError, match=r"expected \[0, 7\] for 3 bits"):
        LookupFreeQuantizer(3).vectors(codes)
    with pytest.raises(ValueError, match=r"expected \[0, 7\]"):
        FiniteScalarQuantizer([8]).vectors(codes)
    assert codes_to_bits(torch.empty(0, dtype=torch.long), 3).shape == (0, 3)


def test_the_gradient_passes_straight_through():
    z = vectors(2, 4 * 9, dtype=torch.float32).view(2, 4, 3, 3).requires_grad_()
    quantizer = LookupFreeQuantizer(4, order="little").train()
    found = quantizer(z)
    assert torch.equal(found.vectors, torch.where(z > 0, 1.0, -1.0))  # exactly, not up to rounding
    towards = torch.randn_like(z)
    assert torch.equal(torch.autograd.grad((found.vectors * towards).sum(), z)[0], towards)
    assert torch.equal(quantizer.vectors(found.codes), found.vectors)
    assert found.codes.dtype == torch.int64 and found.codes.shape == (2, 3, 3)
    assert found.commitment.item() == pytest.approx((z.abs() - 1).pow(2).mean().item(), rel=1e-6)
    assert quantizer.codebook_size == 16 and list(quantizer.parameters()) == []


def test_entropies_are_computed_in_training_only():
    z = vectors(2, 4 * 9, dtype=torch.float32).view(2, 4, 3, 3)
    quantizer = LookupFreeQuantizer(4, temperature=0.5)
    assert quantizer.eval()(z).entropies is None
    found = quantizer.train()(z).entropies
    assert found is not None
    torch.testing.assert_close(found, entropies_dense(z.movedim(1, -1).reshape(-1, 4), 0.5))


def test_finite_scalar_quantisation_is_an_alternative():
    quantizer = FiniteScalarQuantizer([5, 4, 3])
    assert quantizer.codebook_size == 60 and quantizer.bits == 3
    z = vectors(2, 3 * 16, scale=3.0, dtype=torch.float32).view(2, 3, 4, 4).requires_grad_()
    found = quantizer(z)
    assert found.entropies is None and float(found.commitment) == 0.0
    assert found.codes.shape == (2, 4, 4) and found.codes.dtype == torch.int64
    assert int(found.codes.min()) >= 0 and int(found.codes.max()) < 60
    torch.testing.assert_close(quantizer.vectors(found.codes), found.vectors)
    (gradient,) = torch.autograd.grad(found.vectors.sum(), z)
    assert float(gradient.abs().max()) > 0
    every = torch.arange(60).view(1, 6, 10)
    vectors_of_all = quantizer.vectors(every)
    assert float(vectors_of_all.abs().max()) <= 1
    assert torch.equal(quantizer.fsq.codes_to_indices(vectors_of_all.movedim(1, -1)).long(), every)


def test_factors_of_a_large_code():
    # 0b10_110 with the first channel last ("little") or first ("big")
    little = split_codes(torch.tensor([0b10110]), (3, 2), "little")
    assert [int(part) for part in little] == [0b110, 0b10]
    big = split_codes(torch.tensor([0b10110]), (3, 2), "big")
    assert [int(part) for part in big] == [0b101, 0b10]
    codes = torch.arange(2**9).view(2, -1)
    for order in ("big", "little"):
        for factors in ((9,), (2, 7), (3, 1, 5)):
            parts = split_codes(codes, factors, order)
            assert [int(part.max()) for part in parts] == [2**bits - 1 for bits in factors]
            assert torch.equal(join_codes(parts, factors, order), codes)
    with pytest.raises(ValueError, match=r"span \[0, 4\], expected \[0, 3\] for 2 bits"):
        join_codes([torch.tensor([0, 4])], (2,))

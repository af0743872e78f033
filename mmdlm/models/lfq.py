"""Lookup-free quantisation (MAGVIT-v2, arXiv 2310.05737, section 3.1): a code is the sign pattern of d channels.

There is no codebook to look up: bit b of a code is `z_b > 0`, the quantised vector is that sign (+1 or -1), and the
gradient passes straight through. What needs care is the entropy penalty (equation 5), which asks for confident single
codes and for even use of all 2^d of them. Written plainly it takes a softmax over N x 2^d distances. But the squared
distance to a sign code is a sum over bits, so that softmax factorises:

    p(code | z) = prod_b sigmoid(4 z_b s_b / temperature)          (s_b = +1 or -1, squared distance / temperature)

hence E[H(p(. | z))] is a sum of d bit entropies, and the batch mean E[p], whose entropy is the codebook term, is one
matrix product of two half-width tables: N x 2^(d/2) each instead of N x 2^d. Both are exact.

Shapes: N vectors, d bits (channels), K = 2^d codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Entropies(NamedTuple):
    """per_sample: mean entropy of p(code | z); codebook: entropy of the mean of p; scalars in nats, in [0, d ln 2]."""

    per_sample: Tensor
    codebook: Tensor


class Quantized(NamedTuple):
    """What the quantizer gives: `vectors` [B, d, h, w] in {-1, +1} with straight-through gradient, `codes` [B, h, w]
    int64 in [0, 2^d), and the scalar losses (nats for the entropies, squared units for the commitment)."""

    vectors: Tensor
    codes: Tensor
    commitment: Tensor
    entropies: Entropies | None


def bit_weights(bits: int, order: str = "big", device: torch.device | None = None) -> Tensor:
    """Weight of each channel in the code number: int64 [bits].

    `big`: channel 0 weighs 2^(bits-1) (MAGVIT-v2 as Show-o and MMaDA store it); `little`: channel 0 weighs 1
    (Open-MAGVIT2). The two orders give different numbers to the same picture, so a checkpoint records its order.
    """
    if order not in ("big", "little"):
        raise ValueError(f"bit order is {order!r}, expected 'big' or 'little'")
    exponents = torch.arange(bits, device=device)
    return 2 ** (exponents.flip(0) if order == "big" else exponents)


def bits_to_codes(signs: Tensor, order: str = "big") -> Tensor:
    """Code numbers of sign vectors: [..., d] (a bit is `value > 0`, so zero counts as -1) -> int64 [...]."""
    return ((signs > 0).long() * bit_weights(signs.shape[-1], order, signs.device)).sum(-1)


def codes_to_bits(codes: Tensor, bits: int, order: str = "big", dtype: torch.dtype = torch.float32) -> Tensor:
    """Sign vectors of code numbers: int64 [...] in [0, 2^bits) -> [..., bits] in {-1, +1}.

    Raises ValueError for a code outside the range: a clamp here would paint a wrong picture without a word.
    """
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"image codes span [{int(codes.min())}, {int(codes.max())}], expected [0, {2**bits - 1}] for {bits} bits"
        )
    on = (codes.unsqueeze(-1) & bit_weights(bits, order, codes.device)) != 0
    return on.to(dtype) * 2 - 1


def split_codes(codes: Tensor, factors: Sequence[int], order: str = "big") -> tuple[Tensor, ...]:
    """A large code as several small ones: one int64 [...] per factor, in the order of the channels.

    factors: bits of each, such as (6, 12) for 18. The first takes the first channels; within it they weigh as `order`
    says (Open-MAGVIT2, arXiv 2409.04410, section 3.2: a model predicts 2^6 and 2^12 instead of 2^18 classes).
    """
    bits = codes_to_bits(codes, sum(factors), order)
    return tuple(bits_to_codes(part, order) for part in bits.split(list(factors), dim=-1))


def join_codes(parts: Sequence[Tensor], factors: Sequence[int], order: str = "big") -> Tensor:
    """The way back of `split_codes`: one int64 [...] per factor -> codes int64 [...]; ValueError out of range."""
    bits = [codes_to_bits(part, count, order) for part, count in zip(parts, factors, strict=True)]
    return bits_to_codes(torch.cat(bits, -1), order)


def entropies(z: Tensor, temperature: float, *, group_bits: int | None = None) -> Entropies:
    """Exact entropies of the soft assignment of z [N, d] to all sign codes, without a 2^d-wide row per vector.

    `group_bits` replaces the joint codebook entropy by the sum over groups of that many bits: an upper bound, equal
    when the groups are independent, cheaper still for d = 18. On several processes the mean assignment is averaged
    over all of them, with gradient. Computed in at least float32 (MAGVIT-v2, arXiv 2310.05737, equation 5).
    """
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    width = z.shape[-1]
    # Autocast would run the product of the two tables in half precision, whatever the dtype of z.
    with torch.autocast(z.device.type, enabled=False):
        logits = 4.0 * z / temperature
        probability = logits.sigmoid()
        # H of a coin with logit x is softplus(-|x|) + |x| sigmoid(-|x|): no log of a vanishing probability, and no
        # difference of two large numbers.
        size = logits.abs()
        per_sample = (F.softplus(-size) + size * (-size).sigmoid()).sum(-1).mean()
        if group_bits is None or group_bits >= width:
            codebook = _joint_entropy(probability)
        else:
            codebook = torch.stack([_joint_entropy(p) for p in probability.split(group_bits, dim=-1)]).sum()
    return Entropies(per_sample, codebook)


def entropies_dense(z: Tensor, temperature: float) -> Entropies:
    """The slow twin of `entropies`: the softmax over all 2^d codes, as the paper writes it."""
    width = z.shape[-1]
    codebook = codes_to_bits(torch.arange(2**width, device=z.device), width, dtype=z.dtype)
    log_p = (2.0 * z @ codebook.T / temperature).log_softmax(-1)
    per_sample = -(log_p.exp() * log_p).sum(-1).mean()
    return Entropies(per_sample, _entropy(log_p.exp().mean(0)))


def _joint_entropy(probability: Tensor) -> Tensor:
    """Entropy of the batch-mean product distribution of independent bits: probability [N, d] of +1 -> scalar."""
    half = probability.shape[-1] // 2
    if half == 0:
        mean = _all_mean(_outcomes(probability).mean(0))
    else:
        left, right = _outcomes(probability[:, :half]), _outcomes(probability[:, half:])
        mean = _all_mean(left.T @ right / probability.shape[0])
    return _entropy(mean.flatten())


def _outcomes(probability: Tensor) -> Tensor:
    """All products of p or 1-p over the columns: [N, k] -> [N, 2^k], rows sum to 1; the first column counts most.

    Halves first: few large products instead of one small one per bit, half the time.
    """
    width = probability.shape[-1]
    if width == 1:
        return torch.cat([1 - probability, probability], -1)
    left, right = _outcomes(probability[:, : width // 2]), _outcomes(probability[:, width // 2 :])
    return (left.unsqueeze(2) * right.unsqueeze(1)).flatten(1)


def _entropy(p: Tensor) -> Tensor:
    # The clamp keeps a code of probability 0 at 0 with a finite gradient.
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def _all_mean(mean: Tensor) -> Tensor:
    """Average over processes, with gradient; the identity on one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mean
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(mean) / dist.get_world_size()


class LookupFreeQuantizer(nn.Module):
    """Sign quantizer with straight-through gradient, commitment and entropy terms. No parameters.

    Args:
        bits: d, channels of the input and bits of a code.
        temperature: of the soft assignment in the entropies (0.01 in the published systems).
        group_bits: see `entropies`.
        order: see `bit_weights`.
    """

    def __init__(self, bits: int, *, temperature: float = 0.01, group_bits: int | None = None, order: str = "big"):
        super().__init__()
        bit_weights(bits, order)  # an order that is none shows here
        self.bits, self.temperature, self.group_bits, self.order = bits, temperature, group_bits, order

    @property
    def codebook_size(self) -> int:
        return 2**self.bits

    def forward(self, z: Tensor, counted: Tensor | None = None) -> Quantized:
        """z [B, d, h, w], any real -> Quantized. The entropies are computed only in training.

        counted: bool [B, h, w], the cells that the entropies are of; None for all.
        """
        signs = torch.where(z > 0, 1.0, -1.0).to(z.dtype)
        channels_last = z.movedim(1, -1)
        found = None
        if self.training:
            flat = channels_last.flatten(0, -2) if counted is None else channels_last[counted]
            found = entropies(flat, self.temperature, group_bits=self.group_bits)
        return Quantized(
            vectors=signs + (z - z.detach()),  # exactly the sign; z + (signs - z) would round
            codes=bits_to_codes(channels_last, self.order),
            commitment=F.mse_loss(z.float(), signs.float()),
            entropies=found,
        )

    def vectors(self, codes: Tensor) -> Tensor:
        """codes int64 [B, h, w] -> [B, d, h, w] in {-1, +1}; ValueError outside [0, 2^d)."""
        return codes_to_bits(codes, self.bits, self.order).movedim(-1, 1)


class FiniteScalarQuantizer(nn.Module):
    """vector-quantize-pytorch's FSQ (arXiv 2309.15505) behind the same interface; chosen by `quantizer: fsq`.

    Args:
        levels: values per channel, e.g. (8, 5, 5, 5) for 1,000 codes.
    """

    def __init__(self, levels: list[int]):
        super().__init__()
        from vector_quantize_pytorch import FSQ

        self.levels, self.bits = list(levels), len(levels)
        self.fsq = FSQ(levels=list(levels))

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def forward(self, z: Tensor, counted: Tensor | None = None) -> Quantized:
        """z [B, len(levels), h, w] -> Quantized, with a commitment of zero and no entropies (FSQ needs neither)."""
        vectors, codes = self.fsq(z)
        return Quantized(vectors, codes.long(), z.new_zeros(()), None)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes int64 [B, h, w] -> [B, len(levels), h, w] in [-1, 1]; ValueError outside the codebook."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise ValueError(
                f"image codes span [{int(codes.min())}, {int(codes.max())}], expected [0, {self.codebook_size - 1}]"
            )
        return self.fsq.indices_to_codes(codes)

"""How a codebook is used while it is learned: numbers, a picture of them, and what to change when it collapses.

Shape letters: K codes, d bits.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.models.lfq import codes_to_bits

FEW = 0.5  # of the codes that could be seen: fewer in use are worth a warning
STUCK = 0.995  # of the cells with the same bit: the bit says nothing


def use_of_codes(counts: Tensor) -> dict[str, float]:
    """Of how often each code came, [K]: `codes_used`, `dead_codes`, `used_share`, and `perplexity` in [1, K].

    used_share is of the codes that so many cells could show at most: min(K, number of cells).
    """
    counts = counts.double()
    cells = float(counts.sum())
    used = float((counts > 0).sum())
    share = counts / max(cells, 1.0)
    entropy = -torch.xlogy(share, share.clamp_min(1e-300)).sum()
    return {
        "codes_used": used,
        "dead_codes": len(counts) - used,
        "used_share": used / max(min(len(counts), cells), 1.0),
        "perplexity": float(entropy.exp()),
    }


def stuck_bits(counts: Tensor, bits: int, order: str = "big") -> list[int]:
    """Channels of a sign code that have the same sign in nearly all cells; counts [2^bits]."""
    shares = bit_shares(counts, bits, order)
    return [bit for bit, share in enumerate(shares.tolist()) if max(share, 1 - share) > STUCK]


def bit_shares(counts: Tensor, bits: int, order: str = "big") -> Tensor:
    """How often each channel is +1: [bits] in [0, 1]."""
    used = counts.nonzero()[:, 0].cpu()
    weights = counts.cpu()[used].double() / counts.sum().clamp_min(1).double().cpu()
    on = codes_to_bits(used, bits, order, dtype=torch.float64) > 0
    return (on.double() * weights[:, None]).sum(0)


def advice(
    counts: Tensor, *, bits: int | None, order: str = "big", sample_entropy: float | None = None,
    codebook_entropy: float | None = None, commitment: float | None = None,
) -> list[str]:
    """What is wrong with the use of the codes and which setting to change; [] where nothing is.

    counts: int [K]; bits: d of a sign codebook, None for another quantizer. The entropies are in nats, as training
    reports them.
    """
    numbers = use_of_codes(counts)
    cells, size = float(counts.sum()), len(counts)
    found = []
    if numbers["used_share"] < FEW and numbers["perplexity"] < 0.25 * min(size, cells):
        found.append(
            f"the codebook collapses: {numbers['codes_used']:.0f} of {size} codes in {cells:.0f} cells, perplexity "
            f"{numbers['perplexity']:.1f}: raise codebook_entropy_weight to twice sample_entropy_weight or more, and "
            "train longer with entropy_anneal_steps"
        )
    if bits is None:
        return found
    whole = bits * math.log(2)
    if stuck := stuck_bits(counts, bits, order):
        found.append(
            f"{len(stuck)} of {bits} bits never change ({', '.join(map(str, stuck[:8]))}): use fewer codebook_bits, or "
            "raise codebook_entropy_weight"
        )
    if sample_entropy is not None and sample_entropy > 0.5 * whole:
        found.append(
            f"single codes are undecided, sample_entropy {sample_entropy:.2f} of {whole:.2f} nats: raise "
            "sample_entropy_weight, or lower model.entropy_temperature"
        )
    if codebook_entropy is not None and codebook_entropy < 0.5 * min(whole, math.log(max(cells, 2.0))):
        found.append(
            f"few codes are shared out, codebook_entropy {codebook_entropy:.2f} of {whole:.2f} nats: raise "
            "codebook_entropy_weight, or set model.busy_entropy for pictures with large flat grounds"
        )
    if commitment is not None and commitment > 4:
        found.append(f"the encoder drifts away from its codes, commitment {commitment:.1f}: raise commitment_weight")
    return found


def draw_dashboard(counts: Tensor, path: Path, *, bits: int | None, order: str = "big", title: str = "") -> None:
    """A PNG of the use of every code: codes by rank, all codes as a map, and how often each bit is +1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    numbers, held = use_of_codes(counts), counts.cpu().double()
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    ranked = held.sort(descending=True).values
    axes[0].plot(range(1, len(ranked) + 1), ranked.clamp_min(0.5), linewidth=1.2)
    axes[0].axhline(float(held.mean()), linestyle="--", linewidth=0.8, color="grey")
    axes[0].set(xscale="log", yscale="log", xlabel="code by rank", ylabel="cells (0 drawn as 0.5)")
    width = 2 ** math.ceil(math.log2(len(held)) / 2)
    padded = torch.full((-(-len(held) // width) * width,), float("nan"), dtype=torch.float64)
    padded[: len(held)] = held.log1p()
    shown = axes[1].imshow(padded.view(-1, width).numpy(), aspect="auto", interpolation="nearest", cmap="magma")
    axes[1].set(title="ln(1 + cells) of every code", xlabel=f"code mod {width}", ylabel=f"code div {width}")
    figure.colorbar(shown, ax=axes[1])
    if bits is None:
        axes[2].axis("off")
    else:
        axes[2].bar(range(bits), bit_shares(counts, bits, order).numpy())
        axes[2].axhline(0.5, linestyle="--", linewidth=0.8, color="grey")
        axes[2].set(ylim=(0, 1), xlabel="bit", ylabel="share of cells where it is +1")
    figure.suptitle(
        f"{title}{numbers['codes_used']:.0f} of {len(held)} codes used, {numbers['dead_codes']:.0f} dead, perplexity "
        f"{numbers['perplexity']:.1f}", fontsize=10,
    )  # fmt: skip
    figure.tight_layout()
    beside = path.with_name(f".{path.name}.png")
    figure.savefig(beside, dpi=90)
    plt.close(figure)
    beside.replace(path)

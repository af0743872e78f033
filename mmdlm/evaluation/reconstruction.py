"""What a visual tokenizer keeps of pictures: PSNR, SSIM, LPIPS, rFID, code use, bits per pixel, beside JPEG and WebP.

PSNR and SSIM (Wang et al., IEEE TIP 13(4), 2004: Gaussian window 11 x 11, sigma 1.5) are of 8-bit RGB levels, each
picture's own, averaged. JPEG and WebP get as many bits for each picture as its codes have, or the fewest they can.
Shape letters: N pictures, H x W pixels, h x w codes.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.evaluation.features import Extractor
from mmdlm.evaluation.fetched_weights import file_name, tensors_of, torch_file
from mmdlm.evaluation.generation import frechet_distance, statistics
from mmdlm.evaluation.vqa import Scores

CODECS = {"jpeg": (1, 95), "webp": (0, 100)}  # format: its lowest and highest quality
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"  # torchvision's AlexNet_Weights.IMAGENET1K_V1
_WINDOW, _SIGMA = 11, 1.5


def levels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as the 8-bit levels a picture file holds: uint8. Values outside saturate, as in any picture."""
    return ((pixels.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures [N, 3, H, W]: float64 [N], inf where they are equal."""
    error = (x.double() - y.double()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / error)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of uint8 pictures [N, 3, H, W], mean over channels and whole windows: float64 [N].

    Raises InputError for pictures smaller than the window of 11 pixels.
    """
    if min(x.shape[2:]) < _WINDOW:
        raise InputError(
            f"SSIM got pictures of {x.shape[3]} x {x.shape[2]} pixels, expected at least {_WINDOW} x {_WINDOW}."
        )
    offsets = torch.arange(_WINDOW, dtype=torch.float64, device=x.device) - _WINDOW // 2
    bell = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    bell = bell / bell.sum()
    window = (bell[:, None] * bell).expand(x.shape[1], 1, _WINDOW, _WINDOW)

    def blurred(values: Tensor) -> Tensor:
        return F.conv2d(values, window, groups=x.shape[1])

    a, b = x.double(), y.double()
    mean_a, mean_b = blurred(a), blurred(b)
    own_a, own_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    shared = blurred(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    likeness = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (own_a + own_b + c2))).mean((1, 2, 3))


def code_use(counts: Tensor) -> dict[str, float]:
    """How a codebook is used, from how often each code came, int [codebook]: share, perplexity, entropy in bits."""
    p = counts.double() / counts.sum()
    bits = float(-(p[p > 0] * p[p > 0].log2()).sum())
    return {"used_share": float((counts > 0).double().mean()), "perplexity": 2**bits, "entropy_bits": bits}


def at_bits(picture: np.ndarray, codec: str, bits: int) -> tuple[np.ndarray, int]:
    """A picture, uint8 [H, W, 3], through JPEG or WebP at the best quality of at most `bits`, and the bits it took.

    Where the lowest quality takes more it is that one: look at the bits. Counted is what depends on the picture: of a
    JPEG what follows its tables, which all pictures of a quality share; of a WebP the file without its 20-byte frame.
    """
    low, high = CODECS[codec]
    best = _through(picture, codec, low)
    while low < high and best[1] <= bits:
        middle = (low + high + 1) // 2
        tried = _through(picture, codec, middle)
        if tried[1] <= bits:
            low, best = middle, tried
        else:
            high = middle - 1
    return best


def _through(picture: np.ndarray, codec: str, quality: int) -> tuple[np.ndarray, int]:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": False} if codec == "jpeg" else {"method": 4}
    Image.fromarray(picture).save(buffer, codec.upper(), quality=quality, **options)
    content = buffer.getvalue()
    size = len(content) - (content.rindex(b"\xff\xda") if codec == "jpeg" else 20)
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")), 8 * size


def lpips_network(
    weights: Path | None = None, device: str = "cpu", *, download: bool = False, progress: bool = False
) -> nn.Module:
    """LPIPS (arXiv:1801.03924, version 0.1) over AlexNet, whose torchvision weights are the file `weights`.

    None: torchvision's file in torch's cache, fetched to there where `download`. The calibrated layers come with the
    package lpips. The network takes pictures in [-1, 1]. Raises InputError without the package, for weights that are
    missing or cannot be fetched, and for those that are not AlexNet's.
    """
    try:
        import lpips
    except ImportError as error:
        raise InputError('LPIPS is the package lpips: pip install "mmdlm[eval]".') from error
    if weights is None:
        weights = torch_file(
            ALEXNET,
            needs="LPIPS needs torchvision's AlexNet weights",
            otherwise="or give it with --lpips PATH",
            download=download,
            progress=progress,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision in a way of long ago
        network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    try:
        saved = tensors_of(weights)
        # slice1.0.weight of lpips is features.0.weight of torchvision.
        trunk = {name: saved[f"features.{name.split('.', 1)[1]}"] for name in network.net.state_dict()}
        network.net.load_state_dict(trunk)
    except Exception as error:  # torch raises pickle's, zip's and its own errors on foreign files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".:")
        wanted = file_name(ALEXNET)
        raise InputError(f"{weights} does not hold torchvision's AlexNet ({reason}): give {wanted}.") from error
    frozen: nn.Module = network.eval().requires_grad_(False).to(device)
    return frozen


@torch.no_grad()
def measure_tokenizer(
    tokenizer: Any,
    batches: Iterable[tuple[list[str], Tensor]],
    *,
    codecs: bool = True,
    by: Extractor | None = None,
    lpips: nn.Module | None = None,
) -> Scores:
    """Everything above over pictures: batches of (names, pixels [n, 3, H, W] in [-1, 1]).

    tokenizer: `encode` to codes [n, h, w], `decode` to pixels, `codebook_size`. Rows: a picture's psnr (None where
    nothing was lost: it has no finite one, and is left out of the mean and counted as `identical`), ssim, and each
    codec's; `score` is the SSIM. With `by`, rfid (or feature_distance, for features that are not Inception's).
    Raises InputError for no pictures.
    """
    rows: list[dict[str, Any]] = []
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    sides: list[list[np.ndarray]] = [[], []]
    bits_each = math.log2(tokenizer.codebook_size)
    for names, pixels in batches:
        codes = tokenizer.encode(pixels)
        back = tokenizer.decode(codes)
        counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        x, y = levels(pixels), levels(back)
        budget, area = codes[0].numel() * bits_each, pixels.shape[2] * pixels.shape[3]
        found = {"psnr": psnr(x, y), "ssim": ssim(x, y)}
        if lpips is not None:
            found["lpips"] = lpips(x.float() / 127.5 - 1, y.float() / 127.5 - 1).flatten()
        if by is not None:
            for side, pictures in zip(sides, (x, y), strict=True):
                side.append(by.extract(pictures)[0].float().cpu().numpy())
        found["bits_per_pixel"] = torch.full((len(x),), budget / area, dtype=torch.float64)
        if codecs:
            for codec in CODECS:
                found |= _codec_scores(x, codec, int(budget))
        for index, name in enumerate(names):
            values = {key: float(value[index]) for key, value in found.items()}
            rows.append({"id": name} | {key: v if math.isfinite(v) else None for key, v in values.items()})
    if not rows:
        raise InputError("There are no pictures to put through the tokenizer, expected at least one.")
    summary: dict[str, Any] = {key: _mean(row[key] for row in rows) for key in rows[0] if key != "id"}
    summary["identical"] = sum(row["psnr"] is None for row in rows)
    if by is not None:
        name = "rfid" if by.is_inception else "feature_distance"
        summary[name] = frechet_distance(*(statistics(np.concatenate(side)) for side in sides))
        summary["features"] = by.name
        summary["few"] = len(rows) <= by.width
    for row in rows:
        row["score"] = row["ssim"]
    return Scores(summary | code_use(counts) | {"codes": len(counts), "pictures": len(rows)}, rows)


def _codec_scores(x: Tensor, codec: str, bits: int) -> dict[str, Tensor]:
    through = [at_bits(picture.permute(1, 2, 0).cpu().numpy(), codec, bits) for picture in x]
    y = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture, _ in through]).to(x.device)
    area = x.shape[2] * x.shape[3]
    took = torch.tensor([size / area for _, size in through], dtype=torch.float64)
    return {f"{codec}_psnr": psnr(x, y), f"{codec}_ssim": ssim(x, y), f"{codec}_bits_per_pixel": took}


def _mean(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None

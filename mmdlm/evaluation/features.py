"""Pictures of a folder as feature vectors: what FID and its kin are computed from.

Three extractors. `inception`: FID's own network, torch-fidelity's port of it, from a weights file or from where
torch-fidelity itself would keep it (`mmdlm.evaluation.fetched_weights`); only its distance may be called FID. `random`:
a small network of fixed random weights, for quick looks without any download. A directory: a timm model (config.json
and model.safetensors, as timm saves and the Hub serves it). The distance of the last two is a feature distance:
comparable with itself only.

Shape letters: N pictures, D features, K classes.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdlm.errors import InputError
from mmdlm.evaluation.fetched_weights import file_hash, file_name, published_hash, tensors_of, torch_file
from mmdlm.processing import load_image

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
RANDOM_WIDTH, RANDOM_SIDE = 128, 64


class Extractor(NamedTuple):
    """`extract`: uint8 [N, 3, H, W] -> float features [N, D], and logits [N, K] where it has classes."""

    name: str  # what makes the features: kind, version and the hash of its weights
    width: int  # D
    is_inception: bool
    extract: Callable[[Tensor], tuple[Tensor, Tensor | None]]


class Features(NamedTuple):
    """What a folder's pictures are, for a distance."""

    features: np.ndarray  # float32 [N, D]
    logits: np.ndarray | None  # float32 [N, K]
    files: list[str]  # relative to the folder, sorted; row i is file i
    sizes: list[tuple[int, int]]  # the different (width, height), the commonest first
    content: str  # hash of all the files' bytes


def extractor(
    features: str,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    download: bool = False,
    progress: bool = False,
) -> Extractor:
    """"inception", "random", or the path of a timm model's directory.

    Inception's weights are the file `weights`, or the published one in torch's cache, or fetched to there where
    `download`; of a file that is not the published one it warns. Raises InputError for weights that are missing,
    cannot be fetched or are another network's, and for a directory that is no timm model.
    """
    if features == "inception":
        return _inception(weights, device, download, progress)
    if weights is not None:
        raise InputError(f"There are weights for the features {features!r}, only inception takes any: leave one out.")
    return _random(device) if features == "random" else _timm(Path(features), device)


def picture_files(folder: Path) -> list[Path]:
    """The folder's pictures, also in folders within it, sorted. Raises InputError where there are fewer than two.

    What is named like a picture and is none, such as a link to nothing, is among them: reading it says so.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder of pictures at {folder}: check the path.")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS and not path.is_dir())
    if len(found) < 2:
        raise InputError(f"{folder} has {len(found)} pictures, expected a set: give the folder that holds them.")
    return found


def folder_features(
    folder: Path, by: Extractor, *, batch_size: int = 32, cache: Path | None = None, progress: bool = False
) -> Features:
    """The features of every picture of `folder`.

    Pictures go into the network as they are; it does its own resizing. With `cache` (a directory) they are kept under
    the hash of the files' bytes and the extractor, and are not computed twice. Warns of JPEG files, whose artefacts
    change the features, and of pictures of several sizes. Raises InputError for a picture that cannot be read.
    """
    files = picture_files(folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    content = _content_hash(files)
    kept = cache / f"{content}-{hashlib.sha256(by.name.encode()).hexdigest()[:16]}.npz" if cache is not None else None
    if kept is not None and kept.is_file():
        with np.load(kept) as saved:
            logits = saved.get("logits")
            sizes = [(int(width), int(height)) for width, height in saved["sizes"]]
            found = Features(saved["features"], logits, names, sizes, content)
    else:
        found = _extract(files, names, by, batch_size, content, progress)
        if kept is not None:
            _keep(kept, found)
    jpegs = sum(_is_jpeg(path) for path in files)
    if jpegs:
        warnings.warn(f"{jpegs} of {len(names)} pictures in {folder} are JPEG, which changes features.", stacklevel=2)
    if len(found.sizes) > 1:
        warnings.warn(f"{folder} has pictures of {len(found.sizes)} sizes, each is resized differently.", stacklevel=2)
    return found


def default_cache() -> Path:
    """Where features of reference folders are kept when nothing else is said."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mmdlm" / "features"


def _extract(
    files: Sequence[Path], names: list[str], by: Extractor, batch_size: int, content: str, progress: bool
) -> Features:
    from tqdm import tqdm

    features, logits = [], []
    counted: dict[tuple[int, int], int] = {}
    with tqdm(total=len(files), disable=not progress, leave=False, unit="pictures") as bar:
        for batch in _batches(files, batch_size):
            height, width = batch.shape[2:]
            counted[width, height] = counted.get((width, height), 0) + len(batch)
            vectors, classes = by.extract(batch)
            features.append(vectors.float().cpu().numpy())
            if classes is not None:
                logits.append(classes.float().cpu().numpy())
            bar.update(len(batch))
    sizes = sorted(counted, key=lambda size: (-counted[size], size))
    return Features(np.concatenate(features), np.concatenate(logits) if logits else None, names, sizes, content)


def _batches(files: Sequence[Path], batch_size: int) -> Iterator[Tensor]:
    """uint8 [n, 3, H, W], in order; a batch ends where the size changes."""
    waiting: list[Tensor] = []
    for path in files:
        picture = pixels(load_image(path))
        if waiting and (len(waiting) == batch_size or waiting[0].shape != picture.shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(picture)
    yield torch.stack(waiting)


def pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _content_hash(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        try:
            digest.update(bytes.fromhex(file_hash(path)))
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}): mend it, or take it out.") from error
    return digest.hexdigest()[:32]


def _is_jpeg(path: Path) -> bool:
    """By its first bytes: an ending says little."""
    with path.open("rb") as opened:
        return opened.read(3) == b"\xff\xd8\xff"


def _keep(path: Path, found: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part.npz")
    arrays: dict[str, Any] = {"features": found.features, "sizes": np.array(found.sizes)}
    if found.logits is not None:
        arrays["logits"] = found.logits
    np.savez(beside, **arrays)
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------ the networks


def _inception(weights: Path | None, device: str, download: bool, progress: bool) -> Extractor:
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as published
    except ImportError as error:
        raise InputError(
            'FID\'s Inception network is torch-fidelity\'s: pip install "mmdlm[eval]", or take --features random or '
            "--features PATH_TO_TIMM_MODEL."
        ) from error
    url = published.URL_INCEPTION_V3
    if weights is None:
        weights = torch_file(
            url,
            needs="FID needs the weights of its Inception network",
            otherwise="give it with --weights PATH, or take --features random or --features PATH_TO_TIMM_MODEL",
            download=download,
            progress=progress,
        )
    try:
        # torch-fidelity unpickles whatever the file says; what passes here holds tensors only.
        if "Conv2d_1a_3x3.conv.weight" not in tensors_of(weights):
            raise ValueError("its first layer is missing")
        network = published.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        ).to(device)
    except OSError as error:
        raise InputError(f"{weights} cannot be read ({error.strerror}): give the path of {file_name(url)}.") from error
    except Exception as error:  # torch raises pickle's, zip's and its own errors on foreign files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".:")
        raise InputError(
            f"{weights} does not hold the weights of FID's Inception network ({reason}): give {file_name(url)}."
        ) from error
    digest = file_hash(weights)[:16]
    if not digest.startswith(published_hash(url)):
        warnings.warn(
            f"{weights} is not the published {file_name(url)} (SHA-256 {digest}...): with other weights the FID can "
            "not be held beside others'.",
            stacklevel=2,
        )

    @torch.no_grad()
    def extract(batch: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = network(batch.to(device))
        return features, logits

    return Extractor(f"inception-v3-compat {digest}", 2048, True, extract)


def _random(device: str) -> Extractor:
    generator = torch.Generator().manual_seed(0)
    widths = (3, 32, 64, RANDOM_WIDTH // 2)
    kernels = [
        (torch.randn(out, wide, 3, 3, generator=generator) * (2 / (9 * wide)) ** 0.5).to(device)
        for wide, out in pairwise(widths)
    ]

    @torch.no_grad()
    def extract(batch: Tensor) -> tuple[Tensor, Tensor | None]:
        x = _resized(batch.to(device), RANDOM_SIDE) / 127.5 - 1
        for kernel in kernels:
            x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))
        # Mean and spread over the picture: what there is, and how unevenly.
        return torch.cat([x.mean((2, 3)), x.std((2, 3))], dim=1), None

    return Extractor("random 1", RANDOM_WIDTH, False, extract)


def _timm(directory: Path, device: str) -> Extractor:
    import timm

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        options = config.get("pretrained_cfg", {})
        network: nn.Module = timm.create_model(
            config["architecture"], pretrained=False, num_classes=config["num_classes"], **config.get("model_args", {})
        )
        network.load_state_dict(load_file(directory / "model.safetensors"))
        network.reset_classifier(0)  # type: ignore[operator]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120].rstrip(".:")
        raise InputError(
            f"{directory} is no timm model that can be loaded ({reason}): take --features inception, random, or a "
            "directory with timm's config.json and model.safetensors."
        ) from error
    network.eval().requires_grad_(False).to(device)
    side = int(options.get("input_size", (3, 224, 224))[-1])
    mean, std = (
        torch.tensor(options.get(name, fallback), device=device).view(3, 1, 1)
        for name, fallback in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225)))
    )

    @torch.no_grad()
    def extract(batch: Tensor) -> tuple[Tensor, Tensor | None]:
        return network((_resized(batch.to(device), side) / 255 - mean) / std), None

    name = f"timm {config['architecture']} {file_hash(directory / 'model.safetensors')[:16]}"
    return Extractor(name, int(network.num_features), False, extract)  # type: ignore[arg-type]


def _resized(batch: Tensor, side: int) -> Tensor:
    x = batch.float()
    if x.shape[2:] == (side, side):
        return x
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)


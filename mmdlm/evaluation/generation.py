"""Two sets of pictures against each other, through their features: FID, KID, IS, precision, recall, density, coverage.

FID: Frechet distance of two Gaussians (arXiv:1706.08500). KID: unbiased squared MMD with a cubic kernel
(arXiv:1801.01401). IS: exp of the mean KL of a picture's classes against all (arXiv:1606.03498). Precision and recall:
the share of one set within the other's nearest-neighbour balls (arXiv:1904.06991); density and coverage
(arXiv:2002.09797). All in float64; tested equal to torch-fidelity's over the same features to 1e-6.

Only features of FID's own Inception network make an FID: with any other the same number is called feature distance.
Shape letters: N generated, M reference pictures, D features, K classes.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from mmdlm.errors import InputError
from mmdlm.evaluation.features import Extractor, Features
from mmdlm.evaluation.intervals import Z95

_BLOCK = 2048  # rows of a distance matrix at a time


class Statistics(NamedTuple):
    """A set of features as a Gaussian."""

    mean: np.ndarray  # float64 [D]
    covariance: np.ndarray  # float64 [D, D], divided by N - 1


def statistics(features: np.ndarray) -> Statistics:
    """Mean and covariance of features [N, D]. Raises InputError for fewer than two."""
    if len(features) < 2:
        raise InputError(f"A distance got {len(features)} pictures, expected at least two to have a covariance.")
    x = features.astype(np.float64)
    return Statistics(x.mean(0), np.cov(x, rowvar=False).reshape(x.shape[1], x.shape[1]))


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); 0 for the same Gaussian but for rounding.

    The trace of the root is that of (R^T C2 R)^(1/2) with C1 = R R^T, whose eigenvalues are real whatever the rank.
    Raises ValueError for features of different widths.
    """
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"frechet_distance got {len(one.mean)} and {len(other.mean)} features, expected as many")
    try:
        root = np.linalg.cholesky(one.covariance)  # any root R with R R^T = C1 will do; this one costs least
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(one.covariance)
        root = vectors * np.sqrt(values.clip(min=0))  # rounding may leave an eigenvalue of 0 slightly negative
    product = np.linalg.eigvalsh(root.T @ other.covariance @ root)
    gap = one.mean - other.mean
    traces = np.trace(one.covariance) + np.trace(other.covariance)
    return float(gap @ gap + traces - 2 * np.sqrt(product.clip(min=0)).sum())


def kernel_distance(
    generated: np.ndarray, reference: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """KID's mean and standard deviation over random subsets of features [N, D], [M, D]; the subsets of torch-fidelity.

    A set smaller than subset_size lowers it to the smaller set. May be negative: it is unbiased.
    """
    size = min(subset_size, len(generated), len(reference))
    x, y = generated.astype(np.float64), reference.astype(np.float64)
    draw = np.random.RandomState(seed)
    values = [
        _squared_mmd(x[draw.choice(len(x), size, replace=False)], y[draw.choice(len(y), size, replace=False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    own = [kernel(z, z) for z in (x, y)]
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in own)
    return float(within - 2 * kernel(x, y).mean())


def inception_score(logits: np.ndarray, *, splits: int = 10, seed: int = 2020) -> tuple[float, float]:
    """IS, mean and standard deviation over `splits` parts of logits [N, K] in the random order of torch-fidelity."""
    order = np.random.RandomState(seed).permutation(len(logits))
    x = logits[order].astype(np.float64)
    x = x - x.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    scores = []
    for part in range(splits):
        chunk = log_p[part * len(x) // splits : (part + 1) * len(x) // splits]
        p = np.exp(chunk)
        scores.append(np.exp((p * (chunk - np.log(p.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def neighbourhoods(
    generated: np.ndarray, reference: np.ndarray, *, near: int = 3, wide: int = 5
) -> dict[str, float]:
    """Precision and recall with balls to the `near`-th neighbour, density and coverage with the `wide`-th.

    precision: share of generated pictures within a reference picture's ball; recall: the other way round. density:
    how many reference balls a generated picture is in, over `wide`: may be above 1. coverage: share of reference balls
    that hold a generated picture. Raises InputError for sets not larger than `wide`.
    """
    if min(len(generated), len(reference)) <= wide:
        raise InputError(
            f"Density and coverage got {len(generated)} and {len(reference)} pictures, expected more than {wide} each."
        )
    x, y = generated.astype(np.float64), reference.astype(np.float64)
    own, between = (_distances(x, x), _distances(y, y)), _distances(x, y)

    def ball(distances: np.ndarray, k: int) -> np.ndarray:
        return np.partition(distances, k, axis=1)[:, k]  # itself is the 0th neighbour

    inside = between <= ball(own[1], wide)
    return {
        "precision": float((between <= ball(own[1], near)).any(1).mean()),
        "recall": float((between <= ball(own[0], near)[:, None]).any(0).mean()),
        "density": float(inside.sum() / (wide * len(x))),
        "coverage": float(inside.any(0).mean()),
    }


def _distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Euclidean distances [N, M], a block of rows at a time; exactly 0 on the diagonal of x with itself."""
    squares = (y**2).sum(1)
    blocks = []
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        d = (block**2).sum(1)[:, None] + squares - 2 * block @ y.T
        blocks.append(np.sqrt(d.clip(min=0)))
    d = np.concatenate(blocks)
    if x is y:
        np.fill_diagonal(d, 0.0)
    return d


def bootstrap_error(generated: np.ndarray, reference: np.ndarray, *, resamples: int = 50, seed: int = 0) -> float:
    """The standard error of the Frechet distance by resampling both sets of features, [N, D] and [M, D].

    Only the spread is used: a resample repeats pictures, which raises the distance itself. The error says nothing of
    the bias that every finite set has: compare sets of one size.
    """
    draw = np.random.default_rng(seed)
    values = [
        frechet_distance(*(statistics(x[draw.integers(len(x), size=len(x))]) for x in (generated, reference)))
        for _ in range(resamples)
    ]
    return float(np.std(values, ddof=1))


def check_enough(generated: int, reference: int, by: Extractor) -> None:
    """Raises InputError for fewer pictures than features."""
    if min(generated, reference) <= by.width:
        raise InputError(
            f"There are {generated} generated and {reference} reference pictures for {by.width} features, expected "
            "more pictures than features: give more, or pass --allow-few to get a number that is mostly the sets' "
            "sizes."
        )


def compare_sets(
    generated: Features,
    reference: Features,
    by: Extractor,
    *,
    allow_few: bool = False,
    resamples: int = 50,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything above over two folders' features, as a table of results.

    Names: fid, kid ... with Inception's features; feature_distance, kernel_distance ... with any other.
    Raises InputError for fewer pictures than features, of which the covariance has no full rank and the distance says
    mostly how many there are, unless `allow_few`. Warns where the two sets have different sizes in pixels.
    """
    few = min(len(generated.features), len(reference.features))
    if not allow_few:
        check_enough(len(generated.features), len(reference.features), by)
    if generated.sizes[0] != reference.sizes[0]:
        (w, h), (v, u) = generated.sizes[0], reference.sizes[0]
        warnings.warn(
            f"Generated pictures have {w} x {h} pixels, reference pictures {v} x {u}: resizing changes the distance.",
            stacklevel=2,
        )
    x, y = generated.features, reference.features
    distance = frechet_distance(statistics(x), statistics(y))
    error = bootstrap_error(x, y, resamples=resamples, seed=seed) if resamples > 1 else None
    name, kernel = ("fid", "kid") if by.is_inception else ("feature_distance", "kernel_distance")
    found: dict[str, Any] = {name: distance, f"{name}_error": error}
    if error is not None:
        found[f"{name}_low"], found[f"{name}_high"] = distance - Z95 * error, distance + Z95 * error
    size = min(kid_subset_size, few)
    found[kernel], found[f"{kernel}_std"] = kernel_distance(x, y, subsets=kid_subsets, subset_size=size)
    if generated.logits is not None:
        splits = min(10, len(x))
        found["inception_score"], found["inception_score_std"] = inception_score(generated.logits, splits=splits)
    if few > 5:
        found |= neighbourhoods(x, y)
    return found | {
        "features": by.name,
        "width": by.width,
        "generated": len(x),
        "reference": len(y),
        "subset_size": size,
        "few": few <= by.width,
        "generated_content": generated.content,
        "reference_content": reference.content,
    }

"""Pictures that are the same to the eye: a difference hash (dHash) in two directions, and who is near whom.

The picture is made grey and 9 x 8 pixels; each of 64 bits says whether a pixel is clearly brighter than its left
neighbour, and 64 more say it of the upper neighbour in 8 x 9. Scaling, recompression and small changes of colour
flip few bits; "clearly" (`MARGIN` grey levels) keeps the noise of a compressed flat background from flipping them.
Shape letter: N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

MARGIN = 3  # grey levels of 255
NEAR = 6  # differing bits of 128 up to which two pictures count as the same
_BLOCK = 2048  # rows compared at once


def difference_hash(picture: Image.Image) -> bytes:
    """128 bits, as 16 bytes, of a picture of any size and mode."""
    grey = picture.convert("L")
    wide = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    high = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    across, down = np.greater(np.diff(wide, axis=1), MARGIN), np.greater(np.diff(high, axis=0), MARGIN)
    return np.packbits(np.concatenate([across.ravel(), down.ravel()])).tobytes()


def near_pairs(
    first: Sequence[bytes], second: Sequence[bytes] | None = None, *, most: int = NEAR
) -> list[tuple[int, int]]:
    """Pairs (i, j) whose hashes differ in at most `most` bits: i < j within `first`, or i of `first`, j of `second`.

    A flat picture has no differences at all: its hash is zero and says nothing, so it is near none.
    """
    left = _bits(first)
    right = left if second is None else _bits(second)
    found: list[tuple[int, int]] = []
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        # Differing bits as one matrix product: |a| + |b| - 2 ab.
        apart = block.sum(1)[:, None] + right.sum(1)[None, :] - 2 * (block @ right.T)
        says = np.outer(block.any(1), right.any(1))
        rows, columns = np.nonzero(np.logical_and(np.less_equal(apart, most), says))
        found += [(start + int(i), int(j)) for i, j in zip(rows, columns, strict=True)
                  if second is not None or start + i < j]
    return found


def _bits(hashes: Sequence[bytes]) -> np.ndarray:
    """Hashes -> float32 [N, 128] of 0 and 1."""
    packed = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(len(hashes), 16)
    return np.unpackbits(packed, axis=1).astype(np.float32)

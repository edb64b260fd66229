"""A number for each row of a step, for objectives that draw at random, such as masks."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def row_seeds(seed: int, *, step: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw a number for each row; step 0 is an evaluation. Shapes: positions: int64[m] → uint64[m]."""
    texts = (f"{seed}/{step}/{position}".encode() for position in positions.tolist())
    digests = (hashlib.blake2b(text, digest_size=8, person=b"row seed").digest() for text in texts)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)

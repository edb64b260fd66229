"""Several labels of one text as bits of the array `label_bits`. This module needs only numpy: workers import it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BITS = 31
"""Labels in one value, whose type is int32."""


def bits_of(words: NDArray[np.integer], *, count: int) -> NDArray[np.int64]:
    """The single bits of words. Shapes: words: int[n, d]; returns: int64[n, count], 0 or 1."""
    numbers = np.arange(count)
    return (words[:, numbers // BITS].astype(np.int64) >> (numbers % BITS)) & 1

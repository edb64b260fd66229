"""The perplexity that any trained language model must beat."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def unigram_perplexity(train_counts: NDArray[np.int64], *, held_out_counts: NDArray[np.int64]) -> float | None:
    """exp of the mean negative log likelihood of the held-out tokens under p(v) = (n_v + 1) / (N + V).

    None if nothing is held out. Shapes: both `int64[V]`, occurrences of each token.

    Source: add-one (Laplace) smoothing; Jurafsky & Martin, Speech and Language Processing, 3.6.1.
    """
    num_held_out = int(held_out_counts.sum())
    if num_held_out == 0:
        return None
    log_p = np.log((train_counts + 1) / (train_counts.sum() + len(train_counts)))
    return math.exp(-float(held_out_counts @ log_p) / num_held_out)

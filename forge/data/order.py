"""The shuffled sample order, computed by a keyed bijection and never stored.

Maps a position of the endless training order to a sample. Position p belongs to epoch p // N, and every epoch is
its own permutation of the N samples. The order is a pure function of (seed, position): a run resumes from its step
number alone, at any number of workers, and no list of samples is kept in memory. Only 64-bit integer arithmetic is
used, so the order is the same on every platform and under every numpy release.

The permutation is a generalized Feistel network on Z_a × Z_b, a·b just above N, with cycle walking for
the few values that fall outside [0, N). It is a shuffle, not a cipher: its round function is a fast mixer.

Source: Luby & Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", SIAM
J. Comput. 17(2), 1988; Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods
"cycle walking" and "generalized Feistel".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8
"""Luby & Rackoff need 4 with perfect round functions on large domains; the halves of a small corpus have
few values, where 4 rounds leave a bias that the tests see and 8 do not."""

GOLDEN = 0x9E3779B97F4A7C15
"""2⁶⁴ / golden ratio, the increment of splitmix64: Steele, Lea & Flood, OOPSLA 2014."""

_BLOCK = 1 << 16
"""Positions permuted at once: the temporaries stay in the processor's cache."""


class Order(Protocol):
    """The row at each position of the endless training order."""

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Shapes: positions: int64[n], counted from 0 → int64[n]. Raises: ValueError if a position is negative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOrder:
    """The order in which `num_samples` samples are visited, epoch after epoch.

    Raises: ValueError if `num_samples` is not in [1, 2⁶²].
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.num_samples <= 1 << 62:
            raise ValueError(f"an order needs 1 to 2^62 samples, not {self.num_samples}")

    def samples(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sample at each position.

        Shapes: `positions: int64[n]`, counted from 0 over all epochs → `int64[n]` in [0, num_samples).

        Raises: ValueError if a position is negative.
        """
        positions = np.ascontiguousarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"positions start at 0, not {positions.min()}")
        result = np.empty_like(positions)
        for start in range(0, len(positions), _BLOCK):
            epochs, offsets = np.divmod(positions[start : start + _BLOCK], self.num_samples)
            result[start : start + _BLOCK] = self._permute(
                offsets.astype(np.uint64), keys=self._keys(epochs.astype(np.uint64))
            )
        return result

    def _keys(self, epochs: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """One 64-bit key for each (seed, epoch)."""
        seed = np.array([self.seed % (1 << 64)], dtype=np.uint64)
        return mix(mix(seed) + (epochs + np.uint64(1)) * np.uint64(GOLDEN))

    def _permute(self, values: NDArray[np.uint64], *, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Apply the network to each value until the result is below `num_samples` (cycle walking)."""
        # a·b - N < a, so a value needs a second walk with a chance below 1/√N.
        high = math.isqrt(self.num_samples - 1) + 1
        low = -(-self.num_samples // high)
        values = _network(values, keys=keys, high=high, low=low)
        while len(outside := np.flatnonzero(values >= np.uint64(self.num_samples))):
            values[outside] = _network(values[outside], keys=keys[outside], high=high, low=low)
        return values


def _network(values: NDArray[np.uint64], *, keys: NDArray[np.uint64], high: int, low: int) -> NDArray[np.uint64]:
    """Feistel network on [0, high·low): each round adds a keyed function of one half to the other."""
    size_left, size_right = np.uint64(high), np.uint64(low)
    left, right = np.divmod(values, size_right)
    for number in range(_NUM_ROUNDS):
        round_keys = keys + np.uint64((number + 1) * GOLDEN % (1 << 64))
        if number % 2 == 0:
            left = (left + mix(right ^ round_keys) % size_left) % size_left
        else:
            right = (right + mix(left ^ round_keys) % size_right) % size_right
    return left * size_right + right


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64: every bit of the input changes every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

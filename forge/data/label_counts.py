"""How often each label occurs: for weights of the labels, and for the baseline that any classifier must beat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.data.cache_index import LabelIndex
from forge.data.example_store import ExampleWriter
from forge.data.formats.base import LabelSettings
from forge.data.label_bits import BITS, bits_of
from forge.data.rows import IGNORED

_BLOCK = 1 << 14
"""Examples read at once."""


def count_labels(
    folder: Path, examples: ExampleWriter, *, labels: LabelSettings, is_held_out: NDArray[np.bool_]
) -> LabelIndex:
    """Count the labels of prepared examples on both sides."""
    num_labels = len(labels.names)
    counts = np.zeros((2, num_labels), dtype=np.int64)
    targets = np.memmap(folder / "columns" / "targets.bin", dtype="<i4", mode="r")
    for start, stop, on_side in _blocks(examples, is_held_out=is_held_out):
        chosen = np.asarray(targets[start:stop]) != IGNORED
        for side in (0, 1):
            where = start + np.flatnonzero(chosen & (on_side == side))
            if labels.kind == "multi":
                bits = np.memmap(folder / "columns" / "label_bits.bin", dtype="<i4", mode="r")
                counts[side] += bits_of(bits.reshape(-1, -(-num_labels // BITS))[where], count=num_labels).sum(
                    axis=0
                )
            elif labels.kind != "regression":
                counts[side] += np.bincount(targets[where], minlength=num_labels)
    train, held_out = (tuple(side.tolist()) for side in counts)
    return LabelIndex(names=labels.names, train=train, held_out=held_out)


def _blocks(
    examples: ExampleWriter, *, is_held_out: NDArray[np.bool_]
) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """First and last position of some examples, and the side of each position."""
    at = 0
    for start in range(0, examples.num_examples, _BLOCK):
        lengths = examples.lengths[start : start + _BLOCK]
        stop = at + int(lengths.sum())
        yield at, stop, np.repeat(is_held_out[start : start + _BLOCK], lengths).astype(np.int64)
        at = stop

"""The loss curve drawn with block characters, for terminals and plain text."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
_LABEL = 9
# Losses beyond this, and those that are not numbers, are not drawn.
_MAX_LOSS = 1e99


def loss_curve(losses: Sequence[float], *, width: int, rows: int = 5) -> list[str]:
    """Draw losses as `rows` lines of at most `width` characters; empty if no loss can be drawn.

    Each column is the mean of its steps; the largest and the smallest mean label the axis.
    """
    finite = [loss for loss in losses if abs(loss) < _MAX_LOSS]
    columns = max(1, width - _LABEL)
    if not finite:
        return []
    count = min(columns, len(finite))
    means = []
    for column in range(count):
        part = finite[column * len(finite) // count : (column + 1) * len(finite) // count]
        means.append(sum(part) / len(part))
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    levels = [1 + round((value - low) / span * (rows * 8 - 1)) for value in means]
    picture = []
    for row in reversed(range(rows)):
        label = _label(high) if row == rows - 1 else _label(low) if row == 0 else " " * _LABEL
        picture.append(label + "".join(_BLOCKS[min(8, max(0, level - row * 8))] for level in levels))
    return picture


def _label(loss: float) -> str:
    text = f"{loss:8.3f}"
    return (text if len(text) < _LABEL else f"{loss:8.0e}") + " "

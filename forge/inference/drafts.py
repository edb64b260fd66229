"""Guesses of the next tokens of a text: what followed its last two tokens before (prompt lookup decoding).

A step that computes one token reads all weights, and one that computes a few more takes hardly longer. The engine
lets a text that runs alone guess, and keeps the guesses that the model chooses itself.
"""

from __future__ import annotations

from collections.abc import Sequence

_SHORT, _LONG = 3, 7
"""With the newest token a multiple of four, which need no padding."""


class Drafts:
    """What followed each pair of tokens of one text."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], int] = {}
        self._known = 2
        self._size = _SHORT

    def guess(self, tokens: Sequence[int], *, limit: int) -> tuple[int, ...]:
        """Return at most `limit` tokens that may follow; none if the last two tokens are new.

        Args:
            tokens: of the text, which has only grown since the last call.
        """
        for place in range(self._known, len(tokens)):
            self._after[tokens[place - 2], tokens[place - 1]] = place
        self._known = max(self._known, len(tokens))
        start = self._after.get((tokens[-2], tokens[-1])) if len(tokens) > 1 else None
        if start is None:
            return ()
        period = len(tokens) - start  # a text that repeats itself goes on repeating
        return tuple(tokens[start + place % period] for place in range(min(self._size, limit)))

    def checked(self, guessed: int, *, right: int) -> None:
        """Guess more after a guess that was right as a whole."""
        self._size = _LONG if right == guessed else _SHORT

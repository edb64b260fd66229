"""Match paths with glob patterns that others wrote, in time that grows with the length of both and no faster.

`*`, `?` and brackets match within one part of a path, `**` any number of parts, as in fsspec. Its own regular
expressions take exponential time for a pattern such as `a*a*a*a*b`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

_MAGIC = re.compile(r"[*?\[]")
_MAX_PATTERN_CHARS = 1000
_MAX_COMPARISONS = 10_000_000


def matching_paths(patterns: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Return the paths that any of some patterns matches, in their order.

    Raises: ValueError for a pattern that is too long or has `**` beside other characters, or if there are too many
        patterns for so many paths.
    """
    literal: set[str] = set()
    globs: dict[str, _Glob] = {}
    for pattern in patterns:
        if not _MAGIC.search(pattern):
            literal.add(pattern)
        elif pattern not in globs:
            globs[pattern] = _Glob(pattern)
    if len(globs) * len(paths) > _MAX_COMPARISONS:
        raise ValueError(f"{len(globs):,} patterns for {len(paths):,} files are too many")
    return [path for path in paths if path in literal or any(glob.matches(path) for glob in globs.values())]


class _Glob:
    """One pattern."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > _MAX_PATTERN_CHARS:
            raise ValueError(f"a pattern has {len(pattern):,} characters")
        parts = pattern.split("/")
        if any("**" in part and part != "**" for part in parts):
            raise ValueError(f"{pattern!r:.200} is no valid pattern: '**' must stand alone between slashes")
        # fnmatch's expressions have atomic groups, which are not tried in another way.
        self._parts = [None if part == "**" else re.compile(fnmatch.translate(part)) for part in parts]

    def matches(self, path: str) -> bool:
        """Whether the whole path matches."""
        names = path.split("/")
        ends = {0}
        """How many names the parts so far can have matched."""
        for number, part in enumerate(self._parts, start=1):
            if part is not None:
                ends = {end + 1 for end in ends if end < len(names) and part.match(names[end])}
            elif number == len(self._parts):
                return min(ends, default=len(names)) < len(names)
            elif ends:
                ends = set(range(min(ends), len(names)))
            if not ends:
                return False
        return len(names) in ends

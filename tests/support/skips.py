"""Compare the skipped tests of a session with the list of those that may be skipped."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

EXPECTED = Path(__file__).parent.parent / "expected_skips.toml"


def unexpected_skips(skips: Sequence[tuple[str, str]], *, expected: Path = EXPECTED) -> list[str]:
    """Return one line for each skip that is not listed.

    Args:
        skips: node id and reason of each skipped test.
        expected: the list, see `tests/expected_skips.toml`.
    """
    rules = tomllib.loads(expected.read_text(encoding="utf-8"))["skip"]
    return [
        f"{test}: {reason}"
        for test, reason in skips
        if not any(fnmatchcase(test, rule["test"]) and rule["reason"] in reason for rule in rules)
    ]

"""Compare two jobs key by key, so that what changed can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from forge.config.yaml_reader import join_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One key with another value."""

    key: str
    before: Any
    """None if it had no value."""
    now: Any

    def __str__(self) -> str:
        return f"{self.key} changed from {_shown(self.before)} to {_shown(self.now)}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, key: str = "") -> Iterator[Difference]:
    """Yield every key whose value differs, in the order of the file; a missing key is like one without a value."""
    for name in dict.fromkeys([*before, *now]):
        one, other, at = before.get(name), now.get(name), join_key(key, name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, key=at)
        elif one != other:
            yield Difference(key=at, before=one, now=other)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)

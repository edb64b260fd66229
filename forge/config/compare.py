"""Compare two jobs key by key, so that what changed can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.config.yaml_reader import join_key

MAX_DIFFERENCES = 100


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


@dataclass(frozen=True, slots=True, kw_only=True)
class JobDifference:
    """A key that is not the same in several jobs."""

    key: str
    values: tuple[Any, ...]
    """One for each job."""


def job_differences(jobs: Sequence[Mapping[str, Any] | None]) -> list[JobDifference]:
    """Return the keys whose values differ between jobs, but for their names; the first 100. None is no job."""
    known = [job for job in jobs if job is not None]
    keys = dict.fromkeys(one.key for job in known[1:] for one in differences(known[0], job))
    return [
        JobDifference(key=key, values=tuple(_value_at(job, key) for job in jobs))
        for key in list(keys)[:MAX_DIFFERENCES]
        if key != "name"
    ]


def _value_at(job: Mapping[str, Any] | None, key: str) -> Any:
    found: Any = job
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value) if isinstance(value, str) else str(value)

"""Read the records of `events.jsonl` and `metrics.jsonl`, and skip lines that are not what forge writes.

A run folder may have been copied from elsewhere or damaged. Each value of a known event or of a step is checked
against the type that `forge.events` gives it, so that a reader of records needs no checks of its own: numbers are
finite or null, and missing values with a default have it. The number of skipped lines is kept.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from forge.events import Event, StepMetrics
from forge.foreign import LineReader, parse_object, read_file_end, typed

Record = dict[str, Any]
RecordKind = Literal["event", "step"]

EVENTS = "events.jsonl"
METRICS = "metrics.jsonl"
MAX_METRICS_BYTES = 2**32
"""Of `metrics.jsonl`: about ten million steps. Its records are read one by one and not kept."""
MAX_EVENTS_BYTES = 2**29
MAX_EVENT_VALUES = 8_000_000
"""Values of all events together, which are kept in memory: at most about 1 GB."""
_MAX_STEP_BYTES = 2**20
_MAX_EVENT_BYTES = 2**24  # GenerationStarted has about 70 bytes for each rank
_MAX_TIME = 1e11
"""Seconds since the epoch; the year 5138. Larger ones are no times, and break calendars."""
_END_BYTES = 2**20

_EVENTS: dict[str, type[Any]] = {kind.__name__: kind for kind in typing.get_args(Event)}
_TYPES = {
    name: {field.name: (typing.get_type_hints(kind)[field.name], field) for field in dataclasses.fields(kind)}
    for name, kind in _EVENTS.items()
}
_NUMBER = float | None
_STEP_KEYS = tuple(
    StepMetrics(
        step=1, loss=0.0, learning_rate=0.0, grad_norm=0.0, num_tokens=0, tokens_per_s=0.0, mfu=0.0, step_s=0.0,
        peak_memory_gib=0.0, world_size=1,
    ).as_record()
)  # fmt: skip
"""Keys that every step has."""


class RecordReader:
    """Reads new records of a growing file.

    Args:
        kind: whether the file has events or steps.
        skip: number of records to skip.
    """

    def __init__(self, folder: Path, *, kind: RecordKind, skip: int = 0) -> None:
        is_event = kind == "event"
        self._lines = LineReader(
            folder / (EVENTS if is_event else METRICS),
            max_bytes=MAX_EVENTS_BYTES if is_event else MAX_METRICS_BYTES,
            max_line_bytes=_MAX_EVENT_BYTES if is_event else _MAX_STEP_BYTES,
        )
        self._kind: RecordKind = kind
        self._skip = skip
        self._num_values = self._num_invalid = 0

    @property
    def num_invalid(self) -> int:
        """Complete lines that are not valid records."""
        return self._num_invalid + self._lines.num_skipped

    def read(self) -> Iterator[Record]:
        """Yield the records written since the last call; none if the file does not exist yet.

        Raises: ValueError if the file cannot be read, is a link or no file, or is larger than any of forge's.
        """
        try:
            for line in self._lines.lines():
                record = self._record(line)
                if record is None:
                    self._num_invalid += 1
                elif self._skip:
                    self._skip -= 1
                else:
                    yield record
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ValueError(f"{error.strerror}: {error.filename}") from error

    def _record(self, line: bytes) -> Record | None:
        if self._kind == "step":
            return step_record(line)
        self._num_values += line.count(b",") + line.count(b"{") + line.count(b"[")
        if self._num_values > MAX_EVENT_VALUES:
            raise ValueError(f"{EVENTS} has more than {MAX_EVENT_VALUES} values")
        return event_record(line)


def seconds_run(events: Iterable[Mapping[str, Any]]) -> float:
    """How long a run or search has run, added up over its resumptions."""
    total, began = 0.0, None
    for before, event in pairwise(events):
        if before["event"] == "RunStarted":
            began = before["time"]
        if began is not None and event["event"] != "RunStarted":
            total += event["time"] - before["time"]
    return total


def event_record(line: bytes) -> Record | None:
    """Parse a line of `events.jsonl`; None if it is not an event. Unknown events keep only their name and time."""
    try:
        record = parse_object(line)
        time, name = _time(record["time"]), typed(str, record["event"])
        types = _TYPES.get(name)
        if types is None:
            return {"time": time, "event": name[:80]}
        found: Record = {"time": time, "event": name}
        for key, (hint, field) in types.items():
            if key in record:
                found[key] = record[key]
                typed(hint, record[key], where=key, nan_for_null=True)
                if hint is int and record[key] < 0:
                    return None
            elif field.default is not dataclasses.MISSING:
                found[key] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                found[key] = field.default_factory()
            else:
                return None
        return found
    except (ValueError, KeyError):
        return None


def step_record(line: bytes) -> Record | None:
    """Parse a line of `metrics.jsonl`; None if it is not a step. Keys that every step has are null if missing."""
    try:
        record = parse_object(line)
        found: Record = {"time": _time(record["time"]), "step": typed(int, record["step"])}
        if found["step"] < 1:
            return None
        found |= dict.fromkeys(_STEP_KEYS) | found
        for key, value in record.items():
            found[sys.intern(key)] = value if key == "step" else typed(_NUMBER, value, where=key)
    except (ValueError, KeyError):
        return None
    return found


def last_step_of(folder: Path, *, only_end: bool = False) -> Record:
    """Return the last step of a run, from the end of `metrics.jsonl`; empty before the first.

    Args:
        only_end: do not read the whole file if its last MiB has no step.

    Raises: ValueError as `RecordReader.read`.
    """
    try:
        lines = read_file_end(folder / METRICS, max_bytes=_END_BYTES).split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ValueError(f"{error.strerror}: {error.filename}") from error
    for line in reversed(lines):
        record = step_record(line)
        if record is not None:
            return record
    if only_end:
        return {}
    return next(iter(deque(RecordReader(folder, kind="step").read(), maxlen=1)), {})


def _time(value: Any) -> float:
    time: float = typed(float, value, where="time")
    if not 0 <= time <= _MAX_TIME:
        raise ValueError(f"{time} is no time")
    return time

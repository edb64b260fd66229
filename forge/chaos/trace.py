"""Spot traces: when machines came and went, made into a schedule for simulated nodes.

In comes a file that somebody recorded from a real fleet, in any of five formats told apart by their
content, or the parameters of a Poisson process. Out goes a `Trace`: instants, and who joins and who
leaves at each. It can be scaled to as few nodes as one machine can simulate, and sped up. Nothing here
waits or starts anything, so a schedule is known, and can be shown, before it is replayed.

Whatever a file holds is refused or bounded: it comes from elsewhere. The module is long because the five
formats stand in it, below everything else.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from itertools import chain, cycle, islice
from pathlib import Path

from forge.errors import ArgumentError, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChange:
    """What happens at one instant. Who leaves leaves before anyone joins, so a node may do both."""

    at_s: float
    """Since the beginning of the trace."""
    added: tuple[str, ...]
    removed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A fleet's history. No node joins while it is there, none leaves that is not."""

    changes: tuple[NodeChange, ...]
    """In order of time, one an instant; the first, at 0 s, adds the nodes of the beginning (if any)."""
    duration_s: float
    most: int
    """The largest number of nodes at once; at least 1."""


def read_trace(path: Path) -> Trace:
    """Read a trace in whichever format its first line has; blank lines and `#` comments are passed over.

    The formats are those of `_FORMATS`; those with commas may have a heading. Times count from the first
    line's. A trace of counts names its nodes as `from_counts` does.

    Raises: ArgumentError with `file:line` and what was expected there.
    """
    fleet, formats, may_be_heading = _Fleet(), _FORMATS, True
    for place, text in _lines(path):
        readings = ((looks, read(text)) for looks, read in formats.items())
        looks, reading = next((found for found in readings if found[1] is not None), ("", None))
        if reading is None and may_be_heading and _is_heading(text):
            may_be_heading = False
            continue
        if reading is None:
            raise ArgumentError(f"{place}: expected {_any_of(formats)}; got '{printable(text, limit=60)}'")
        formats, may_be_heading = {looks: formats[looks]}, False
        try:
            fleet.take(reading)
        except ArgumentError as error:
            raise ArgumentError(f"{place}: {error}") from None
    try:
        return fleet.trace()
    except ArgumentError as error:
        raise ArgumentError(f"{path}: {error}; expected lines of {_any_of(formats)}") from None


def from_counts(counts: Iterable[tuple[float, int]]) -> Trace:
    """A trace from `(seconds, number of nodes)`, which lasts until the last of them.

    The nodes are `node-1`, `node-2`, ... in order of arrival, no name twice. The one that is there
    longest leaves first: so every node is replaced in time, that of rank 0 too, whereas if the newest
    left first those of the beginning would never be put to the test.

    Raises: ArgumentError for times that go backwards, counts out of bounds, no node at any time.
    """
    fleet = _Fleet()
    for at_s, count in counts:
        fleet.take(_Reading(at_s=at_s, count=count))
    return fleet.trace()


def poisson(*, num_nodes: int, mtbf_s: float, down_s: float, duration_s: float, seed: int) -> Trace:
    """Nodes that fail independently, at a constant rate, and come back under their own name.

    A node's fate depends on the seed and its own number alone, not on how many others there are.

    Args:
        mtbf_s: the mean time for which a node is there, exponentially distributed.
        down_s: how long it is away, always the same; 0 replaces it at the instant.

    Raises: ArgumentError for what is not positive, and for more than a million failures.
    """
    possible = 1 <= num_nodes <= _MAX_NODES and mtbf_s > 0 and down_s >= 0 and 0 < duration_s <= _MAX_DURATION_S
    if not possible or num_nodes * duration_s / (mtbf_s + down_s) > _MAX_ADDED:
        raise ArgumentError(
            f"{num_nodes:,} nodes for {duration_s:g} s, each there for {mtbf_s:g} s and away for {down_s:g} s; "
            f"expected 1 to {_MAX_NODES:,} nodes, times above 0, at most ten years and {_MAX_ADDED:,} failures"
        )
    names = tuple(f"node-{number}" for number in range(1, num_nodes + 1))
    readings = [_Reading(at_s=0.0, added=names), _Reading(at_s=duration_s)]
    for name in names:
        dice = random.Random(f"{seed} {name}")
        fails_s = dice.expovariate(1.0) * mtbf_s
        while fails_s < duration_s:
            readings.append(_Reading(at_s=fails_s, removed=(name,)))
            if fails_s + down_s < duration_s:
                readings.append(_Reading(at_s=fails_s + down_s, added=(name,)))
            fails_s += down_s + dice.expovariate(1.0) * mtbf_s
    fleet = _Fleet()
    for reading in sorted(readings, key=lambda reading: reading.at_s):
        fleet.take(reading)
    return fleet.trace()


def scale(trace: Trace, *, num_nodes: int) -> Trace:
    """The same history with `num_nodes` where the original has its most.

    How many: c nodes become s(c) = ⌊c · num_nodes / most + ½⌋, but 1 rather than 0 where c is at least
    1, since a fleet that has nodes can train; 0 stays 0. This holds at every instant.

    Churn: nodes that are replaced at one instant, k = min(removed, added), move no count, but each is a
    preemption to survive. Of the nodes that stay in number (c the smaller count of the two sides) as
    large a share is replaced: k · s(c) / c. Fractions are carried on from instant to instant, so
    what is replaced in all is the sum of the shares, rounded.

    Who: each simulated node stands for one original. Of those whose original leaves, the oldest leave
    with it; where the count asks for more, the oldest of the others; where for fewer, the rest then
    stand for originals that nobody stands for. A node that joins stands for one that has just joined, if
    it can. Names are `node-1`, `node-2`, ... in order of arrival, none twice.

    Raises: ArgumentError if `num_nodes` is out of bounds.
    """
    if not 1 <= num_nodes <= _MAX_NODES:
        raise ArgumentError(f"a trace is scaled to between 1 and {_MAX_NODES:,} nodes, not to {num_nodes:,}")

    def scaled(count: int) -> int:
        return max(min(count, 1), (2 * count * num_nodes + trace.most) // (2 * trace.most))

    cast, owed, changes, after = _Cast(), Fraction(0), list[NodeChange](), 0
    for change in trace.changes:
        before, after = after, after - len(change.removed) + len(change.added)
        least = min(before, after)
        if replaced := min(len(change.removed), len(change.added)):
            owed += Fraction(replaced * scaled(least), least)
        # Always at most scaled(least): the share is, and what was carried on is less than a half.
        swaps = math.floor(owed + Fraction(1, 2))
        owed -= swaps
        followed = cast.follow(change, num_leaving=scaled(before) - scaled(least) + swaps, num_nodes=scaled(after))
        if followed.added or followed.removed or not changes:
            changes.append(followed)
    return replace(trace, changes=tuple(changes), most=num_nodes)


def faster(trace: Trace, *, speed: float) -> Trace:
    """The same history in `1 / speed` of the time.

    Raises: ArgumentError if the speed is not above 0.
    """
    if not 0 < speed < math.inf:
        raise ArgumentError(f"a trace is replayed at a speed above 0, not at {speed}")
    changes = tuple(replace(change, at_s=change.at_s / speed) for change in trace.changes)
    return replace(trace, changes=changes, duration_s=trace.duration_s / speed)


_MAX_FILE_BYTES = 64 << 20
_MAX_LINE_BYTES = 1 << 20
_MAX_NODES = 10_000
_MAX_ADDED = 1_000_000
_MAX_DURATION_S = 10 * 365 * 86_400.0
"""Ten years; what is longer is milliseconds taken for seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """What one line says: who comes and goes, or how many there are."""

    at_s: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    count: int | None = None
    lasts_s: float = 0.0


class _Fleet:
    """Who is there, line by line; the lines of one instant become one change."""

    def __init__(self) -> None:
        self._num_added = 0
        self._start_s: float | None = None
        self._now_s = 0.0
        self._end_s = 0.0
        self._there: dict[str, None] = {}  # in order of arrival
        self._added: dict[str, None] = {}  # at this instant, and still there
        self._removed: dict[str, None] = {}  # at this instant, and there before it
        self._most = 0
        self._changes: list[NodeChange] = []

    def take(self, reading: _Reading) -> None:
        """Raises: ArgumentError if that cannot have happened, or is more than a trace may hold."""
        self._move_to(reading)
        count = len(self._there) + len(reading.added) if reading.count is None else reading.count
        if not 0 <= count <= _MAX_NODES:
            raise ArgumentError(f"{count:,} nodes at once; expected 0 to {_MAX_NODES:,}")
        for node in reading.removed:
            self._remove(node)
        for node in reading.added:
            self._add(node)
        if reading.count is not None:
            self._become(reading.count)

    def trace(self) -> Trace:
        """Raises: ArgumentError if there never was a node."""
        self._end_instant()
        if not self._most:
            raise ArgumentError("no node at any time")
        return Trace(changes=tuple(self._changes), duration_s=self._end_s, most=self._most)

    def _move_to(self, reading: _Reading) -> None:
        if self._start_s is None:
            self._start_s = reading.at_s
        at_s = reading.at_s - self._start_s
        if at_s < self._now_s:
            raise ArgumentError(f"the time goes backwards, from {self._now_s:g} s to {at_s:g} s after the first")
        end_s = at_s + reading.lasts_s
        if not (reading.at_s >= 0 and reading.lasts_s >= 0 and end_s <= _MAX_DURATION_S):  # so nan fails too
            raise ArgumentError(f"{reading.at_s:g} s; expected 0 or more, at most ten years after the first")
        if at_s > self._now_s:
            self._end_instant()
        self._now_s, self._end_s = at_s, max(self._end_s, end_s)

    def _end_instant(self) -> None:
        if self._added or self._removed or not self._changes:
            added, removed = tuple(self._added), tuple(self._removed)
            self._changes.append(NodeChange(at_s=self._now_s, added=added, removed=removed))
        self._added, self._removed = {}, {}
        self._most = max(self._most, len(self._there))

    def _add(self, node: str) -> None:
        if node in self._there:
            raise ArgumentError(f"node '{printable(node, limit=60)}' is added but is there already")
        self._num_added += 1
        if self._num_added > _MAX_ADDED:
            raise ArgumentError(f"more than {_MAX_ADDED:,} nodes were added by now; a trace adds at most so many")
        self._there[node] = self._added[node] = None

    def _remove(self, node: str) -> None:
        if node not in self._there:
            raise ArgumentError(f"node '{printable(node, limit=60)}' is removed but is not there")
        del self._there[node]
        if node in self._added:  # it came and went at one instant: nobody saw it
            del self._added[node]
        else:
            self._removed[node] = None

    def _become(self, count: int) -> None:
        for node in list(islice(self._there, max(0, len(self._there) - count))):
            self._remove(node)
        for _ in range(count - len(self._there)):
            self._add(f"node-{self._num_added + 1}")


class _Cast:
    """Which simulated node stands for which original; more than one may for the same, where they are more."""

    def __init__(self) -> None:
        self._originals: dict[str, None] = {}  # in order of arrival
        self._stands_for: dict[str, str] = {}  # simulated → original, in order of arrival
        self._num_named = 0

    def follow(self, change: NodeChange, *, num_leaving: int, num_nodes: int) -> NodeChange:
        """The original's change, with so many simulated nodes leaving and so many there after it."""
        for node in change.removed:
            del self._originals[node]
        self._originals.update(dict.fromkeys(change.added))

        gone = set(change.removed)
        bereft = [name for name, original in self._stands_for.items() if original in gone]
        leaving = [*bereft, *(name for name, original in self._stands_for.items() if original not in gone)]
        del leaving[num_leaving:]
        for name in leaving:
            del self._stands_for[name]
        joining = [f"node-{self._num_named + 1 + i}" for i in range(num_nodes - len(self._stands_for))]
        self._num_named += len(joining)
        self._assign([*joining, *bereft[num_leaving:]], num_new=len(change.added))
        return NodeChange(at_s=change.at_s, added=tuple(joining), removed=tuple(leaving))

    def _assign(self, names: list[str], *, num_new: int) -> None:
        """To originals that nobody stands for: first the new ones, which are the last, then the oldest."""
        if not names:
            return
        num_old = len(self._originals) - num_new
        order = [*islice(self._originals, num_old, None), *islice(self._originals, num_old)]
        idle = set(names)
        taken = {original for name, original in self._stands_for.items() if name not in idle}
        free = (original for original in order if original not in taken)
        self._stands_for.update(zip(names, chain(free, cycle(order)), strict=False))


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """The lines that say something, each with its place; read piece by piece, for a file may be a device."""
    number = num_bytes = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(_MAX_LINE_BYTES + 1):
                number, num_bytes = number + 1, num_bytes + len(raw)
                place = f"{path}:{number}"
                if len(raw) > _MAX_LINE_BYTES or num_bytes > _MAX_FILE_BYTES:
                    limits = f"{_MAX_LINE_BYTES >> 20} MiB in a line or {_MAX_FILE_BYTES >> 20} MiB in all"
                    raise ArgumentError(f"{place}: more than {limits}; expected a trace")
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text and not text.startswith("#"):
                    yield place, text
    except UnicodeDecodeError:
        raise ArgumentError(f"{path}:{number}: expected text in UTF-8") from None
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error


def _any_of(formats: Mapping[str, object]) -> str:
    return " or ".join(f"`{looks}`" for looks in formats)


def _fields(text: str) -> list[str]:
    return [field.strip(' \t"') for field in text.split(",")]


def _is_heading(text: str) -> bool:
    """Whether the line only names its columns; that of an index often has no name."""
    names = [field.lower() for field in _fields(text.removeprefix(","))]
    values = {"add", "remove", "nan", "inf", "infinity"}
    return 2 <= len(names) <= 3 and all(name[:1].isalpha() and name not in values for name in names)


def _number(text: str) -> float | None:
    """A number that is not below 0, else None; Python's own takes `nan`, `1_000` and `١` too."""
    return float(text) if re.fullmatch(r"[0-9]{1,30}(\.[0-9]{0,30})?([eE][+-]?[0-9]{1,2})?", text) else None


def _read_named(text: str) -> _Reading | None:
    match _fields(text):
        case [at, "add" | "remove" as what, node] if (at_ms := _number(at)) is not None:
            return _named(at_ms, what, [node])
    return None


def _read_json(text: str) -> _Reading | None:
    try:
        line = json.loads(text, parse_int=float)  # float: of any size, and never a bool
    except (ValueError, RecursionError):
        return None
    match line:
        case [float(at_ms), "add" | "remove" | "no-op" as what, {"nodes": list(nodes), **others}]:
            return _named(at_ms, what, nodes, lasts_ms=others.get("duration", 0.0))
    return None


def _named(at_ms: float, what: str, nodes: list[str], *, lasts_ms: object = 0.0) -> _Reading | None:
    are_names = all(isinstance(node, str) and node and node.isprintable() for node in nodes)
    if not are_names or not isinstance(lasts_ms, float):
        return None
    added, removed = (tuple(nodes) if what == verb else () for verb in ("add", "remove"))
    return _Reading(at_s=at_ms / 1000, added=added, removed=removed, lasts_s=lasts_ms / 1000)


def _read_counted(text: str) -> _Reading | None:
    match _fields(text):
        case [at, number]:
            return _counted(_number(at), number)
    return None


def _read_indexed(text: str) -> _Reading | None:
    index, _, rest = text.partition(",")
    return None if _number(index) is None else _read_counted(rest)


def _read_dated(text: str) -> _Reading | None:
    match _fields(text):
        case [day, time, number]:
            try:
                at = datetime.strptime(f"{day} {time}", "%Y-%m-%d %H:%M:%S")
            except ValueError:
                return None
            return _counted((at - datetime.min).total_seconds(), number)
    return None


def _counted(at_s: float | None, number: str) -> _Reading | None:
    count = _number(number)
    if at_s is None or count is None or not count.is_integer():
        return None
    return _Reading(at_s=at_s, count=int(count))


_FORMATS: Mapping[str, Callable[[str], _Reading | None]] = {
    "milliseconds,add|remove,node": _read_named,
    '[milliseconds, "add"|"remove"|"no-op", {"nodes": [...]}]': _read_json,
    "seconds,count": _read_counted,
    "index,seconds,count": _read_indexed,
    "YYYY-MM-DD, HH:MM:SS, count": _read_dated,
}
"""How a line looks → what it says, or None where it does not look so. No line looks like two of them."""

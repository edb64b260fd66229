"""How many spot and on-demand machines runs with a deadline want on a rented cluster.

The supervisor of such a run, which is on the head, writes a file for it; `forge.cluster.cloud.capacity_backoff` on
the same machine reads the files and limits the autoscaler's node types accordingly. A file that was not renewed for
ten minutes is of a run that has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from forge.foreign import from_record, parse_object, read_file
from forge.fs import make_private, write_atomic

AUTOSCALER_FILE = "ray_bootstrap_config.yaml"
"""In the home folder of the head: JSON in spite of its name, since Ray's launcher writes it."""
MIN_WORKERS_VARIABLE = "FORGE_MIN_WORKERS"
"""In the environment of the head's processes: `workers` of the cluster file, its lower end."""
_MAX_AGE_S = 600.0
_MAX_BYTES = 2**24

Kind = Literal["spot", "on_demand"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    spot: int
    on_demand: int
    at: float


class AutoscalerLimits:
    """The numbers of spot and on-demand machines that one run may have."""

    def __init__(self, run_id: str, *, home: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = limits_folder(home)
        self._file, self._clock = self._folder / f"{run_id}.json", clock

    def write(self, *, num_spot: int, num_on_demand: int) -> None:
        """Set how many machines of each kind the run may have; renew it within ten minutes.

        Raises: OSError if the file cannot be written.
        """
        make_private(self._folder)
        wanted = _Wanted(spot=num_spot, on_demand=num_on_demand, at=self._clock())
        write_atomic(self._file, json.dumps(asdict(wanted)), mode=0o600)

    def clear(self) -> None:
        """Remove the limits when the run has ended."""
        self._file.unlink(missing_ok=True)


def find_limits(run_id: str, *, home: Path) -> AutoscalerLimits | None:
    """Return the limits of a run on this head; None where the cluster does not rent both kinds of machines."""
    try:
        config = parse_object(read_file(home / AUTOSCALER_FILE, max_bytes=_MAX_BYTES))
        kinds = {kind_of(name) for name in config["available_node_types"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return AutoscalerLimits(run_id, home=home) if {"spot", "on_demand"} <= kinds else None


def limits_folder(home: Path) -> Path:
    """The folder with a file for each run."""
    return home / ".forge" / "machine-limits"


def kind_of(node_type: str) -> Kind | None:
    """Whether machines of a node type are spot ones; None for the head. See `InstanceOption.node_type`."""
    if node_type.startswith("on-demand-"):
        return "on_demand"
    return "spot" if node_type.startswith("spot-") else None


def wanted_machines(folder: Path, *, now: float) -> dict[Kind, int] | None:
    """Return the machines of each kind that all runs with a deadline want; None if there are no such runs."""
    wanted = [one for one in _read(folder) if now - one.at < _MAX_AGE_S]
    if not wanted:
        return None
    return {"spot": sum(one.spot for one in wanted), "on_demand": sum(one.on_demand for one in wanted)}


def limit_types(
    wanted: Mapping[Kind, int], *, max_workers: Mapping[str, int], existing: Mapping[str, int], min_workers: int = 0
) -> dict[str, int]:
    """Return the largest number of machines by node type, for which Ray may rent.

    All types of a kind together get no more than is wanted of it, so the first one gets all that its own limit
    allows; if the cloud has none, it is paused and the next one gets them. No type gets fewer than exist, which Ray
    would end at once, and both kinds together no fewer than the cluster file's minimum: spot machines as far as
    they can be had, then on-demand ones.

    Args:
        max_workers: of each node type, the preferred one first: as the cluster file allows, or as many as exist
            while it is paused.
        min_workers: of the cluster file.
    """
    num_on_demand = sum(count for name, count in existing.items() if kind_of(name) == "on_demand")
    num_spot = max(wanted["spot"], min_workers - num_on_demand)
    found = _limit_kind("spot", num_spot, max_workers=max_workers, existing=existing)
    num_on_demand = max(wanted["on_demand"], min_workers - sum(found.values()))
    return found | _limit_kind("on_demand", num_on_demand, max_workers=max_workers, existing=existing)


def _limit_kind(
    kind: Kind, num_wanted: int, *, max_workers: Mapping[str, int], existing: Mapping[str, int]
) -> dict[str, int]:
    names = [name for name in max_workers if kind_of(name) == kind]
    left = max(0, num_wanted - sum(existing.get(name, 0) for name in names))
    found = {}
    for name in names:
        count = existing.get(name, 0)
        added = min(left, max(0, max_workers[name] - count))
        found[name], left = count + added, left - added
    return found


def _read(folder: Path) -> Iterator[_Wanted]:
    for path in sorted(folder.glob("*.json")):
        try:
            body: dict[str, Any] = parse_object(read_file(path, max_bytes=_MAX_BYTES))
            yield from_record(_Wanted, body)
        except (OSError, ValueError):
            continue

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
    wanted: Mapping[Kind, int], *, max_workers: Mapping[str, int], existing: Mapping[str, int]
) -> dict[str, int]:
    """Return the largest number of machines by node type; never fewer than exist, which Ray would end at once.

    Args:
        max_workers: of each node type, as the cluster file allows.
    """
    found = {}
    for node_type, largest in max_workers.items():
        if (kind := kind_of(node_type)) is None:
            continue
        others = sum(count for name, count in existing.items() if kind_of(name) == kind)
        count = existing.get(node_type, 0)
        found[node_type] = max(count, min(largest, count + wanted[kind] - others))
    return found


def _read(folder: Path) -> Iterator[_Wanted]:
    for path in sorted(folder.glob("*.json")):
        try:
            body: dict[str, Any] = parse_object(read_file(path, max_bytes=_MAX_BYTES))
            yield from_record(_Wanted, body)
        except (OSError, ValueError):
            continue

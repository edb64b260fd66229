"""What a run's folder says about it: how far it came, how it goes, how it ended.

Read from `plan.json`, `events.jsonl` and `metrics.jsonl` alone, so it works on a run that goes on, on
one that died, and on a folder that was copied from elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forge.errors import ArgumentError, PlanError
from forge.plan.plan import Plan, plan_from_json

Status = Literal["running", "finished", "stopped", "failed", "died"]
ENDINGS: dict[str, Status] = {"RunFinished": "finished", "RunStopped": "stopped", "RunFailed": "failed"}
_POLL_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One run at a glance."""

    run_id: str
    folder: Path
    status: Status
    plan: Plan
    started: float
    """Seconds since the epoch."""
    updated: float
    last: dict[str, Any]
    """The newest line of `metrics.jsonl`; empty before the first step."""
    events: tuple[dict[str, Any], ...]

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return int(self.last.get("step", 0))

    def newest(self, kind: str, **fields: Any) -> dict[str, Any] | None:
        """The newest event of a kind whose fields have these values."""
        for event in reversed(self.events):
            if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                found: dict[str, Any] = event
                return found
        return None


def find_run(name: str, *, root: Path) -> Path:
    """A run's folder, by its path, its id, a unique beginning of it, or `latest`.

    Raises: ArgumentError naming what there is instead.
    """
    if (Path(name) / "plan.json").is_file():
        return Path(name)
    folders = _folders(root)
    if name == "latest" and folders:
        return folders[0]
    exact = [folder for folder in folders if folder.name == name]
    found = exact or [folder for folder in folders if folder.name.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(folder.name for folder in (found or folders)[:5])
    if found:
        raise ArgumentError(f"{name} could be any of {len(found)} runs: {known}")
    raise ArgumentError(
        f"no run {name} under {root}" + (f"; there are {known}" if known else ", which holds no runs")
    )


def list_runs(root: Path) -> list[RunSummary]:
    """Every run under a folder, newest first; folders that hold no readable run are passed over."""
    runs = []
    for folder in _folders(root):
        try:
            runs.append(read_run(folder))
        except (ArgumentError, PlanError):
            continue
    return runs


def read_run(folder: Path) -> RunSummary:
    """Raises: ArgumentError if the folder holds no run, PlanError if its plan cannot be read."""
    try:
        plan = plan_from_json((folder / "plan.json").read_text())
        started = (folder / "plan.json").stat().st_mtime
    except OSError as error:
        raise ArgumentError(f"{folder} holds no run: {error.strerror}") from error
    events = tuple(_lines(folder / "events.jsonl"))
    metrics = list(_lines(folder / "metrics.jsonl"))
    return RunSummary(
        run_id=folder.name,
        folder=folder,
        status=_status(folder, events),
        plan=plan,
        started=events[0]["time"] if events else started,
        updated=max([started, *(record["time"] for record in (*events[-1:], *metrics[-1:]))]),
        last=metrics[-1] if metrics else {},
        events=events,
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Every step that was recorded."""
    return list(_lines(folder / "metrics.jsonl"))


def carrier_pid(folder: Path) -> int | None:
    """The process that carries a run now; None if nobody does."""
    try:
        with (folder / ".lock").open("r+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
    except (OSError, ValueError):
        pass
    return None


def follow(folder: Path, *, pid: int, past_events: int = 0, past_steps: int = 0) -> Iterator[dict[str, Any] | None]:
    """News of a run as they are written, events and steps alike, until it has ended or its process is gone.

    Yields None when there is nothing new, so that a screen can keep its clock going. Steps are the
    records without an `event` key.

    Args:
        pid: the process that carries the run.
        past_events, past_steps: lines that are known already.
    """
    tails = [_Tail(folder / "metrics.jsonl", past_steps), _Tail(folder / "events.jsonl", past_events)]
    gone_since: float | None = None
    while True:
        records = [record for tail in tails for record in tail.read()]
        for record in records:
            yield record
            if record.get("event") in ENDINGS:
                return
        if not records:
            yield None
            if not _is_alive(pid):
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > 2 * _POLL_S:
                    return
            time.sleep(_POLL_S)


class _Tail:
    """New whole lines of a file that grows."""

    def __init__(self, path: Path, skip: int) -> None:
        self._path, self._offset, self._skip = path, 0, skip

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.splitlines()
        skipped, self._skip = min(self._skip, len(lines)), max(0, self._skip - len(lines))
        return [json.loads(line) for line in lines[skipped:]]


def _status(folder: Path, events: tuple[dict[str, Any], ...]) -> Status:
    if carrier_pid(folder) is not None:
        return "running"
    for event in reversed(events):
        if event["event"] in ENDINGS:
            return ENDINGS[event["event"]]
        if event["event"] == "RunStarted":
            break
    return "died"


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if (path / "plan.json").is_file()]
    return sorted(folders, key=lambda path: (path / "plan.json").stat().st_mtime, reverse=True)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)
    except FileNotFoundError:
        return


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")

"""The checkpoints of a run, or of any place that holds some: which there are, and which are to be believed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forge.checkpoint.manifest import step_name
from forge.checkpoint.reader import list_checkpoints, open_checkpoint, verify_checkpoint
from forge.checkpoint.storage import Storage, open_storage
from forge.errors import ArgumentError, CheckpointError
from forge.plan.plan import plan_from_json
from forge.runs.reader import find_run


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointLocation:
    """Where checkpoints lie, and what lies beside them."""

    url: str
    tokenizer: Path | None
    """Of the run they belong to; None for a bare place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """One checkpoint, as far as it can be read."""

    name: str
    url: str
    step: int | None
    num_tokens: int | None
    size_bytes: int | None
    num_parts: int | None
    has_average: bool
    problem: str | None
    """Why it is not to be believed; None if all that was looked at is right."""


def locate(name: str, *, root: Path) -> CheckpointLocation:
    """The place of a run's checkpoints, by whatever names a run, or by the folder or URL of the checkpoints.

    Raises: ArgumentError if there is neither.
    """
    if "://" in name:
        return CheckpointLocation(url=name.rstrip("/"), tokenizer=None)
    if name and Path(name).is_dir() and any(Path(name).glob("step-*")):
        return CheckpointLocation(url=name.rstrip("/"), tokenizer=None)
    folder = find_run(name, root=root)
    plan = plan_from_json((folder / "plan.json").read_text())
    return CheckpointLocation(url=plan.job.checkpoint.url_of(str(folder)), tokenizer=folder / "tokenizer")


def entries(url: str, *, step: int | None = None, with_checksums: bool = False) -> Iterator[CheckpointEntry]:
    """Every checkpoint of a place, newest first, or the one of a step.

    Args:
        with_checksums: read every byte; otherwise sizes alone are compared.

    Raises: CheckpointError if the place cannot be asked; ArgumentError if it has none of that step.
    """
    storage = open_storage(url)
    names = list_checkpoints(storage)
    if step is not None:
        if step_name(step) not in names:
            there = ", ".join(name.removeprefix("step-").lstrip("0") for name in names[:5]) or "none"
            raise ArgumentError(f"{url} has no checkpoint of step {step}; there are: {there}")
        names = [step_name(step)]
    for name in names:
        yield _entry(storage, name, problem=verify_checkpoint(storage, name, with_checksums=with_checksums))


def entry_record(entry: CheckpointEntry) -> dict[str, Any]:
    """As JSON."""
    return asdict(entry)


def _entry(storage: Storage, name: str, *, problem: str | None) -> CheckpointEntry:
    try:
        found = open_checkpoint(storage, name)
    except CheckpointError as error:
        return CheckpointEntry(
            name=name,
            url=f"{storage.url}/{name}",
            step=None,
            num_tokens=None,
            size_bytes=None,
            num_parts=None,
            has_average=False,
            problem=problem or str(error),
        )
    return CheckpointEntry(
        name=name,
        url=found.url,
        step=found.progress.step,
        num_tokens=found.progress.num_tokens,
        size_bytes=found.manifest.size_bytes,
        num_parts=len(found.manifest.parts),
        has_average="ema" in found.kinds,
        problem=problem,
    )

"""Compare the free space of this machine's disk with the plan of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import stored_steps
from forge.fs import free_bytes
from forge.plan.plan import DraftPlan
from forge.plan.space import space_warning

_PlanT = TypeVar("_PlanT", bound=DraftPlan)


def with_space(plan: _PlanT, *, run_folder: Path | None = None, must_fit: bool) -> _PlanT:
    """Return the plan of a run on this machine, with a warning if its checkpoints may not fit.

    Checkpoints in an object store are not counted: their size has no limit that could be known.

    Args:
        run_folder: of a run that is resumed; its checkpoints are replaced by the new ones.
        must_fit: whether the run is about to start; a dry run may be of one that is to train elsewhere.

    Raises: PlanError if it must fit and not even one checkpoint of a new run does.
    """
    checkpoint = plan.job.checkpoint
    root = Path(checkpoint.runs) if run_folder is None else run_folder
    free = free_bytes(root)
    if "://" in checkpoint.to or free is None:
        return plan
    if run_folder is not None:
        free += sum(stored_steps(open_storage(checkpoint.url_of(str(run_folder)))).values())
    warning = space_warning(plan, folder=str(root), free_bytes=free, must_fit=must_fit)
    return plan if warning is None else replace(plan, warnings=(*plan.warnings, warning))

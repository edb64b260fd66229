"""Delete a run's folder: never a running run, never through links, never a folder with files of others."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from forge.code_archive import ARCHIVE
from forge.errors import ArgumentError, PlanError, printable
from forge.foreign import open_file
from forge.runs.annotations import ANNOTATIONS
from forge.runs.index import forget_runs
from forge.runs.lock import LOCK, driver_pid, hold_lock
from forge.runs.reader import read_run, search_folder
from forge.runs.records import EVENTS, METRICS
from forge.runs.remote_ref import REMOTE
from forge.runs.scores import SCORES
from forge.runs.task_examples import TASK_EXAMPLES
from forge.runs.trials import TRIALS

_NAMES = {
    *("job.yaml", "plan.json", EVENTS, METRICS, ARCHIVE, TASK_EXAMPLES, REMOTE, ANNOTATIONS, LOCK),
    *(
        "logs",
        "tokenizer",
        "checkpoints",
        "wandb",
        "mlflow.db",
        "mlflow.db-journal",  # of SQLite, after a kill
        "tensorboard",
        "report.html",
        "best.yaml",
        SCORES,
        f".{SCORES}.lock",
        "evaluations",  # the answers to tasks
        TRIALS,
        ".ray",
    ),
}
"""What forge writes into a run folder; a folder with anything else may be a project of the user."""
_TEMPORARY = ".tmp"
"""Ending of the temporary files of `write_atomic`."""
_MAX_LISTED = 5


def require_deletable(folder: Path) -> None:
    """Check that a folder is a run's alone, and that the run is not running.

    Raises: ArgumentError with the reason.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise ArgumentError(f"{folder} is a link or no folder; delete the folder that it leads to by its own path")
    try:
        os.close(open_file(folder / "plan.json"))
    except OSError as error:
        raise ArgumentError(f"{folder} holds no run: {error.strerror}") from None
    search = search_folder(folder)
    if search is not None:
        raise ArgumentError(f"{folder.name} is a trial of {search.name}; delete the whole search")
    names = [path.name for path in folder.iterdir()]
    others = sorted(
        name for name in names if name not in _NAMES and not (name[0] == "." and name.endswith(_TEMPORARY))
    )
    if others:
        listed = printable(", ".join(others[:_MAX_LISTED]), limit=300)
        raise ArgumentError(
            f"{folder} has files that are not a run's: {listed}"
            + (f" and {len(others) - _MAX_LISTED} more" if len(others) > _MAX_LISTED else "")
            + "; move them elsewhere first"
        )
    pid = driver_pid(folder)
    if pid is not None:
        raise ArgumentError(
            f"{folder.name} is running, in process {pid}; stop it first: forge runs stop {folder.name}"
        )
    with contextlib.suppress(PlanError):
        if read_run(folder).status == "running":  # on another machine
            raise ArgumentError(f"{folder.name} is running; stop it first: forge runs stop {folder.name}")


def delete_run(folder: Path) -> None:
    """Delete the folder of a run that `require_deletable` accepts. Links in it are removed, not what they lead to.

    Raises: ArgumentError as `require_deletable`, or if the folder cannot be deleted.
    """
    require_deletable(folder)
    try:
        with hold_lock(folder):
            shutil.rmtree(folder)
    except OSError as error:
        raise ArgumentError(f"{folder} cannot be deleted: {error}") from None
    forget_runs([folder])

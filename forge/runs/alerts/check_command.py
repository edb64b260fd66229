"""Check the program of `alerts.command` before a run starts: whether it exists, and whose choice it is.

A run folder that came from elsewhere must not choose a program of this machine, so the command in the job file of
a run that is resumed is used only if it was used on this machine before, or its digest is in FORGE_TRUST_CODE.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from forge.code_archive import TRUST, require_trusted, trust_code
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.errors import UserCodeError, printable


def require_command(loaded: LoadedJob, *, resume: Path | None, is_local: bool) -> None:
    """Check the command of a job that is about to be run.

    Args:
        resume: folder of the run that the job continues.
        is_local: whether it runs on this machine, which must have the program then.

    Raises: JobFileError if the program does not exist; UserCodeError if a run folder brings the command.
    """
    alerts = loaded.job.alerts
    if alerts is None or alerts.command is None:
        return
    digest = command_digest(alerts.command)
    location = loaded.source.locations.get("alerts.command")
    is_of_run = resume is not None and Path(loaded.source.path).resolve() == (resume / "job.yaml").resolve()
    if resume is not None and is_of_run and location is not None and location.line is not None:
        try:
            require_trusted(digest, run_folder=resume)
        except UserCodeError:
            words = printable(" ".join(alerts.command), limit=200)
            raise UserCodeError(
                f"{resume.name} brings an alerts.command, which was never used on this machine and would be "
                f"executed: {words}. If you trust it, run the command again with {TRUST}={digest}"
            ) from None
    if is_local and (problem := _problem(alerts.command)) is not None:
        raise loaded.source.error("alerts.command", problem, show_value=False)
    trust_code(digest)


def command_warnings(job: JobSpec) -> tuple[str, ...]:
    """Return one sentence if this machine lacks the program of a job's alerts."""
    command = job.alerts.command if job.alerts is not None else None
    problem = None if command is None else _problem(command)
    return () if problem is None else (f"alerts.command {problem}",)


def command_digest(command: Sequence[str]) -> str:
    """blake2b-128 of a command; hexadecimal."""
    return hashlib.blake2b(json.dumps(["alerts.command", *command]).encode(), digest_size=16).hexdigest()


def _problem(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return f"begins with {printable(command[0], limit=80)}, which is no program of this machine"
    return None

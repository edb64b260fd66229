"""Pack the code folder of a job and check the classes it names, before anything is started.

Names, syntax and sizes are checked here; the classes are imported in a subprocess
(`forge.runtime.check_user_code`), because user code may import torch and the client does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from forge.code_archive import PackedCode, pack_code, read_run_code, require_trusted, trust_code, unpack_code
from forge.config.load import LoadedJob
from forge.errors import UserCodeError
from forge.objective.registry import Direction
from forge.plan.inputs import CodeInfo
from forge.runs.reader import read_plan
from forge.user_code import check_module_names, check_reference, is_reference

_IMPORT_TIMEOUT_S = 300.0


def resolve_code(loaded: LoadedJob) -> CodeInfo | None:
    """Pack the job's code into the cache and check every class that the job or its search names; None without code.

    Raises: JobFileError with the line of the job file and the line of the user's file.
    """
    job = loaded.job
    if job.code is None:
        return None
    try:
        code = loaded.code or _packed(Path(job.code).expanduser(), runs=Path(job.checkpoint.runs).expanduser())
        digest = code.digest
        unpack_code(code)
        trust_code(digest)
    except UserCodeError as error:
        raise loaded.source.error("code", str(error), show_value=False) from error
    references = dict(_references(loaded))
    for key, reference in references.items():
        try:
            check_reference(code, reference)
        except UserCodeError as error:
            raise loaded.source.error(key, str(error)) from error
    imported = _import({reference: _kind(key) for key, reference in references.items()}, digest=digest)
    for key, reference in references.items():
        if reference in imported.problems:
            raise loaded.source.error(key, imported.problems[reference])
    return CodeInfo(
        digest=digest,
        num_files=len(code.files),
        size_bytes=code.size_bytes,
        metric_directions=imported.metric_directions,
    )


def with_run_code(loaded: LoadedJob, *, run_folder: Path) -> LoadedJob:
    """Return the job of a run to resume; the job file in its own run folder gets the code packed at its start.

    The folder of another job file, or of `--set code=...`, is packed again, and refused by `reopen_run` if it
    differs.

    Raises: UserCodeError if the run folder has lost its archive, it was changed, or its code was never used on this
        machine.
    """
    location = loaded.source.locations.get("code")
    is_own = Path(loaded.source.path).resolve() == (run_folder / "job.yaml").resolve()
    code = read_plan(run_folder).code
    if not is_own or location is None or location.line is None:
        return loaded
    if code is None:
        raise UserCodeError(
            f"{run_folder / 'job.yaml'} names the code folder {loaded.job.code}, and the plan of the run has none: "
            "the file was changed after the run began"
        )
    require_trusted(code.digest, run_folder=run_folder)
    return replace(loaded, code=read_run_code(code.digest, run_folder=run_folder))


def _packed(folder: Path, *, runs: Path) -> PackedCode:
    if runs.resolve().is_relative_to(folder.resolve()):
        raise UserCodeError(
            f"{folder} contains the run folders ({runs}), so it would change with every run; move the code into a "
            "folder of its own, such as ./src"
        )
    code = pack_code(folder)
    check_module_names(code, folder=folder)
    return code


def _references(loaded: LoadedJob) -> Iterator[tuple[str, str]]:
    """Every class that is named, by the key to blame: in the job itself, the search space and its proxy."""
    yield from loaded.job.user_classes.items()
    if loaded.job.search is None:
        return
    for key, value in loaded.job.search.proxy.items():
        if is_reference(value) and key in _KINDS:
            yield f"search.proxy.{key}", value
    for key, entry in loaded.job.search.space.items():
        kind = "choice" if entry.choice is not None else "grid"
        for index, value in enumerate(entry.values or ()):
            if is_reference(value) and key in _KINDS:
                yield f"search.space.{key}.{kind}[{index}]", value


_KINDS = {"model.class": "model", "data.format": "format", "training.objective": "objective"}


def _kind(key: str) -> str:
    return next(kind for name, kind in _KINDS.items() if name in key)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Imported:
    """What the import of some classes has shown."""

    problems: Mapping[str, str]
    """What is wrong with each class that is wrong, by reference."""
    metric_directions: Mapping[str, Mapping[str, Direction]] = field(default_factory=dict)
    """Of each objective."""


def _import(kinds: dict[str, str], *, digest: str) -> _Imported:
    """Import classes, given what each is used as, in a subprocess."""
    if not kinds:
        return _Imported(problems={})
    command = [sys.executable, "-P", "-m", "forge.runtime.check_user_code"]
    request = json.dumps({"digest": digest, "kinds": kinds})
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            text=True,
            env=os.environ | {"TRANSFORMERS_VERBOSITY": "error"},
            check=False,
            timeout=_IMPORT_TIMEOUT_S,
        )
        return _Imported(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        problem = f"its import takes longer than {_IMPORT_TIMEOUT_S:.0f} s"
    except (ValueError, TypeError):
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        problem = f"its import ended the process: {lines[-1]}"
    return _Imported(problems=dict.fromkeys(kinds, problem))

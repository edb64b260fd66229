"""Find what a command is given as RUN|FOLDER: a run, or a folder of weights."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

from forge.checkpoint.peft_folder import adapters_problem
from forge.environment import expand_home
from forge.errors import ArgumentError, printable
from forge.runs.reader import find_run


def find_model(name: str | Path, *, root: Path, marker: str = "config.json") -> Path:
    """Return the folder of a run or of weights.

    Args:
        root: the folder of runs.
        marker: the file that a folder of weights has; `adapter_config.json` for adapters.

    Raises: ArgumentError that says what the folder lacks, or lists the runs that exist.
    """
    path = Path(expand_home(str(name)))
    with contextlib.suppress(OSError, ValueError):  # a name may be too long for a path, or have a zero byte
        if (path / marker).is_file() and not (path / "plan.json").is_file():
            return path
    try:
        return find_run(str(name), root=root)
    except ArgumentError as error:
        raise ArgumentError(_why_not(path, marker=marker, no_run=str(error))) from None


def _why_not(path: Path, *, marker: str, no_run: str) -> str:
    shown = printable(str(path), limit=200)
    with contextlib.suppress(OSError, ValueError):
        adapters = adapters_problem(str(path)) if marker == "config.json" else None
        if adapters is not None:
            return (
                f"{adapters}; serve them over their base (forge serve BASE --adapter NAME={shown}), or merge them "
                "with peft (merge_and_unload, save_pretrained)"
            )
        if path.is_dir():
            return f"{shown} has no {marker}, so it holds no model; {no_run}"
        if len(path.parts) > 1:
            names = (
                [folder.name for folder in path.parent.iterdir() if folder.is_dir()] if path.parent.is_dir() else []
            )
            nearest = difflib.get_close_matches(path.name, names, n=1)
            hint = f"; did you mean {path.parent / nearest[0]}?" if nearest else ""
            return f"there is no folder {shown}{hint}; {no_run}"
    return no_run if str(path) == "latest" else f"{no_run}; there is no folder of this name either"

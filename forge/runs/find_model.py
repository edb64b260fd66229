"""Find what a command is given as RUN|FOLDER: a run, or a folder of weights."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path

from forge.checkpoint.peft_folder import adapters_problem
from forge.environment import expand_home
from forge.errors import ArgumentError, printable
from forge.runs.checkpoints import CheckpointEntry, entries
from forge.runs.reader import find_run, read_plan


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


def require_weights(
    folder: Path, *, step: int | str | None = None, ema: bool = False, is_elsewhere: bool = False
) -> None:
    """Check, before torch is imported, that a folder of `find_model` has the weights that are asked for.

    Args:
        step: of a run's checkpoint, or `best`; None: the newest.
        ema: whether its averaged (EMA) weights are asked for.
        is_elsewhere: the checkpoints are read on another cluster, and are not looked for here. Those in object
            storage never are.

    Raises: ArgumentError for `step` or `ema` of a folder of weights, for a run without a checkpoint, and for one
        whose checkpoint has no averaged weights; CheckpointError if its checkpoints cannot be listed.
    """
    if not (folder / "plan.json").is_file():
        options = [option for option, is_given in (("--step", step is not None), ("--ema", ema)) if is_given]
        if options:
            raise ArgumentError(
                f"{folder} is a folder of weights and not a run, so it has no steps and no averaged (EMA) weights; "
                f"leave out {' and '.join(options)}, or name the run"
            )
        return
    url = read_plan(folder).job.checkpoint.url_of(str(folder))
    if is_elsewhere or "://" in url:
        return
    stored = list(entries(url, step=step)) if step is not None else _newest_usable(url)
    if not stored:
        raise ArgumentError(
            f"{folder.name} has no checkpoint in {url}: the run has written none yet, or they were deleted or "
            "moved; checkpoint.every of its job says when it writes one, and Ctrl-C in the run writes one"
        )
    if ema and stored[0].problem is None and not stored[0].has_average:
        raise ArgumentError(
            f"{stored[0].name} of {folder.name} has no averaged (EMA) weights: its job has no training.ema; leave "
            "out --ema"
        )


def _newest_usable(url: str) -> list[CheckpointEntry]:
    """The newest checkpoint that has all its files, or else the newest; none where there are none."""
    newest: list[CheckpointEntry] = []
    for entry in entries(url):
        if entry.problem is None:
            return [entry]
        newest = newest or [entry]
    return newest


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

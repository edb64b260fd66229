"""The tree of errors: exit codes, pickling, and messages that are safe to print."""

from __future__ import annotations

import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

from forge.errors import ForgeError, JobFileError

EXIT_CODES = {
    "JobFileError": 2,
    "PlanError": 2,
    "DataError": 2,
    "CheckpointError": 2,
    "ClusterError": 3,
    "RunError": 4,
}
FULL = JobFileError(
    "must be 0, 1, 2 or 3",
    path="job.yaml",
    line=31,
    key="training.zero.stage",
    value="7",
    nearest="3",
    others=(JobFileError("is empty", path="job.yaml", line=40, key="data"),),
)


def subclasses(root: type[ForgeError]) -> Iterator[type[ForgeError]]:
    for child in root.__subclasses__():
        yield child
        yield from subclasses(child)


def import_client_side() -> None:
    """Import the packages that may define errors and need no torch."""
    for name in ("config", "plan", "pricing"):
        package = importlib.import_module(f"forge.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"forge.{name}."):
            importlib.import_module(module.name)


import_client_side()


@pytest.mark.parametrize("kind", [ForgeError, *subclasses(ForgeError)])
def test_errors__pickled__are_unchanged(kind: type[ForgeError]) -> None:
    error: Any = FULL if kind is JobFileError else kind("12 steps of 10: too many")
    error.extra = {"step": 12}
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.exit_code == error.exit_code
    assert _plain(copy) == _plain(error)


def _plain(error: BaseException) -> dict[str, Any]:
    """Return the attributes; nested exceptions, which compare by identity, are converted too."""
    return {
        name: [_plain(item) for item in value] if name == "others" else value for name, value in vars(error).items()
    }


def test_errors__exit_codes__are_2_3_or_4() -> None:
    known = {kind.__name__: kind.exit_code for kind in subclasses(ForgeError)}
    assert EXIT_CODES.items() <= known.items()
    assert set(known.values()) <= {2, 3, 4}


def test_errors__every_class__is_in_the_documented_tree() -> None:
    drawing = importlib.import_module("forge.errors").__doc__ or ""
    assert all(kind.__name__ in drawing for kind in subclasses(ForgeError) if kind.__module__ == "forge.errors")


def test_job_file_error__complete__has_location_value_and_suggestion() -> None:
    assert str(FULL).splitlines() == [
        "job.yaml:31: training.zero.stage: must be 0, 1, 2 or 3 (got 7); did you mean '3'?",
        "and 1 more problem:",
        "  job.yaml:40: data: is empty",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (JobFileError("is wrong"), "job: is wrong"),
        (JobFileError("is wrong", path="a.yaml"), "a.yaml: is wrong"),
        (JobFileError("is wrong", path="--set", key="a.b", value="1"), "--set a.b=1: is wrong"),
        (JobFileError("is wrong", path="--set", key="a.b"), "--set a.b: is wrong"),
        (JobFileError("is wrong", path="--set", value="ab"), "--set ab: is wrong"),
    ],
)
def test_job_file_error__without_line__has_a_location(error: JobFileError, message: str) -> None:
    assert str(error) == message


def test_job_file_error__many_problems__lists_ten() -> None:
    others = tuple(JobFileError("is wrong", path="a.yaml", line=n) for n in range(2, 30))
    lines = str(JobFileError("is wrong", path="a.yaml", line=1, others=others)).splitlines()
    assert lines[0] == "a.yaml:1: is wrong"
    assert lines[1] == "and 28 more problems:"
    assert lines[-2:] == ["  a.yaml:10: is wrong", "  and 19 more"]


def test_job_file_error__hostile_text__is_printable_and_short() -> None:
    nasty = "\x1b[31m\r\n\0\ud800\u202e" * 10_000
    error = JobFileError(nasty, path=nasty, key=nasty, value=nasty, nearest=nasty)
    assert str(error).isprintable()
    assert len(str(error)) < 20_000
    assert error.value == nasty

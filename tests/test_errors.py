"""The tree of errors: exit codes, pickles, and messages that cannot hurt a terminal."""

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
    """Errors may be defined beside the code that raises them, wherever that needs no torch."""
    for room in ("config", "plan"):
        package = importlib.import_module(f"forge.{room}")
        for module in pkgutil.iter_modules(package.__path__, f"forge.{room}."):
            importlib.import_module(module.name)


import_client_side()


@pytest.mark.parametrize("kind", [ForgeError, *subclasses(ForgeError)])
def test_every_error_survives_pickle(kind: type[ForgeError]) -> None:
    error: Any = FULL if kind is JobFileError else kind("12 steps of 10: too many")
    error.extra = {"step": 12}
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == str(error)
    assert copy.exit_code == error.exit_code
    assert _plain(copy) == _plain(error)


def _plain(error: BaseException) -> dict[str, Any]:
    """Attributes; exceptions compare by identity, so those among them are taken apart, too."""
    return {
        name: [_plain(item) for item in value] if name == "others" else value for name, value in vars(error).items()
    }


def test_exit_codes_say_whose_turn_it_is() -> None:
    known = {kind.__name__: kind.exit_code for kind in subclasses(ForgeError)}
    assert EXIT_CODES.items() <= known.items()
    assert set(known.values()) <= {2, 3, 4}


def test_every_error_is_in_the_drawn_tree() -> None:
    drawing = importlib.import_module("forge.errors").__doc__ or ""
    assert all(kind.__name__ in drawing for kind in subclasses(ForgeError) if kind.__module__ == "forge.errors")


def test_a_job_file_error_names_place_key_value_and_cure() -> None:
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
def test_a_job_file_error_without_a_line_still_names_a_place(error: JobFileError, message: str) -> None:
    assert str(error) == message


def test_of_many_problems_ten_are_listed() -> None:
    others = tuple(JobFileError("is wrong", path="a.yaml", line=n) for n in range(2, 30))
    lines = str(JobFileError("is wrong", path="a.yaml", line=1, others=others)).splitlines()
    assert lines[0] == "a.yaml:1: is wrong"
    assert lines[1] == "and 28 more problems:"
    assert lines[-2:] == ["  a.yaml:10: is wrong", "  and 19 more"]


def test_messages_are_printable_and_bounded() -> None:
    nasty = "\x1b[31m\r\n\0\ud800\u202e" * 10_000
    error = JobFileError(nasty, path=nasty, key=nasty, value=nasty, nearest=nasty)
    assert str(error).isprintable()
    assert len(str(error)) < 20_000
    assert error.value == nasty

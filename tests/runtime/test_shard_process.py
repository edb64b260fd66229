"""forge.runtime.shard_process: a client asks a driver process, hears of its progress, and can stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.errors import DataError, RunError
from forge.process import is_alive
from forge.runtime.torch_subprocess import run_driver

MODULE = "tests.support.patient_driver"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.slow
def test_run_driver__answer_and_error__reach_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    progress: list[tuple[int, int]] = []
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    answer = run_driver(
        MODULE, request={"work": "done"}, what="cannot", on_progress=lambda *one: progress.append(one)
    )
    assert answer == {"work": "done", "ray": "token"}  # set before the driver imports Ray
    assert progress == [(1, 3)]
    with pytest.raises(DataError, match="no such data"):
        run_driver(MODULE, request={"work": "fail"}, what="cannot")
    with pytest.raises(RunError, match="cannot: its process was ended by SIGKILL, as the kernel does when memory"):
        run_driver(MODULE, request={"work": "die"}, what="cannot")


def test_run_driver__interrupted__ends_the_driver() -> None:
    messages: list[str] = []

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_driver(
            MODULE, request={"work": "wait"}, what="cannot", on_message=messages.append, on_progress=interrupt
        )
    assert not is_alive(int(messages[0].removeprefix("pid ")))

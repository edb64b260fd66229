from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.runs import logs
from forge.runs.logs import follow_log, log_size
from tests.support.runs import make_run


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(logs, "_POLL_S", 0.0)
    path = make_run(tmp_path) / "logs" / "rank-0.log"
    path.write_text("before\n")
    return path


def test_follow_log__lines_appended_until_the_run_ends__are_all_yielded_once(log: Path) -> None:
    def writes() -> Iterator[bool]:
        for number in range(3):
            with log.open("a") as file:
                file.write(f"line {number}\n")
            yield number < 2  # the last line is written when the run ends

    states = writes()
    folder = log.parent.parent
    found = follow_log(folder, name="rank-0", offset=log_size(folder, name="rank-0"), goes_on=lambda: next(states))
    assert "".join(found) == "line 0\nline 1\nline 2\n"


def test_follow_log__log_written_anew__is_read_from_its_start(log: Path) -> None:
    log.write_text("new\n")
    assert list(follow_log(log.parent.parent, name="rank-0", offset=100, goes_on=lambda: False)) == ["new\n"]


def test_logs_follow__run_that_is_not_running__prints_its_end_without_control_characters(log: Path) -> None:
    log.write_text("a\x1b[2Jb\n")
    done = CliRunner().invoke(app, ["runs", "logs", str(log.parent.parent), "-f"])
    assert done.exit_code == 0
    assert "\x1b" not in done.output
    assert "b\n" in done.output

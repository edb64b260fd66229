from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.events import RunFailed
from forge.runs import logs
from forge.runs.logs import LibraryWarnings, LogTail, follow_log, log_names, log_size, read_new
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


PACKAGE = "/venv/lib/python3.11/site-packages"
FUTURE = f"{PACKAGE}/torch/c10d_logger.py:83: FutureWarning: `x` is deprecated.\n  return func(*args)\n"
RAY = f"{PACKAGE}/ray/context.py:468: RayDeprecationWarning: This is deprecated.\nUse y instead\n  not self.x\n"
OWN = "/home/me/my_model.py:3: UserWarning: the mask is ignored\n  warnings.warn(text)\n"
ERROR = (
    f'Traceback (most recent call last):\n  File "{PACKAGE}/torch/x.py", line 3, in f\n    y()\nValueError: no\n'
)


@pytest.mark.parametrize(
    ("text", "left", "counts"),
    [
        (FUTURE + "hello\n" + 2 * FUTURE, "hello\n", {"FutureWarning": 3}),
        (RAY + "hello\n", "hello\n", {"RayDeprecationWarning": 1}),
        (OWN + ERROR, OWN + ERROR, {}),
        (FUTURE.partition("  ")[0] + ERROR, ERROR, {"FutureWarning": 1}),
        ("no end", "no end", {}),
        (f"{PACKAGE}/a.py:1: UserWarning: last", f"{PACKAGE}/a.py:1: UserWarning: last", {}),
        ("", "", {}),
    ],
)
def test_library_warnings__text__warnings_of_packages_are_folded_and_counted(
    text: str, left: str, counts: dict[str, int]
) -> None:
    whole, pieces = LibraryWarnings(), LibraryWarnings()
    assert (whole.fold(text), whole.counts) == (left, counts)
    assert "".join(pieces.feed(character) for character in text) + pieces.close() == left
    assert LibraryWarnings(are_shown=True).fold(text) == text


def test_logs__run__its_own_lines_then_those_of_rank_0_without_warnings(log: Path) -> None:
    log.write_text(FUTURE + "from the model\n" + FUTURE)
    done = CliRunner().invoke(app, ["runs", "logs", str(log.parent.parent)])
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("step      1/6  loss ")]
    assert [line for line in lines if "held-out" in line]
    assert lines[-2:] == ["--- rank-0.log", "from the model"]
    assert done.stderr == "not shown: warnings of libraries (2 FutureWarning); --all shows them\n"


def test_logs__all_or_one_file__shows_what_it_should(log: Path) -> None:
    log.write_text(FUTURE + "from the model\n")
    folder = str(log.parent.parent)
    assert CliRunner().invoke(app, ["runs", "logs", folder, "--file", "rank-0"]).stdout == "from the model\n"
    done = CliRunner().invoke(app, ["runs", "logs", folder, "--file", "rank-0", "--all"])
    assert (done.stdout, done.stderr) == (FUTURE + "from the model\n", "")


def test_logs__run_without_a_log_that_failed__shows_its_steps_and_why(tmp_path: Path) -> None:
    folder = make_run(tmp_path, endings=[RunFailed(error="RunError", message="the loss is not finite")])
    done = CliRunner().invoke(app, ["runs", "logs", str(folder), "-n", "2"])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "failed: the loss is not finite"
    assert len(done.stdout.splitlines()) == 2


def test_log_tail__growing_log__gives_whole_lines_once(log: Path) -> None:
    tail = LogTail(log.parents[1], name="rank-0")
    assert tail.read() == "before\n"
    with log.open("a") as file:
        file.write("half")
    assert tail.read() == ""
    with log.open("a") as file:
        file.write(" a line\nnext\n")
    assert tail.read() == "half a line\nnext\n"
    log.write_text("anew\n")
    assert tail.read() == "anew\n"
    log.unlink()
    assert tail.read() == ""


def test_log_tail__huge_log__reads_a_bounded_part_and_says_what_is_left_out(log: Path) -> None:
    with log.open("wb") as file:
        file.truncate(2**32)
        file.seek(0, 2)
        file.write(b"\nlast lines\n\xff\xfe\n")
    tail = LogTail(log.parents[1], name="rank-0", max_bytes=100)
    assert tail.read().splitlines()[1:] == ["last lines", "\ufffd\ufffd"]
    with log.open("a") as file:
        file.writelines(f"line {number}\n" for number in range(100))
    head, *lines = tail.read().splitlines()
    assert "bytes are left out" in head and lines[-1] == "line 99" and lines[0].startswith("line ")
    with log.open("a") as file:
        file.write("x" * 1000)
    assert len(tail.read()) < 200, "a line longer than a part is not waited for"


def test_logs__links__are_not_followed(log: Path, tmp_path: Path) -> None:
    folder, outside = log.parents[1], tmp_path / "outside"
    outside.mkdir()
    (outside / "rank-0.log").write_text("private\n")
    log.unlink()
    log.symlink_to(outside / "rank-0.log")
    assert LogTail(folder, name="rank-0").read() == "" and read_new(folder, name="rank-0", offset=0) == ("", 0)
    log.unlink()
    log.parent.rmdir()
    (folder / "logs").symlink_to(outside)
    for name in ("rank-0", "../outside/rank-0"):
        assert LogTail(folder, name=name).read() == ""
        assert read_new(folder, name=name, offset=0) == ("", 0) and log_size(folder, name=name) == 0
    assert log_names(folder) == []


def test_log_names__numbers__are_in_their_order(log: Path) -> None:
    for name in ("rank-10", "rank-2", "driver"):
        (log.parent / f"{name}.log").touch()
    assert log_names(log.parents[1]) == ["driver", "rank-0", "rank-2", "rank-10"]

"""What a run's folder says of it: whole, torn, spoilt, growing, or not there."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ArgumentError, CheckpointError, ClusterError, RunError
from forge.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GenerationStarted,
    GenerationStarting,
    MembershipChangeStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    RunStopped,
    event_to_record,
)
from forge.process import is_alive
from forge.runs.reader import (
    RunSummary,
    driver_pid,
    error_named,
    failure_of,
    find_run,
    follow,
    list_runs,
    read_metrics,
    read_run,
    summary_record,
)
from tests.support.runs import make_run, metrics, open_recorder

STARTED = RunStarted(run_id="r", total_steps=6, resumed_from_step=0)
STARTING = GenerationStarting(generation=1, world_size=1, from_step=0, source="storage")
WORKING = GenerationStarted(
    generation=1, world_size=1, device="cpu", peak_flops=1.0, peak_source="test", seconds={}, ranks=()
)
CHANGE = MembershipChangeStarted(generation=1, cause="loss", reason="node lost", seconds_since_cause=0.0)
SAVED = CheckpointSaved(step=2, folder="x", size_bytes=1, seconds=0.1, stall_s=0.0)
FAILED = RunFailed(error="ClusterError", message="the machine has gone")


@contextmanager
def carried(folder: Path, *, pid: int | None = None) -> Iterator[None]:
    """The run's lock, held as `forge.runtime.driver` holds it."""
    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(pid or os.getpid()))
        lock.flush()
        yield


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


class TestFinding:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        for age, name in enumerate(["tiny-03-c", "tiny-02-b", "tiny-02-a", "other-1"]):
            plan = make_run(tmp_path, name) / "plan.json"
            os.utime(plan, (time.time() - 10 * age,) * 2)
        return tmp_path

    @pytest.mark.parametrize(
        ("name", "found"),
        [("tiny-02-a", "tiny-02-a"), ("tiny-03", "tiny-03-c"), ("o", "other-1"), ("latest", "tiny-03-c")],
    )
    def test_find_run__id_prefix_or_latest__finds_it(self, root: Path, name: str, found: str) -> None:
        assert find_run(name, root=root) == root / found

    def test_find_run__path__finds_it(self, root: Path, tmp_path: Path) -> None:
        assert find_run(str(root / "other-1"), root=tmp_path / "elsewhere") == root / "other-1"

    def test_find_run__id_that_prefixes_another__is_exact(self, root: Path) -> None:
        make_run(root, "tiny-02-a-2")
        assert find_run("tiny-02-a", root=root).name == "tiny-02-a"

    def test_find_run__ambiguous_prefix__lists_them(self, root: Path) -> None:
        with pytest.raises(ArgumentError, match=r"tiny could be any of 3 runs: tiny-03-c, tiny-02-b, tiny-02-a"):
            find_run("tiny", root=root)

    @pytest.mark.parametrize("name", ["nobody", "", "x" * 5000, "a\x1b[31mb", "\x00"])
    def test_find_run__unknown_name__lists_the_runs(self, root: Path, name: str) -> None:
        with pytest.raises(ArgumentError, match=r"no run .* under .*its runs are tiny-03-c") as caught:
            find_run(name, root=root)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.touch()])
    def test_find_run__no_runs__raises(self, tmp_path: Path, make: Callable[[Path], None]) -> None:
        make(tmp_path / "runs")
        assert list_runs(tmp_path / "runs") == []
        for name in ("latest", "x"):
            with pytest.raises(ArgumentError, match="holds no runs"):
                find_run(name, root=tmp_path / "runs")

    @pytest.mark.parametrize(
        "plan", [b"", b"{}", b"[]", b"null", b"\xff\xfe\x00", b'{"format_version": 1}', b'{"format_version": 99}']
    )
    def test_list_runs__other_files__are_skipped(self, root: Path, plan: bytes) -> None:
        (root / "garbage").mkdir()
        (root / "garbage" / "plan.json").write_bytes(plan)
        (root / "empty").mkdir()
        (root / "file").write_text("x")
        assert [run.run_id for run in list_runs(root)] == ["tiny-03-c", "tiny-02-b", "tiny-02-a", "other-1"]


class TestReading:
    def test_read_run__newest_step_and_events(self, tmp_path: Path) -> None:
        run = read_run(make_run(tmp_path, steps=3, endings=[RunFinished(step=3)]))
        assert (run.step, run.last["train/loss"], run.plan.total_steps) == (3, 5 / 3, 6)
        assert run.started <= run.updated
        newest = run.newest("Evaluated", weights="current")
        assert newest is not None
        assert newest["metrics"]["perplexity"] == 7.39
        assert run.newest("Evaluated", weights="ema") is None

    def test_read_run__invalid_lines__are_skipped(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=2, endings=[RunFinished(step=2)])
        before = read_run(folder)
        for name in ("events.jsonl", "metrics.jsonl"):
            path = folder / name
            spoilt = b'\x00\x00\n[1]\n{"a": 1}\n\xff{\n"x"\n{"event": "X", "step": 9}\n'
            path.write_bytes(spoilt + path.read_bytes() + b'{"event": "RunFa')
        after = read_run(folder)
        assert (after.events, after.last, after.status) == (before.events, before.last, before.status)
        assert [record["step"] for record in read_metrics(folder)] == [1, 2]

    def test_read_run__no_steps__step_0(self, tmp_path: Path) -> None:
        run = read_run(make_run(tmp_path, steps=0))
        assert (run.step, run.last) == (0, {})

    def test_read_run__no_run__raises(self, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="holds no run: No such file"):
            read_run(tmp_path)

    def test_summary_record__failed_run__is_json_with_the_reason(self, tmp_path: Path) -> None:
        record = summary_record(read_run(make_run(tmp_path, endings=[FAILED])))
        assert json.loads(json.dumps(record)) == record
        assert (record["status"], record["failure"]) == ("failed", "the machine has gone")
        assert (record["held_out_perplexity"], record["held_out_perplexity_ema"]) == (7.39, None)


class TestStatus:
    @pytest.mark.parametrize(
        ("endings", "status"),
        [
            ([RunFinished(step=3)], "finished"),
            ([RunStopped(step=3)], "stopped"),
            ([FAILED], "failed"),
            ([], "died"),
            ([RunStopped(step=3), STARTED], "died"),
            ([FAILED, STARTED, RunFinished(step=6)], "finished"),
            (
                [RunFinished(step=3), CheckpointSaved(step=3, folder="x", size_bytes=1, seconds=1.0, stall_s=0.0)],
                "finished",
            ),
        ],
    )
    def test_status__restarted_run__of_the_newest_session(
        self, tmp_path: Path, endings: list[Event], status: str
    ) -> None:
        assert read_run(make_run(tmp_path, endings=endings)).status == status

    def test_status__lock_is_held__running(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, endings=[RunStopped(step=3)])
        with carried(folder):
            assert driver_pid(folder) == os.getpid()
            assert read_run(folder).status == "running"
        assert driver_pid(folder) is None
        assert read_run(folder).status == "stopped"

    def test_driver_pid__lock_of_a_dead_process__none(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        (folder / ".lock").write_text(str(dead_pid()))
        assert driver_pid(folder) is None

    def test_driver_pid__pid_of_an_earlier_driver__waits_for_the_new_one(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        before = dead_pid()
        with carried(folder, pid=before):  # has the lock, has not yet written its own pid
            threading.Timer(0.05, lambda: (folder / ".lock").write_text(str(os.getpid()))).start()
            assert driver_pid(folder) == os.getpid()

    def test_driver_pid__concurrent_calls__none(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        (folder / ".lock").write_text(str(os.getpid()))
        with (folder / ".lock").open() as asking:
            fcntl.flock(asking, fcntl.LOCK_SH)
            assert driver_pid(folder) is None

    @pytest.mark.parametrize(
        ("error", "kind"),
        [("ClusterError", ClusterError), ("CheckpointError", CheckpointError), ("Nonsense", RunError),
         ("printable", RunError), ("Exception", RunError)],
    )  # fmt: skip
    def test_failure_of__failed__is_the_error(self, tmp_path: Path, error: str, kind: type[Exception]) -> None:
        failure = failure_of(read_run(make_run(tmp_path, endings=[RunFailed(error=error, message="why")])))
        assert (type(failure), str(failure)) == (kind, "why")
        assert type(error_named(error, message="why")) is kind

    def test_failure_of__died__names_the_log(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path)
        assert str(folder / "logs" / "driver.log") in str(failure_of(read_run(folder)))

    def test_failure_of__died_with_a_log__ends_with_its_last_line(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, "r")
        log = folder / "logs" / "driver.log"
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(b"first\n" + b"x" * 9000 + b"\nconnecting to \x1b[31mRay\xff\n\n  \n")
        message = str(failure_of(read_run(folder)))
        assert re.search(r"driver\.log and ends with: connecting to \S+\[31mRay\S$", message), message
        log.write_text("y" * 9000)
        assert len(str(failure_of(read_run(folder)))) < 1000
        log.unlink()
        log.symlink_to("/etc/hostname")
        assert str(failure_of(read_run(folder))).endswith("driver.log")

    def test_failure_of__finished_or_stopped__none(self, tmp_path: Path) -> None:
        runs: list[RunSummary] = [
            read_run(make_run(tmp_path, str(number), endings=[ending]))
            for number, ending in enumerate([RunFinished(step=3), RunStopped(step=3)])
        ]
        assert [failure_of(run) for run in runs] == [None, None]


class TestFollowing:
    def followed(self, folder: Path, *, pid: int, past_events: int = 0, past_steps: int = 0) -> list[Any]:
        """What is new, as event names and step numbers."""
        records = follow(folder, goes_on=lambda: is_alive(pid), past_events=past_events, past_steps=past_steps)
        return [record.get("event") or record["step"] for record in records if record is not None]

    def test_follow__ended_run__in_order_and_the_end_last(self, tmp_path: Path) -> None:
        evaluated = Evaluated(step=2, loss=1, metrics={}, num_tokens=1, weights="ema", seconds=0.1)
        events = [(0, STARTED), (3, evaluated), (3.5, RunFinished(step=4))]
        lines = [{"time": time} | event_to_record(event) for time, event in events]
        write_lines(tmp_path / "events.jsonl", lines)
        write_lines(tmp_path / "metrics.jsonl", [{"time": time, "step": time} for time in (1, 2, 4)])
        followed = self.followed(tmp_path, pid=os.getpid())
        assert followed == ["RunStarted", 1, 2, "Evaluated", 4, "RunFinished"]

    def test_follow__events_of_the_same_millisecond__in_the_order_of_their_file(self, tmp_path: Path) -> None:
        events = (STARTED, SAVED, WORKING, RunFinished(step=0))
        write_lines(tmp_path / "events.jsonl", [{"time": 1.0} | event_to_record(event) for event in events])
        followed = self.followed(tmp_path, pid=os.getpid())
        assert followed == ["RunStarted", "CheckpointSaved", "GenerationStarted", "RunFinished"]

    def test_follow__past_records__are_skipped(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=3, endings=[RunStopped(step=3), STARTED, RunFinished(step=3)])
        assert self.followed(folder, pid=os.getpid(), past_events=4, past_steps=2) == [3, "RunFinished"]

    def test_follow__earlier_end__is_skipped(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=3, endings=[RunStopped(step=3)])
        assert self.followed(folder, pid=dead_pid(), past_events=3, past_steps=3) == []

    def test_follow__growing_run__yields_as_written(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=0)
        records = follow(folder, goes_on=lambda: True)
        assert [record and record["event"] for record in (next(records), next(records))] == ["RunStarted", None]

        def grow() -> None:
            recorder = open_recorder(folder)
            for step in (1, 2, 3):
                recorder.step(metrics(step))
                time.sleep(0.15)
            recorder.event(
                Evaluated(step=3, loss=1, metrics={"perplexity": 2.7}, num_tokens=1, weights="ema", seconds=0.1)
            )
            recorder.event(RunFinished(step=3))

        writer = threading.Thread(target=grow)
        writer.start()
        followed = [record.get("event") or record["step"] for record in records if record is not None]
        writer.join()
        assert followed == [1, 2, 3, "Evaluated", "RunFinished"]

    @pytest.mark.parametrize(
        ("events", "expected"),
        [
            ([WORKING, RunFinished(step=2)], ["GenerationStarted", 1, 2, "RunFinished"]),
            ([RunFailed(error="RunError", message="why")], [1, 2, "RunFailed"]),
            ([CHANGE, RunStopped(step=2)], [1, 2, "MembershipChangeStarted", "RunStopped"]),
            ([SAVED, WORKING, RunStopped(step=2)], ["CheckpointSaved", "GenerationStarted", 1, 2, "RunStopped"]),
        ],
    )
    def test_follow__steps_recorded_before_the_start_of_their_generation__come_after_it(
        self, tmp_path: Path, events: list[Event], expected: list[Any]
    ) -> None:
        folder = make_run(tmp_path, steps=0)
        recorder = open_recorder(folder)
        recorder.event(STARTING)
        records = follow(folder, goes_on=lambda: True)
        assert [record and record["event"] for record in (next(records), next(records))] == [
            "RunStarted",
            "GenerationStarting",
        ]
        recorder.step(metrics(1))
        recorder.step(metrics(2))
        assert next(records) is None, "the steps are held back"
        for event in events:
            recorder.event(event)
        followed = [record.get("event") or record["step"] for record in records if record is not None]
        assert followed == expected

    def test_follow__start_is_never_recorded__steps_come_after_a_while(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("forge.runs.record_order.START_PATIENCE_S", 0.1)
        folder = make_run(tmp_path, steps=0)
        recorder = open_recorder(folder)
        recorder.event(STARTING)
        records = follow(folder, goes_on=lambda: True, past_events=1)
        first = next(records)
        assert first is not None and first["event"] == "GenerationStarting"
        recorder.step(metrics(1))
        nothing, step = next(records), next(records)
        assert nothing is None
        assert step is not None and step["step"] == 1
        recorder.step(metrics(2))
        step = next(records)
        assert step is not None and step["step"] == 2

    def test_follow__driver_dies_before_the_start_is_recorded__yields_the_steps(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=0)
        recorder = open_recorder(folder)
        recorder.event(STARTING)
        records = follow(folder, goes_on=lambda: False, past_events=1)
        first = next(records)
        assert first is not None and first["event"] == "GenerationStarting"
        recorder.step(metrics(1))
        assert [record["step"] for record in records if record is not None] == [1]

    def test_follow__partial_line__once_complete(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=0)
        append(folder / "metrics.jsonl", '{"step": 1, "time"')
        records = follow(folder, goes_on=lambda: True, past_events=1)
        assert next(records) is None
        append(folder / "metrics.jsonl", ": 1.5}\nrubbish\n")
        found = next(records)
        assert found is not None
        assert {name: value for name, value in found.items() if value is not None} == {"step": 1, "time": 1.5}
        assert next(records) is None

    def test_follow__driver_gone__ends_with_everything_written(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=2)
        began = time.monotonic()
        assert set(self.followed(folder, pid=dead_pid())) == {"RunStarted", 1, 2, "Evaluated"}
        assert time.monotonic() - began < 3

    def test_is_alive__zombie__false(self, tmp_path: Path) -> None:
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
        process.start()
        try:
            assert self.followed(make_run(tmp_path, steps=1), pid=process.pid or 0)
        finally:
            process.join()

    def test_follow__missing_files__waits(self, tmp_path: Path) -> None:
        folder = make_run(tmp_path, steps=0)
        (folder / "events.jsonl").unlink()
        records = follow(folder, goes_on=lambda: True)
        assert next(records) is None
        open_recorder(folder).event(RunFinished(step=0))
        assert [record and record["event"] for record in records] == ["RunFinished"]

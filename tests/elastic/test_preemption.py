"""Reclaim notices are heard in time, told once, and survive whatever the services do meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from forge.elastic.preemption.watch import Notice, PollInterval, watch, watchers
from forge.errors import ClusterError
from tests.support.clouds import Aws, Azure, Gcp, Service, iso
from tests.support.command import wait_for

CLOUDS = [Aws, Gcp, Azure]
QUICK = PollInterval(pause_s=0.02, timeout_s=0.3)
NOON = 1_800_000_000.0
AT_NOON = PollInterval(clock=lambda: NOON)


# Where to watch


@pytest.mark.parametrize("environment", [{}, {"FORGE_CLOUD": ""}, {"FORGE_CLOUD": " , "}])
def test_where_no_cloud_is_named_nobody_is_asked(environment: dict[str, str]) -> None:
    with Aws() as aws:
        around = {name: value for name, value in aws.environment.items() if name != "FORGE_CLOUD"}
        assert watchers(around | environment) == []
        asyncio.run(asyncio.wait_for(watch(around | environment, print), 1))
        assert aws.questions == []


def test_several_clouds_may_be_named() -> None:
    assert [watcher.place for watcher in watchers({"FORGE_CLOUD": "Kubernetes, azure"})] == ["kubernetes", "azure"]


def test_an_unknown_cloud_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ClusterError, match=r"'awss'.*aws, gcp, azure, kubernetes"):
        watchers({"FORGE_CLOUD": "awss"})


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Azure() as azure:
        azure.announce()
        assert len(ask_once(azure)) == 1


# In time and once


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_is_heard_within_a_second(cloud: type[Service]) -> None:
    async def hear() -> None:
        with cloud() as service:
            async with watching(service.environment) as heard:
                await until(lambda: len(service.questions) >= 2)
                assert heard.empty()
                service.announce()
                notice = await asyncio.wait_for(heard.get(), 1.0)
        assert notice.source == service.environment["FORGE_CLOUD"]
        assert notice.is_certain
        assert notice.deadline == pytest.approx(time.time() + (120 if cloud is Aws else 30), abs=3)

    asyncio.run(hear())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_notice_that_stands_is_told_once(cloud: type[Service]) -> None:
    async def hear() -> None:
        with cloud() as service:
            service.announce()
            async with watching(service.environment, pace=QUICK) as heard:
                await asyncio.wait_for(heard.get(), 1.0)
                num_questions = len(service.questions)
                await until(lambda: len(service.questions) >= num_questions + 5)
                assert heard.empty()

    asyncio.run(hear())


# Faults of the services


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_failed_is_heard_again(cloud: type[Service], fault: str) -> None:
    async def hear() -> None:
        with cloud() as service:
            async with watching(service.environment, pace=QUICK) as heard:
                await until(lambda: len(service.questions) >= 3)
                service.fault = fault
                await until(lambda: service.num_failed >= 2)
                service.fault = ""
                service.announce()
                assert (await asyncio.wait_for(heard.get(), 3.0)).is_certain

    asyncio.run(hear())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_service_that_was_away_is_heard_again(cloud: type[Service], caplog: pytest.LogCaptureFixture) -> None:
    async def hear() -> None:
        with cloud() as service:
            async with watching(service.environment, pace=QUICK) as heard:
                await until(lambda: len(service.questions) >= 3)
                await asyncio.to_thread(service.stop)
                await until(lambda: "trying on" in caplog.text)
                service.start()
                service.announce()
                assert (await asyncio.wait_for(heard.get(), 3.0)).is_certain

    asyncio.run(hear())


def test_watch__service_keeps_failing__pause_doubles_up_to_5_s_and_one_warning_is_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pauses: list[float] = []

    async def no_sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 8:
            raise asyncio.CancelledError

    monkeypatch.setattr("forge.elastic.preemption.watch.asyncio.sleep", no_sleep)
    # A folder cannot be read as a notice file.
    environment = {"FORGE_CLOUD": "kubernetes", "FORGE_NOTICE_FILE": str(tmp_path)}
    asyncio.run(watch(environment, print))
    assert pauses == [0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5]
    assert caplog.text.count("IsADirectoryError") == 1


def test_a_watch_that_is_cancelled_leaves_a_long_poll_at_once() -> None:
    async def hear() -> float:
        with Gcp(longest_hold_s=10) as gcp:
            async with watching(gcp.environment):
                await until(lambda: gcp.num_held == 2)
                began = time.monotonic()
            return time.monotonic() - began

    assert asyncio.run(hear()) < 0.5


def test_a_notice_that_could_not_be_taken_is_told_again() -> None:
    async def hear() -> None:
        heard: list[Notice] = []

        def take(notice: Notice) -> None:
            heard.append(notice)
            if len(heard) == 1:
                raise RuntimeError("not now")

        with Aws() as aws:
            aws.announce()
            task = asyncio.create_task(watch(aws.environment, take, pace=QUICK))
            await until(lambda: len(heard) == 2)
            task.cancel()
        assert [(notice.source, notice.is_certain) for notice in heard] == 2 * [("aws", True)]

    asyncio.run(hear())


# AWS


def test_aws_is_asked_with_a_token_that_lasts() -> None:
    with Aws() as aws:
        ask_once(aws, times=3)
        assert (aws.num_refused, aws.num_tokens) == (0, 1)


def test_an_expired_aws_token_is_renewed_and_the_notice_heard_in_the_same_question() -> None:
    with Aws() as aws:
        interruption, _ = watchers(aws.environment)

        async def ask() -> Mapping[str, Notice]:
            await interruption.ask()
            aws.tokens.clear()
            aws.announce()
            return await interruption.ask()

        assert len(asyncio.run(ask())) == 1
        assert aws.num_refused == 1


def test_an_aws_token_is_renewed_before_it_expires() -> None:
    now = NOON
    with Aws() as aws:
        interruption, _ = watchers(aws.environment, pace=PollInterval(clock=lambda: now))

        async def ask() -> None:
            nonlocal now
            await interruption.ask()
            now += 21_600 - 30
            await interruption.ask()

        asyncio.run(ask())
        assert (aws.num_refused, aws.num_tokens) == (0, 2)


def test_a_rebalance_recommendation_is_uncertain_and_has_no_deadline() -> None:
    with Aws(rebalance={"noticeTime": iso(NOON)}) as aws:
        assert ask_once(aws) == [Notice(source="aws", deadline=None, is_certain=False)]


@pytest.mark.parametrize("cloud", [Aws, Azure])
@pytest.mark.parametrize("minutes", [-60, 0, 60])
def test_a_deadline_is_told_by_this_machines_clock(cloud: type[Service], minutes: int) -> None:
    with cloud(clock=lambda: NOON + 60 * minutes) as service:
        service.announce()
        (notice,) = ask_once(service, pace=AT_NOON)
        left_s = 120 if cloud is Aws else 30
        # The service's Date has whole seconds; up to one too early is safe.
        assert notice.deadline == NOON + left_s - 1


# GCP


def test_a_gcp_question_is_held_open_and_answered_by_the_change() -> None:
    async def hear() -> None:
        with Gcp(longest_hold_s=10) as gcp:
            async with watching(gcp.environment) as heard:
                await until(lambda: gcp.num_held == 2)
                # One that told the values of the two keys, and one that is held.
                assert len(gcp.questions) == 2
                gcp.announce()
                await asyncio.wait_for(heard.get(), 0.3)

    asyncio.run(hear())


def test_a_gcp_change_between_two_questions_is_not_missed() -> None:
    with Gcp() as gcp:
        preemption, _ = watchers(gcp.environment)

        async def ask() -> Mapping[str, Notice]:
            await preemption.ask()
            gcp.announce()
            return await asyncio.wait_for(preemption.ask(), 0.5)

        assert len(asyncio.run(ask())) == 1


@pytest.mark.parametrize(
    ("value", "deadlines"),
    [("NONE", []), ("MIGRATE_ON_HOST_MAINTENANCE", []), ("TERMINATE_ON_HOST_MAINTENANCE", [NOON + 60])],
)
def test_gcp_maintenance_counts_where_it_ends_the_machine(value: str, deadlines: list[float]) -> None:
    with Gcp() as gcp:
        gcp.change("maintenance-event", value)
        assert [notice.deadline for notice in ask_once(gcp, pace=AT_NOON)] == deadlines


# Azure


@pytest.mark.parametrize(
    ("event", "deadlines"),
    [
        ({}, [NOON + 29]),
        ({"kind": "Terminate"}, [NOON + 29]),
        ({"not_before": ""}, [NOON]),
        ({"machine": "spot_4"}, []),
        ({"kind": "Reboot"}, []),
        ({"kind": "Freeze"}, []),
    ],
    ids=["preempt", "terminate", "begun", "another-machine", "reboot", "freeze"],
)
def test_an_azure_event_counts_if_it_takes_this_machine_away(event: Any, deadlines: list[float]) -> None:
    with Azure(clock=AT_NOON.clock) as azure:
        azure.schedule(**event)
        assert [notice.deadline for notice in ask_once(azure, pace=AT_NOON)] == deadlines


# Kubernetes: the guard of a pod


def test_sigterm_to_the_guard_is_a_notice_within_a_second_and_the_child_lives_on(tmp_path: Path) -> None:
    file = tmp_path / "notices" / "notice.json"

    async def hear() -> Notice:
        with guarding(file, "import time; ready(); time.sleep(60)", grace_s="30") as guard:
            (child,) = psutil.Process(guard.pid).children()
            async with watching({"FORGE_CLOUD": "kubernetes", "FORGE_NOTICE_FILE": str(file)}) as heard:
                guard.send_signal(signal.SIGTERM)
                notice = await asyncio.wait_for(heard.get(), 1.0)
            assert child.is_running()
        return notice

    notice = asyncio.run(hear())
    assert (notice.source, notice.is_certain) == ("kubernetes", True)
    assert notice.deadline == pytest.approx(time.time() + 30, abs=3)


def test_the_child_is_asked_to_end_shortly_before_the_grace_does(tmp_path: Path) -> None:
    ends_well = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); ready(); time.sleep(60)"
    with guarding(tmp_path / "notice.json", ends_well, grace_s="3.5") as guard:
        began = time.monotonic()
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(timeout=5) == 7
        assert 0.5 <= time.monotonic() - began < 1.5


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    file = tmp_path / "notice.json"
    with guarding(file, "import time; ready(); time.sleep(60)", grace_s="30") as guard:
        guard.send_signal(signal.SIGTERM)
        wait_for(file.exists, timeout_s=5)
        guard.send_signal(signal.SIGTERM)
        assert guard.wait(timeout=5) == 128 + signal.SIGTERM


def test_sigint_is_passed_on_at_once(tmp_path: Path) -> None:
    waits = "import signal, time; signal.signal(2, signal.SIG_DFL); ready(); time.sleep(60)"
    with guarding(tmp_path / "notice.json", waits) as guard:
        guard.send_signal(signal.SIGINT)
        assert guard.wait(timeout=5) == 128 + signal.SIGINT
    assert not (tmp_path / "notice.json").exists()


@pytest.mark.parametrize("status", [0, 3])
def test_the_guard_ends_as_its_child_does_and_an_old_notice_is_gone(tmp_path: Path, status: int) -> None:
    file = tmp_path / "notice.json"
    file.write_text('{"source": "kubernetes", "deadline": 1}')
    with guarding(file, f"ready(); raise SystemExit({status})") as guard:
        assert guard.wait(timeout=5) == status
    assert list(tmp_path.iterdir()) == []


def test_orphans_are_reaped_as_the_first_process_has_to(tmp_path: Path) -> None:
    leaves_an_orphan = (
        "import os, time; ready()\n"
        "if not (parent := os.fork()):\n"
        "    if orphan := os.fork(): print(orphan, flush=True); os._exit(0)\n"
        "time.sleep(60)"
    )
    with guarding(tmp_path / "notice.json", leaves_an_orphan, as_first=True) as guard:
        assert guard.stdout is not None
        orphan = psutil.Process(int(guard.stdout.readline()))
        wait_for(lambda: orphan.ppid() == guard.pid, timeout_s=5)
        orphan.kill()
        wait_for(lambda: not psutil.pid_exists(orphan.pid), timeout_s=5)


@pytest.mark.parametrize(
    ("command", "grace_s", "status", "said"),
    [
        ([], "30", 2, "usage: python -m forge.elastic.preemption.pod_init COMMAND..."),
        (["no-such-command"], "30", 127, "no-such-command could not be guarded"),
        (["true"], "soon", 2, "FORGE_GRACE_S is a number of seconds, not 'soon'"),
    ],
)
def test_a_guard_that_cannot_begin_says_why(
    tmp_path: Path, command: list[str], grace_s: str, status: int, said: str
) -> None:
    guard = start_guard(tmp_path / "notice.json", command, grace_s=grace_s)
    _, errors = guard.communicate(timeout=10)
    assert guard.returncode == status
    assert said in errors


# How they are asked


@asynccontextmanager
async def watching(environment: Mapping[str, str], **options: Any) -> AsyncIterator[asyncio.Queue[Notice]]:
    """What `watch` hears meanwhile."""
    heard: asyncio.Queue[Notice] = asyncio.Queue()
    task = asyncio.create_task(watch(environment, heard.put_nowait, **options))
    try:
        yield heard
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(what: Callable[[], bool]) -> None:
    """Let the loop run until it is so."""
    async with asyncio.timeout(5):
        while not what():
            await asyncio.sleep(0.005)


def ask_once(service: Service, *, times: int = 1, pace: PollInterval | None = None) -> list[Notice]:
    """What each watcher of a cloud answers in turn, the last time."""
    chosen = watchers(service.environment, pace=pace or PollInterval())

    async def ask() -> list[Notice]:
        for _ in range(times):
            answers = [await watcher.ask() for watcher in chosen]
        return [notice for answer in answers for notice in answer.values()]

    return asyncio.run(ask())


@contextmanager
def guarding(
    file: Path, script: str, *, grace_s: str = "", as_first: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A guard whose child runs; in `script`, `ready` is to be called first."""
    ready = "ready = lambda: print(flush=True)\n"
    guard = start_guard(file, [sys.executable, "-c", ready + script], grace_s=grace_s, as_first=as_first)
    family = []
    try:
        assert guard.stdout is not None
        guard.stdout.readline()
        family = psutil.Process(guard.pid).children(recursive=True)
        yield guard
    finally:
        guard.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        guard.communicate(timeout=10)


def start_guard(file: Path, command: list[str], *, grace_s: str, as_first: bool = False) -> subprocess.Popen[str]:
    guarded = [sys.executable, "-m", "forge.elastic.preemption.pod_init", *command]
    if as_first:
        # As to process 1, the kernel gives it the orphans below it: PR_SET_CHILD_SUBREAPER, which exec keeps.
        take_orphans = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])"
        guarded = [sys.executable, "-c", take_orphans, *guarded]
    return subprocess.Popen(
        guarded,
        env=os.environ | {"FORGE_NOTICE_FILE": str(file), "FORGE_GRACE_S": grace_s},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

"""Preemption notices are reported within a second, once each, and after any failure of the service."""

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

from forge.elastic.preemption.metadata_client import fetch
from forge.elastic.preemption.notice import Notice, PollInterval
from forge.elastic.preemption.watch import watch, watchers
from forge.errors import ClusterError
from tests.support.clouds import Aws, Azure, Gcp, Redirect, Service, iso
from tests.support.command import wait_for

CLOUDS = [Aws, Gcp, Azure]
QUICK = PollInterval(pause_s=0.02, timeout_s=0.3)
NOON = 1_800_000_000.0
AT_NOON = PollInterval(clock=lambda: NOON)


# Which clouds are polled


@pytest.mark.parametrize("environment", [{}, {"FORGE_CLOUD": ""}, {"FORGE_CLOUD": " , "}])
def test_watchers__no_cloud_named__nothing_is_polled(environment: dict[str, str]) -> None:
    with Aws() as aws:
        around = {name: value for name, value in aws.environment.items() if name != "FORGE_CLOUD"}
        assert watchers(around | environment) == []
        asyncio.run(asyncio.wait_for(watch(around | environment, print), 1))
        assert aws.questions == []


def test_watchers__several_clouds_named() -> None:
    assert [watcher.source for watcher in watchers({"FORGE_CLOUD": "Kubernetes, azure"})] == ["kubernetes", "azure"]


def test_watchers__unknown_cloud__error_lists_the_known_ones() -> None:
    with pytest.raises(ClusterError, match=r"'awss'.*aws, gcp, azure, kubernetes"):
        watchers({"FORGE_CLOUD": "awss"})


def test_fetch__proxy_in_environment__is_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Azure() as azure:
        azure.announce()
        assert len(ask_once(azure)) == 1


@pytest.mark.parametrize("status", [301, 302, 307])
def test_fetch__redirect__not_followed(status: int) -> None:
    with Azure() as azure, Redirect(f"http://127.0.0.1:{azure.port}/metadata/x", status=status) as redirect:
        url = f"http://127.0.0.1:{redirect.port}/"
        response = asyncio.run(fetch(url, headers={"Metadata": "true"}, timeout_s=3))
        assert response.status == status
        with pytest.raises(OSError, match=f"status {status}"):
            response.require_status(200)
        assert azure.questions == []


def test_fetch__body_too_long__error() -> None:
    with Azure(machine="x" * (2**20 + 1)) as azure:
        (watcher,) = watchers(azure.environment)
        with pytest.raises(OSError, match="more than 1048576 bytes"):
            asyncio.run(watcher.poll())


# Time and number of reports


@pytest.mark.parametrize("cloud", CLOUDS)
def test_watch__notice__reported_within_a_second(cloud: type[Service]) -> None:
    async def scenario() -> None:
        with cloud() as service:
            async with watching(service.environment) as notices:
                await until(lambda: len(service.questions) >= 2)
                assert notices.empty()
                service.announce()
                notice = await asyncio.wait_for(notices.get(), 1.0)
        assert notice.source == service.environment["FORGE_CLOUD"]
        assert notice.is_certain
        assert notice.deadline == pytest.approx(time.time() + (120 if cloud is Aws else 30), abs=3)

    asyncio.run(scenario())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_watch__notice_stays_in_force__reported_once(cloud: type[Service]) -> None:
    async def scenario() -> None:
        with cloud() as service:
            service.announce()
            async with watching(service.environment, interval=QUICK) as notices:
                await asyncio.wait_for(notices.get(), 1.0)
                num_questions = len(service.questions)
                await until(lambda: len(service.questions) >= num_questions + 5)
                assert notices.empty()

    asyncio.run(scenario())


# Failures of the services


@pytest.mark.parametrize("fault", ["error", "silence"])
@pytest.mark.parametrize("cloud", CLOUDS)
def test_watch__service_fails_and_recovers__notice_is_reported(cloud: type[Service], fault: str) -> None:
    async def scenario() -> None:
        with cloud() as service:
            async with watching(service.environment, interval=QUICK) as notices:
                await until(lambda: len(service.questions) >= 3)
                service.fault = fault
                await until(lambda: service.num_failed >= 2)
                service.fault = ""
                service.announce()
                assert (await asyncio.wait_for(notices.get(), 3.0)).is_certain

    asyncio.run(scenario())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_watch__service_restarts__notice_is_reported(
    cloud: type[Service], caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        with cloud() as service:
            async with watching(service.environment, interval=QUICK) as notices:
                await until(lambda: len(service.questions) >= 3)
                await asyncio.to_thread(service.stop)
                await until(lambda: "is repeated" in caplog.text)
                service.start()
                service.announce()
                assert (await asyncio.wait_for(notices.get(), 3.0)).is_certain

    asyncio.run(scenario())


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


def test_watch__cancelled_during_long_poll__returns_at_once() -> None:
    async def scenario() -> float:
        with Gcp(longest_hold_s=10) as gcp:
            async with watching(gcp.environment):
                await until(lambda: gcp.num_held == 2)
                began = time.monotonic()
            return time.monotonic() - began

    assert asyncio.run(scenario()) < 0.5


def test_watch__on_notice_raises__notice_is_reported_again() -> None:
    async def scenario() -> None:
        notices: list[Notice] = []

        def take(notice: Notice) -> None:
            notices.append(notice)
            if len(notices) == 1:
                raise RuntimeError("not now")

        with Aws() as aws:
            aws.announce()
            task = asyncio.create_task(watch(aws.environment, take, interval=QUICK))
            await until(lambda: len(notices) == 2)
            task.cancel()
        assert [(notice.source, notice.is_certain) for notice in notices] == 2 * [("aws", True)]

    asyncio.run(scenario())


# AWS


def test_aws__token_is_reused() -> None:
    with Aws() as aws:
        ask_once(aws, times=3)
        assert (aws.num_refused, aws.num_tokens) == (0, 1)


def test_aws__token_rejected__renewed_within_the_same_poll() -> None:
    with Aws() as aws:
        interruption, _ = watchers(aws.environment)

        async def ask() -> Mapping[str, Notice]:
            await interruption.poll()
            aws.tokens.clear()
            aws.announce()
            return await interruption.poll()

        assert len(asyncio.run(ask())) == 1
        assert aws.num_refused == 1


def test_aws__token_about_to_expire__renewed() -> None:
    now = NOON
    with Aws() as aws:
        interruption, _ = watchers(aws.environment, interval=PollInterval(clock=lambda: now))

        async def ask() -> None:
            nonlocal now
            await interruption.poll()
            now += 21_600 - 30
            await interruption.poll()

        asyncio.run(ask())
        assert (aws.num_refused, aws.num_tokens) == (0, 2)


def test_aws__rebalance_recommendation__uncertain_and_without_deadline() -> None:
    with Aws(rebalance={"noticeTime": iso(NOON)}) as aws:
        assert ask_once(aws) == [Notice(source="aws", deadline=None, is_certain=False)]


@pytest.mark.parametrize("cloud", [Aws, Azure])
@pytest.mark.parametrize("minutes", [-60, 0, 60])
def test_deadline__service_clock_differs__converted_to_local_clock(cloud: type[Service], minutes: int) -> None:
    with cloud(clock=lambda: NOON + 60 * minutes) as service:
        service.announce()
        (notice,) = ask_once(service, interval=AT_NOON)
        left_s = 120 if cloud is Aws else 30
        # The service's Date header has whole seconds: the deadline may be up to a second early, which is safe.
        assert notice.deadline == NOON + left_s - 1


# GCP


def test_gcp__long_poll__answered_by_the_change() -> None:
    async def scenario() -> None:
        with Gcp(longest_hold_s=10) as gcp:
            async with watching(gcp.environment) as notices:
                await until(lambda: gcp.num_held == 2)
                # Two requests that returned the current values of the keys; the next two are held open.
                assert len(gcp.questions) == 2
                gcp.announce()
                await asyncio.wait_for(notices.get(), 0.3)

    asyncio.run(scenario())


def test_gcp__change_between_two_polls__reported() -> None:
    with Gcp() as gcp:
        preemption, _ = watchers(gcp.environment)

        async def ask() -> Mapping[str, Notice]:
            await preemption.poll()
            gcp.announce()
            return await asyncio.wait_for(preemption.poll(), 0.5)

        assert len(asyncio.run(ask())) == 1


@pytest.mark.parametrize(
    ("value", "deadlines"),
    [("NONE", []), ("MIGRATE_ON_HOST_MAINTENANCE", []), ("TERMINATE_ON_HOST_MAINTENANCE", [NOON + 60])],
)
def test_gcp__maintenance__reported_only_if_it_terminates_the_machine(value: str, deadlines: list[float]) -> None:
    with Gcp() as gcp:
        gcp.change("maintenance-event", value)
        assert [notice.deadline for notice in ask_once(gcp, interval=AT_NOON)] == deadlines


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
def test_azure__event__reported_only_if_it_ends_this_machine(event: Any, deadlines: list[float]) -> None:
    with Azure(clock=AT_NOON.clock) as azure:
        azure.schedule(**event)
        assert [notice.deadline for notice in ask_once(azure, interval=AT_NOON)] == deadlines


# Kubernetes


def test_pod_init__sigterm__notice_within_a_second_and_child_keeps_running(tmp_path: Path) -> None:
    file = tmp_path / "notices" / "notice.json"

    async def scenario() -> Notice:
        with running(file, "import time; ready(); time.sleep(60)", grace_s="30") as init:
            (child,) = psutil.Process(init.pid).children()
            async with watching({"FORGE_CLOUD": "kubernetes", "FORGE_NOTICE_FILE": str(file)}) as notices:
                init.send_signal(signal.SIGTERM)
                notice = await asyncio.wait_for(notices.get(), 1.0)
            assert child.is_running()
        return notice

    notice = asyncio.run(scenario())
    assert (notice.source, notice.is_certain) == ("kubernetes", True)
    assert notice.deadline == pytest.approx(time.time() + 30, abs=3)


def test_pod_init__grace_period_nearly_over__sigterm_forwarded(tmp_path: Path) -> None:
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); ready(); time.sleep(60)"
    with running(tmp_path / "notice.json", script, grace_s="3.5") as init:
        began = time.monotonic()
        init.send_signal(signal.SIGTERM)
        assert init.wait(timeout=5) == 7
        assert 0.5 <= time.monotonic() - began < 1.5


def test_pod_init__second_sigterm__forwarded_at_once(tmp_path: Path) -> None:
    file = tmp_path / "notice.json"
    with running(file, "import time; ready(); time.sleep(60)", grace_s="30") as init:
        init.send_signal(signal.SIGTERM)
        wait_for(file.exists, timeout_s=5)
        init.send_signal(signal.SIGTERM)
        assert init.wait(timeout=5) == 128 + signal.SIGTERM


def test_pod_init__sigint__forwarded_at_once(tmp_path: Path) -> None:
    script = "import signal, time; signal.signal(2, signal.SIG_DFL); ready(); time.sleep(60)"
    with running(tmp_path / "notice.json", script) as init:
        init.send_signal(signal.SIGINT)
        assert init.wait(timeout=5) == 128 + signal.SIGINT
    assert not (tmp_path / "notice.json").exists()


@pytest.mark.parametrize("status", [0, 3])
def test_pod_init__child_ends__same_status_and_old_notice_removed(tmp_path: Path, status: int) -> None:
    file = tmp_path / "notice.json"
    file.write_text('{"source": "kubernetes", "deadline": 1}')
    with running(file, f"ready(); raise SystemExit({status})") as init:
        assert init.wait(timeout=5) == status
    assert list(tmp_path.iterdir()) == []


def test_pod_init__orphan_ends__is_reaped(tmp_path: Path) -> None:
    script = (
        "import os, time; ready()\n"
        "if not (parent := os.fork()):\n"
        "    if orphan := os.fork(): print(orphan, flush=True); os._exit(0)\n"
        "time.sleep(60)"
    )
    with running(tmp_path / "notice.json", script, as_subreaper=True) as init:
        assert init.stdout is not None
        orphan = psutil.Process(int(init.stdout.readline()))
        wait_for(lambda: orphan.ppid() == init.pid, timeout_s=5)
        orphan.kill()
        wait_for(lambda: not psutil.pid_exists(orphan.pid), timeout_s=5)


@pytest.mark.parametrize(
    ("command", "grace_s", "status", "message"),
    [
        ([], "30", 2, "usage: python -m forge.elastic.preemption.pod_init COMMAND..."),
        (["no-such-command"], "30", 127, "cannot run no-such-command"),
        (["true"], "soon", 2, "FORGE_GRACE_S must be a number of seconds, not 'soon'"),
    ],
)
def test_pod_init__cannot_start__message_and_status(
    tmp_path: Path, command: list[str], grace_s: str, status: int, message: str
) -> None:
    init = start_pod_init(tmp_path / "notice.json", command, grace_s=grace_s)
    _, errors = init.communicate(timeout=10)
    assert init.returncode == status
    assert message in errors


# Helpers


@asynccontextmanager
async def watching(environment: Mapping[str, str], **options: Any) -> AsyncIterator[asyncio.Queue[Notice]]:
    """Run `watch` in the background; its notices go into the queue."""
    notices: asyncio.Queue[Notice] = asyncio.Queue()
    task = asyncio.create_task(watch(environment, notices.put_nowait, **options))
    try:
        yield notices
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def ask_once(service: Service, *, times: int = 1, interval: PollInterval | None = None) -> list[Notice]:
    """Poll each watcher of a cloud `times` times; the notices of the last time."""
    chosen = watchers(service.environment, interval=interval or PollInterval())

    async def ask() -> list[Notice]:
        for _ in range(times):
            answers = [await watcher.poll() for watcher in chosen]
        return [notice for answer in answers for notice in answer.values()]

    return asyncio.run(ask())


@contextmanager
def running(
    file: Path, script: str, *, grace_s: str = "", as_subreaper: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """Run pod_init with a Python child, whose `script` calls `ready()` first."""
    ready = "ready = lambda: print(flush=True)\n"
    init = start_pod_init(file, [sys.executable, "-c", ready + script], grace_s=grace_s, as_subreaper=as_subreaper)
    family = []
    try:
        assert init.stdout is not None
        init.stdout.readline()
        family = psutil.Process(init.pid).children(recursive=True)
        yield init
    finally:
        init.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        init.communicate(timeout=10)


def start_pod_init(
    file: Path, command: list[str], *, grace_s: str, as_subreaper: bool = False
) -> subprocess.Popen[str]:
    command_line = [sys.executable, "-m", "forge.elastic.preemption.pod_init", *command]
    if as_subreaper:
        # PR_SET_CHILD_SUBREAPER, kept across exec: orphans are reparented to it as to process 1.
        script = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1); os.execv(sys.argv[1], sys.argv[1:])"
        command_line = [sys.executable, "-c", script, *command_line]
    return subprocess.Popen(
        command_line,
        env=os.environ | {"FORGE_NOTICE_FILE": str(file), "FORGE_GRACE_S": grace_s},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

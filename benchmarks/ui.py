"""Measure the pages of `forge ui` over a folder of many runs, in headless Chromium.

    python -m benchmarks.ui --json OUT [--runs 1000]

Every run has 200 steps and 60 events; one of them is running and writes a step each second. Measured: the time from
the request to the first contentful paint and until the list can be used, right after the server was started and
later; the CPU time of the server while the list is open and while no page is; and the bytes a second that an open
list and an open run are sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from forge.events import CostUpdated, RunFinished
from tests.support.browser import CHROMIUM, Browser, in_browser
from tests.support.runs import History, metrics

_STEPS = 200
_PAINTED = """addEventListener('DOMContentLoaded', () => requestAnimationFrame(() => setTimeout(() => {
    window.painted = performance.now();
})));"""
_FIRST = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime || 0"


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="for which CPU time and bytes are measured")
    options = parse_options(parser, smallest={"runs": 5, "seconds": 2.0})
    if CHROMIUM is None:
        print("Chromium is not installed: apt-get install chromium")
        return
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "runs"
        write_runs(root, num_runs=options.runs)
        with _running(root / "running"), _server(root) as (url, process):
            found = asyncio.run(_measure(url, process, options=options, folder=Path(name)))
    shown = [
        (key, value.text(",.2f") if isinstance(value, Measured) else f"{value:,.2f}")
        for key, value in found.items()
    ]
    print_table(f"forge ui, {options.runs:,} runs", header=("", "median [range]"), rows=shown)
    figures = {key: value.median if isinstance(value, Measured) else value for key, value in found.items()}
    write_json(options.json, figures={"runs": options.runs, **figures})


def write_runs(root: Path, *, num_runs: int) -> None:
    """Write so many finished runs, and one that has begun."""
    history = History(began=time.time() - 86_400)
    history.start()
    history.form(5.0)
    for step in range(1, _STEPS + 1):
        history.step(step, 1.0, evaluation_s=1.0 if step % 10 == 0 else 0.0)
        if step % 10 == 0:
            history.record(CostUpdated(usd=step / 100, usd_per_hour=1.0))
            history.saved(step, seconds=1.0, stall_s=0.1)
    first = history.write(root, "running")
    history.record(RunFinished(step=_STEPS))
    history.write(root, "run-0001")
    day_before = time.time() - 86_400
    for folder in (first, root / "run-0001"):
        os.utime(folder / "plan.json", (day_before, day_before))
    for number in range(2, num_runs):
        shutil.copytree(root / "run-0001", root / f"run-{number:04d}")


@contextlib.contextmanager
def _running(folder: Path) -> Iterator[None]:
    """Own a run as its driver does, and write a step each second."""
    is_over = threading.Event()

    def write() -> None:
        step = _STEPS
        while not is_over.wait(1.0):
            step += 1
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics(step).as_record() | {"time": time.time()}) + "\n")

    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()


@contextlib.contextmanager
def _server(root: Path) -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, "-P", "-m", "forge.cli.app", "ui", str(root), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+", line)))
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


async def _measure(url: str, process: psutil.Process, *, options: Any, folder: Path) -> dict[str, Measured | float]:
    found: dict[str, Measured | float] = {}

    async def use(browser: Browser) -> None:
        found["first_paint_after_start_s"] = (await open_list(browser, url))[0]
        await browser.wait(f"document.getElementById('count').textContent == '{options.runs:,} runs'")
        times = [await open_list(browser, url) for _ in range(options.repeats)]
        found["first_paint_s"] = Measured(values=tuple(first for first, _ in times))
        found["usable_s"] = Measured(values=tuple(last for _, last in times))
        await asyncio.sleep(2)
        found["cpu_with_list_open"] = await _cpu_share(process, seconds=options.seconds)
        key = await browser.value(
            "[...document.querySelectorAll('#runs a')].find(a => a.textContent == 'running').href"
        )
        await browser.call("Page.navigate", url="about:blank")
        await asyncio.sleep(2)
        found["cpu_without_a_page"] = await _cpu_share(process, seconds=options.seconds)
        version = re.search(r'data-version="(\d+)"', await _text(url))
        assert version is not None
        found["list_bytes_per_s"] = await _bytes_per_s(f"{url}/events?since={version[1]}", seconds=options.seconds)
        found["run_bytes_per_s"] = await _bytes_per_s(f"{key}/events", seconds=options.seconds)

    await asyncio.to_thread(asyncio.run, in_browser(folder, "about:blank", use))
    return found


async def open_list(browser: Browser, url: str) -> tuple[float, float]:
    """Load the list without a cache. Returns: seconds until the first paint, and until the list can be used."""
    await browser.call("Network.enable")
    await browser.call("Network.clearBrowserCache")
    added = await browser.call("Page.addScriptToEvaluateOnNewDocument", source=_PAINTED)
    await browser.call("Page.navigate", url="about:blank")
    await browser.call("Page.navigate", url=url)
    await browser.wait(f"window.painted && {_FIRST}")
    await browser.call("Page.removeScriptToEvaluateOnNewDocument", **added)
    first, last = await browser.value(_FIRST), await browser.value("window.painted")
    return float(first) / 1000, float(last) / 1000


async def _cpu_share(process: psutil.Process, *, seconds: float) -> float:
    """CPU seconds per second of the server."""
    before = process.cpu_times()
    await asyncio.sleep(seconds)
    after = process.cpu_times()
    return float(after.user + after.system - before.user - before.system) / seconds


async def _text(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


async def _bytes_per_s(url: str, *, seconds: float) -> float:
    """Bytes a second of a stream after its first message."""
    num_bytes, began = 0, 0.0
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + 3.0):
                async for part in answer.content.iter_any():
                    if not began:
                        began = time.monotonic() + 2.0
                    elif time.monotonic() >= began:
                        num_bytes += len(part)
    return num_bytes / (time.monotonic() - began)


if __name__ == "__main__":
    main()

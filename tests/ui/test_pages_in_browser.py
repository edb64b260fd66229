"""The pages of `forge ui` in headless Chromium (slow): first paint, filter, live changes, stop, looks, keyboard."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ui import open_list, write_runs
from forge.events import CostUpdated, RunFinished, event_to_record
from tests.report.test_pages_in_browser import ATTACK, BACKGROUNDS, INSIDE, LOOKS, TABLES_INSIDE
from tests.report.test_run_report import eventful
from tests.support.browser import CHROMIUM, Browser, in_browser
from tests.support.runs import make_run, metrics
from tests.support.searches import lifelike, search_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
TOKEN = "a-token-of-more-than-20-characters"
EVIL_NAME = "<img src=x onerror=alert(1)> odd? #name%2F"
COUNT = "document.getElementById('count')?.textContent"
SHOWN = "[...document.querySelectorAll('#runs tbody a')].map(a => a.textContent).join()"
VIOLATIONS = "addEventListener('securitypolicyviolation', e => (window.refused ||= []).push(e.effectiveDirective));"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A hostile run, a search, a broken folder and a link that leads out."""
    root = tmp_path / "runs"
    history = eventful(text=ATTACK)
    history.record(RunFinished(step=40))
    folder = history.write(root, EVIL_NAME)
    (folder / "logs" / "rank-0.log").write_text(f"first\n{ATTACK}\n\x1b[31mred\n")
    lifelike().write(root, search_plan())
    (root / "broken").mkdir()
    (root / "broken" / "plan.json").write_text("{")
    (root / "link").symlink_to(make_run(tmp_path / "elsewhere"))
    return root


@pytest.fixture
def live(root: Path) -> Iterator[Path]:
    """A run whose driver is this process."""
    folder = make_run(root, "live", steps=3)
    with (folder / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        yield folder


async def go_to(browser: Browser, name: str) -> None:
    found = f"[...document.querySelectorAll('#runs a')].find(a => a.textContent == {json.dumps(name)})"
    await browser.wait(f"!!{found}")
    await browser.value(f"{found}.click()")
    await browser.wait("document.body?.dataset.page == 'run' && document.readyState == 'complete'")


def test_list__of_1000_runs__is_painted_within_a_second(tmp_path: Path, serve: Callable[..., str]) -> None:
    write_runs(tmp_path / "runs", num_runs=1000)
    url = serve(tmp_path / "runs")

    async def use(browser: Browser) -> None:
        times = [await open_list(browser, url) for _ in range(5)]
        assert statistics.median(first for first, _ in times) <= 1.0, times
        assert await browser.value(COUNT) == "1,000 runs"
        assert await browser.value("document.querySelectorAll('#runs tbody tr').length") == 100
        await browser.value("document.getElementById('more').scrollIntoView()")
        await browser.wait("document.querySelectorAll('#runs tbody tr').length > 100")
        await browser.value("document.getElementById('text').focus()")
        await browser.type("0777")
        await browser.wait(f"{SHOWN} == 'run-0777'")

    asyncio.run(in_browser(tmp_path, "about:blank", use))


def test_list__filtered_and_changed__shows_what_matches(
    root: Path, live: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    async def use(browser: Browser) -> None:
        await browser.wait(f"{COUNT} == '5 runs'")
        await browser.value("document.getElementById('text').focus()")
        await browser.type("SEARCH")
        await browser.wait(f"{COUNT} == '1 of 5 runs' && {SHOWN}.startsWith('tune')")
        assert await browser.value("location.search") == "?q=SEARCH"
        await browser.call("Page.reload")
        await browser.wait(f"document.readyState == 'complete' && {COUNT} == '1 of 5 runs'")
        await browser.value("text.value = ''; text.dispatchEvent(new Event('input'))")
        await browser.value("document.getElementById('status').value = 'running'")
        await browser.value("document.getElementById('status').dispatchEvent(new Event('change'))")
        await browser.wait(f"{COUNT} == '1 of 5 runs' && {SHOWN} == 'live'")
        make_run(root, "new")
        await browser.wait(f"{COUNT} == '1 of 6 runs' && {SHOWN} == 'live'")
        with (live / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics(4, loss=0.1234).as_record() | {"time": time.time()}) + "\n")
        await browser.wait("document.querySelector('#runs tbody .c1').textContent == '0.1234'")
        shutil.rmtree(root / "new")
        await browser.wait(f"{COUNT} == '1 of 5 runs'")

    asyncio.run(in_browser(tmp_path, serve(root), use))


def test_list__sorted_by_keyboard__keeps_its_order_while_runs_change(
    root: Path, live: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    """Screenshots are kept in `$FORGE_SCREENSHOTS`, to be looked at."""
    kept = Path(os.environ.get("FORGE_SCREENSHOTS", tmp_path))
    names = "[...document.querySelectorAll('#runs tbody a')].map(a => a.textContent.slice(0, 4)).join()"
    marked = "[...document.querySelectorAll('[aria-sort]')].map(h => h.dataset.sort + ' ' + h.ariaSort).join()"
    focused = "document.activeElement.textContent"

    async def use(browser: Browser) -> None:
        await browser.wait(f"{COUNT} == '5 runs'")
        assert await browser.value(marked) == "updated descending"
        assert (await browser.value(names)).startswith("live,")  # a running one is first
        await browser.value("document.getElementById('status').focus()")
        while await browser.value(focused) != "USD":
            await browser.press("Tab", code=9)
        await browser.press("Enter", code=13, text="\r")
        await browser.wait(f"{names}.startsWith('tune,<img,')")  # the largest first, unknown ones last
        assert await browser.value(marked) == "USD descending"
        assert await browser.value("location.search") == "?sort=-USD"
        await browser.press(" ", code=32, text=" ")
        await browser.wait(f"{names}.startsWith('<img,tune,')")
        assert await browser.value(marked) == "USD ascending"
        with (live / "events.jsonl").open("a") as file:
            cost = event_to_record(CostUpdated(usd=1.5, usd_per_hour=3.0))
            file.write(json.dumps({"time": time.time()} | cost) + "\n")
        await browser.wait(f"{names}.startsWith('<img,live,tune,')")
        assert await browser.value(focused) == "USD"
        for look in ("light", "dark", "phone"):
            await _look(browser, look, kept=kept, file="ui-sorted")
        await browser.value("sort.value = 'run'; sort.dispatchEvent(new Event('change'))")
        await browser.wait(f"{names} == '<img,brok,link,live,tune'")
        assert await browser.value("document.querySelector('#sort').offsetParent !== null")
        await browser.call("Page.navigate", url=f"{await browser.value('location.origin')}/?sort=-progress&q=e")
        await browser.wait(f"document.readyState == 'complete' && {marked} == 'progress descending'")
        assert await browser.value(names) == "<img,tune,live,brok"
        assert await browser.value("document.getElementById('sort').value") == "progress"

    asyncio.run(in_browser(tmp_path, serve(root), use))


def test_run__while_it_runs__page_follows(
    root: Path, live: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    (live / "logs" / "rank-0.log").write_text("first line\n")

    async def use(browser: Browser) -> None:
        await go_to(browser, "live")
        await browser.wait("document.querySelector('#loss')?.data?.[0].x.length == 3")
        await browser.value("log.value = 'rank-0'; log.dispatchEvent(new Event('change'))")
        await browser.wait("document.getElementById('tail').textContent == 'first line\\n'")
        drawn = await browser.value("window.before = document.getElementById('loss').data[0]; 1")
        assert drawn == 1
        with (live / "logs" / "rank-0.log").open("a") as file:
            file.write("<b>second</b>\n")
        with (live / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics(4, loss=0.25).as_record() | {"time": time.time()}) + "\n")
        await browser.wait("document.getElementById('loss').data[0].y.at(-1) == 0.25")
        await browser.wait("document.getElementById('tail').textContent == 'first line\\n<b>second</b>\\n'")
        assert await browser.value("document.getElementById('loss').data[0].x.join()") == "1,2,3,4"
        await browser.wait("document.getElementById('tiles').innerText.includes('4 of 6')")
        with (live / "events.jsonl").open("a") as file:
            record = event_to_record(CostUpdated(usd=12.5, usd_per_hour=1.0))
            file.write(json.dumps({"time": time.time()} | record) + "\n")
        await browser.wait("document.getElementById('cost').innerText.includes('12.50 USD')")
        shutil.move(live, tmp_path / "gone")
        await browser.wait("document.getElementById('problem').innerText.includes('no longer there')")

    asyncio.run(in_browser(tmp_path, serve(root), use))


def test_run__stop__asks_and_then_stops(
    waiting_run: tuple[Path, subprocess.Popen[bytes]], tmp_path: Path, serve: Callable[..., str]
) -> None:
    folder, process = waiting_run

    async def use(browser: Browser) -> None:
        await go_to(browser, folder.name)
        await browser.wait("document.getElementById('status').textContent == 'running'")
        await browser.value("document.getElementById('stop').focus()")
        await browser.press("Enter", code=13, text="\r")
        await browser.wait("document.getElementById('ask').open")
        assert await browser.value("document.activeElement.textContent") == "Keep it running"
        await browser.press("Escape", code=27)
        await browser.wait("!document.getElementById('ask').open")
        await asyncio.sleep(1)
        assert process.poll() is None
        await browser.value("document.getElementById('stop').click()")
        await browser.value("document.querySelector('#ask .danger').click()")
        await browser.wait("document.getElementById('problem').innerText.includes('stops after its current step')")
        await browser.wait("document.getElementById('status').textContent == 'stopped'")
        assert await browser.value("document.getElementById('stop').hidden")

    asyncio.run(in_browser(tmp_path, serve(folder.parent), use))
    assert process.wait(timeout=10) == 0


def test_login__by_the_link__opens_the_list(root: Path, tmp_path: Path, serve: Callable[..., str]) -> None:
    url = serve(root, token=TOKEN)

    async def use(browser: Browser) -> None:
        await browser.wait("location.pathname == '/login' && document.activeElement?.id == 'token'")
        await browser.type("wrong")
        await browser.press("Enter", code=13, text="\r")
        await browser.wait("document.body?.innerText.includes('not the token')")
        await browser.call("Page.navigate", url=f"{url}/login#{TOKEN}")
        await browser.wait("document.body?.dataset.page == 'list'")
        assert TOKEN not in await browser.value("document.cookie + location.href")

    asyncio.run(in_browser(tmp_path, url, use))


@pytest.mark.parametrize("name", ["", EVIL_NAME, "tune-tiny-0101-000000-abcd", "live"])
def test_page__in_every_look__fits_is_named_and_executes_nothing(
    name: str, root: Path, live: Path, tmp_path: Path, serve: Callable[..., str]
) -> None:
    """Screenshots are kept in `$FORGE_SCREENSHOTS`, to be looked at."""
    kept = Path(os.environ.get("FORGE_SCREENSHOTS", tmp_path))
    url = serve(root)

    async def use(browser: Browser) -> None:
        await browser.call("Page.addScriptToEvaluateOnNewDocument", source=VIOLATIONS)
        await browser.call("Page.navigate", url=url)
        if name:
            await go_to(browser, name)
            await browser.wait(
                "document.querySelectorAll('.chart').length == 4 "
                "&& [...document.querySelectorAll('.chart:not([hidden])')].every(c => c.querySelector('.main-svg'))"
            )
        else:
            await browser.wait(f"{COUNT} == '5 runs'")
        if name == EVIL_NAME:
            await browser.value("log.value = 'rank-0'; log.dispatchEvent(new Event('change'))")
            await browser.wait("document.getElementById('tail').textContent.includes('red')")
        assert "owned" not in await browser.value("document.title")
        assert await browser.value("document.querySelectorAll('img, evil').length") == 0
        # plotly.js has the styles of maps in it, which these figures do not use.
        assert set(await browser.value("window.refused || []")) <= {"style-src-elem"}
        loaded = await browser.value("performance.getEntriesByType('resource').map(one => one.name)")
        assert [one for one in loaded if not one.startswith((url, "data:"))] == []
        for look in ("light", "dark", "phone"):
            await _look(browser, look, kept=kept, file=f"ui-{name[:4].strip('<') or 'list'}")
        await _require_names(browser)

    asyncio.run(in_browser(tmp_path, "about:blank", use))


async def _look(browser: Browser, look: str, *, kept: Path, file: str) -> None:
    wanted: dict[str, Any] = LOOKS[look]
    await browser.call(
        "Emulation.setDeviceMetricsOverride", width=wanted["width"], height=900, deviceScaleFactor=1,
        mobile=look == "phone",
    )  # fmt: skip
    scheme = {"name": "prefers-color-scheme", "value": wanted["scheme"]}
    await browser.call("Emulation.setEmulatedMedia", media="screen", features=[scheme])
    await asyncio.sleep(0.7)
    shot = await browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
    (kept / f"{file}-{look}.png").write_bytes(base64.b64decode(shot["data"]))
    assert await browser.value("document.documentElement.scrollWidth") <= wanted["width"], look
    assert await browser.value(TABLES_INSIDE), look
    assert await browser.value(INSIDE.replace(".chart", ".chart:not([hidden])", 1)), look
    assert await browser.value("getComputedStyle(document.body).backgroundColor") == f"rgb({BACKGROUNDS[look]})"


async def _require_names(browser: Browser) -> None:
    """Everything that is used by keyboard has a name for screen readers, and can be reached."""
    tree = (await browser.call("Accessibility.getFullAXTree"))["nodes"]
    for node in tree:
        if node["role"]["value"] in ("textbox", "searchbox", "combobox", "button", "link", "log", "image", "table"):
            is_known = node.get("name", {}).get("value") or node["role"]["value"] == "table" or node["ignored"]
            assert is_known, node
    wanted = "a[href], button:not([hidden]), input, select, .lines:not([hidden])"
    hidden = (
        f"[...document.querySelectorAll('{wanted}')].filter(one => one.offsetParent && one.tabIndex < 0).length"
    )
    assert await browser.value(hidden) == 0

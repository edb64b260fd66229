"""The pages of a run, a search and a comparison in headless Chromium (slow): light, dark, on a phone, in print."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from forge.report.html_report import write_report
from forge.report.run_compare import compare_runs, write_comparison
from forge.report.run_report import write_run_report
from forge.runs.reader import read_run
from tests.report.test_run_report import EVIL, eventful
from tests.support.browser import CHROMIUM, Browser, in_browser
from tests.support.searches import lifelike, search_plan

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]
ATTACK = f"{EVIL}<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
LOOKS: dict[str, dict[str, Any]] = {
    "light": {"width": 1200, "scheme": "light", "media": "screen"},
    "dark": {"width": 1200, "scheme": "dark", "media": "screen"},
    "phone": {"width": 390, "scheme": "light", "media": "screen"},
    "wider": {"width": 1200, "scheme": "light", "media": "screen"},
    "print": {"width": 718, "scheme": "dark", "media": "print"},
}
"""718 pixels are the width of A4 between Chromium's margins."""
BACKGROUNDS = {
    "light": "244, 246, 249",
    "dark": "17, 21, 27",
    "phone": "244, 246, 249",
    "wider": "244, 246, 249",
    "print": "255, 255, 255",
}
INSIDE = """[...document.querySelectorAll('.chart')].every(chart => {
    const drawn = chart.querySelector('.main-svg').getBoundingClientRect(), card = chart.parentElement;
    const outer = card.getBoundingClientRect();
    return drawn.height >= 150 && drawn.left >= outer.left && drawn.right <= outer.right
        && drawn.bottom <= outer.bottom;
})"""
"""Whether every figure is drawn in its card."""
LEGENDS_ABOVE = """[...document.querySelectorAll('.chart')].every(chart => {
    const legend = chart.querySelector('g.legend'), plot = chart.querySelector('.nsewdrag');
    const isAbove = legend && specs[chart.id].layout.legend?.orientation == 'h';
    return !isAbove || legend.getBoundingClientRect().bottom <= plot.getBoundingClientRect().top + 1;
})"""
"""Whether every legend over a plot is above it, also after the page has become wider."""
TABLES_INSIDE = """[...document.querySelectorAll('.wide')].every(table => {
    const inner = table.getBoundingClientRect(), outer = table.parentElement.getBoundingClientRect();
    return inner.left >= outer.left && inner.right <= outer.right && inner.bottom <= outer.bottom;
})"""
"""Whether every table, which scrolls by itself, ends at the edge of its card."""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each kind, of folders whose every text attacks the page."""
    root = tmp_path_factory.mktemp("runs")
    runs = [eventful(text=ATTACK).write(root, name) for name in ("one", "<img src=x onerror=alert(1)>")]
    search = lifelike().write(root, search_plan())
    write_comparison(compare_runs([read_run(run) for run in runs]), path=root / "compare.html")
    return {"run": write_run_report(runs[1]), "search": write_report(search), "compare": root / "compare.html"}


@pytest.mark.parametrize("kind", ["run", "search", "compare"])
def test_page__in_every_look__draws_fits_and_executes_nothing(
    kind: str, pages: dict[str, Path], tmp_path: Path
) -> None:
    """Screenshots are kept in `$FORGE_SCREENSHOTS`, to be looked at."""
    kept = Path(os.environ.get("FORGE_SCREENSHOTS", tmp_path))

    async def use(browser: Browser) -> None:
        await browser.wait("document.readyState == 'complete' && document.querySelector('.chart .main-svg')")
        assert await browser.value("document.title") != "owned"
        assert await browser.value("document.querySelectorAll('img').length") == 0
        drawn = "[...document.querySelectorAll('.chart')].every(one => one.querySelector('.main-svg'))"
        assert await browser.value(drawn)
        loaded = json.loads(await browser.value("JSON.stringify(performance.getEntriesByType('resource'))"))
        assert [one["name"] for one in loaded if not one["name"].startswith("data:")] == []
        for name, look in LOOKS.items():
            await browser.call(
                "Emulation.setDeviceMetricsOverride", width=look["width"], height=900, deviceScaleFactor=1,
                mobile=name == "phone",
            )  # fmt: skip
            scheme = {"name": "prefers-color-scheme", "value": look["scheme"]}
            await browser.call("Emulation.setEmulatedMedia", media=look["media"], features=[scheme])
            if name == "print":
                await browser.value("dispatchEvent(new Event('beforeprint'))")
            await asyncio.sleep(0.5)
            assert await browser.value(INSIDE), name
            assert await browser.value(LEGENDS_ABOVE), name
            assert await browser.value(TABLES_INSIDE), name
            shot = await browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            (kept / f"{kind}-{name}.png").write_bytes(base64.b64decode(shot["data"]))
            assert await browser.value("document.documentElement.scrollWidth") <= look["width"], name
            color = await browser.value("getComputedStyle(document.body).backgroundColor")
            assert color == f"rgb({BACKGROUNDS[name]})"

    asyncio.run(in_browser(tmp_path, pages[kind].as_uri(), use))

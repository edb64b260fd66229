"""The page at `/`: what it loads, and how it is used by keyboard in headless Chromium (slow)."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from forge.serve.http.api_keys import KeyLimits, KeyRing, new_key, table_of
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.browser import CHROMIUM, Browser, in_browser
from tests.support.serving import LocalBackend, RunningServer, running, write_causal_lm

FILES = ("", "page/index.html", "page/page.css", "page/page.js")


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    folder = write_causal_lm(tmp_path_factory.mktemp("model"))
    settings = ServerSettings(name="test", source=str(folder), model_name="tiny <b>", verify_start=False)
    service = ModelService.start(settings)
    yield LocalBackend(service)
    service.close()


@pytest.fixture
def server(backend: LocalBackend) -> Iterator[RunningServer]:
    with running(backend) as server:
        yield server


def test_page__its_files__come_from_this_server_and_load_nothing_else(server: RunningServer) -> None:
    for name in FILES:
        response = httpx.get(f"{server.url}/{name}", trust_env=False)
        assert response.status_code == 200
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"https?://|@import|//cdn", response.text)
        assert not re.search(r"<script>|\son\w+=|innerHTML|eval\(", response.text), "text is never markup"
    for name in ("page/../service.py", "page/%2e%2e/service.py", "page/page.py", "page/"):
        assert httpx.get(f"{server.url}/{name}", trust_env=False).status_code == 404


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page__by_keyboard__chats_and_is_named_for_screen_readers(server: RunningServer, tmp_path: Path) -> None:
    async def use(browser: Browser) -> None:
        await browser.wait("document.title.startsWith('tiny <b>')")
        assert await browser.value("document.activeElement?.id") == "input"
        await browser.type("hello <img src=x>")
        await browser.press("Enter", modifiers=2, code=13)
        await browser.wait(
            "document.querySelectorAll('.turn').length == 2 && !document.getElementById('send').disabled"
        )
        assert await browser.value("document.querySelectorAll('.turn span')[0].textContent") == "hello <img src=x>"
        assert await browser.value("document.querySelectorAll('#answers img').length") == 0
        assert await browser.value("document.querySelectorAll('.turn span')[1].textContent.length > 0")
        assert await browser.value("document.getElementById('problem').textContent") == ""
        tree = (await browser.call("Accessibility.getFullAXTree"))["nodes"]
        named = {
            (node["role"]["value"], node["name"]["value"]) for node in tree if node.get("name", {}).get("value")
        }
        assert {("textbox", "Your message"), ("button", "Send"), ("log", "Answers")} <= named
        for node in tree:
            if node["role"]["value"] in ("textbox", "spinbutton", "button", "log"):
                assert node["name"]["value"], node
        shot = await browser.call("Page.captureScreenshot", format="png")
        (tmp_path / "page.png").write_bytes(base64.b64decode(shot["data"]))
        assert (tmp_path / "page.png").stat().st_size > 5000

    asyncio.run(in_browser(tmp_path, server.url, use))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page__server_with_keys__asks_for_one(backend: LocalBackend, tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys.toml"
    file.write_text(table_of("page", key=key))

    async def use(browser: Browser) -> None:
        await browser.wait("document.activeElement?.id == 'key'")
        await browser.type(key)
        await browser.press("Enter", code=13)
        await browser.value("document.getElementById('access').requestSubmit()")
        await browser.wait("document.activeElement?.id == 'input'")
        assert await browser.value("document.getElementById('access').hidden") is True

    with running(backend, keys=KeyRing((), file=file, limits=KeyLimits())) as server:
        asyncio.run(in_browser(tmp_path, server.url, use))

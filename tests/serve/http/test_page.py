"""The page at `/`: what it loads, and how it is used by keyboard in headless Chromium (slow)."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from forge.serve.http.api_keys import KeyLimits, KeyRing, new_key, table_of
from forge.serve.http.settings import ServerSettings
from forge.serve.service import ModelService
from tests.support.serving import LocalBackend, RunningServer, running, write_causal_lm

CHROMIUM = shutil.which("chromium")
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


class Browser:
    """A page in headless Chromium, driven by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            answer = json.loads((await self._socket.receive(timeout=30)).data)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    async def value(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def wait(self, script: str) -> None:
        deadline = time.monotonic() + 30
        while not await self.value(script):
            assert time.monotonic() < deadline, (script, await self.value("document.body.innerText"))
            await asyncio.sleep(0.05)

    async def type(self, text: str) -> None:
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, *, modifiers: int = 0, code: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers,
                windowsVirtualKeyCode=code,
            )  # fmt: skip


async def in_browser(folder: Path, url: str, use: Any) -> None:
    """Open a page in Chromium and use it."""
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        "--no-first-run",
    ]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder / 'profile'}", "--no-proxy-server", "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        port = next(found[1] for line in process.stderr if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
        async with aiohttp.ClientSession() as session:
            pages = await (await session.get(f"http://127.0.0.1:{port}/json/list")).json(content_type=None)
            where = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            async with session.ws_connect(where, max_msg_size=0) as socket:
                browser = Browser(socket)
                await browser.call("Page.enable")
                await browser.call("Page.navigate", url=url)
                await use(browser)
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_page__by_keyboard__chats_and_is_named_for_screen_readers(server: RunningServer, tmp_path: Path) -> None:
    async def use(browser: Browser) -> None:
        await browser.wait("document.title.startsWith('tiny <b>')")
        assert await browser.value("document.activeElement.id") == "input"
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
        await browser.wait("document.activeElement.id == 'key'")
        await browser.type(key)
        await browser.press("Enter", code=13)
        await browser.value("document.getElementById('access').requestSubmit()")
        await browser.wait("document.activeElement.id == 'input'")
        assert await browser.value("document.getElementById('access').hidden") is True

    with running(backend, keys=KeyRing((), file=file, limits=KeyLimits())) as server:
        asyncio.run(in_browser(tmp_path, server.url, use))

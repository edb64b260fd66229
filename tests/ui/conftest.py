"""A run that waits to be stopped, and a server of `forge ui` on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from forge.serve.http.settings import listen_on
from forge.ui.access import token_access
from forge.ui.app import build_app
from forge.ui.run_list import RunList
from tests.support.runs import make_run


@pytest.fixture
def waiting_run(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A run whose driver waits to be stopped."""
    folder = make_run(tmp_path, "waits")
    script = tmp_path / "script.json"
    script.write_text(json.dumps({"events": [], "until_stopped": True}))
    command = [sys.executable, "-P", "-m", "tests.support.scripted_driver", str(folder)]
    environment = {**os.environ, "FORGE_TEST_SCRIPT": str(script), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    while not (folder / ".lock").exists() or not (folder / ".lock").read_text():
        assert process.poll() is None
    yield folder, process
    process.kill()
    process.wait()


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Start a server of a folder in a thread. Returns: its address."""
    with contextlib.ExitStack() as stack:
        yield lambda root, **options: stack.enter_context(_served(root, **options))


@contextlib.contextmanager
def _served(root: Path, *, token: str | None = None) -> Iterator[str]:
    with listen_on("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        runs = RunList(root)
        runs.refresh(whole=True)
        app: Any = build_app(runs, access=token_access("127.0.0.1", port, token=token))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join()

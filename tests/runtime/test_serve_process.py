"""The process of a server: other weights, without Ray; with it they are tested in tests/serve/http."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from forge.errors import RunError
from forge.runtime import serve_replica
from forge.runtime.serve_process import ModelServer
from forge.runtime.servers import ServerStatus, update_server
from forge.serve.calls import ServedModel
from forge.serve.http.settings import ServerSettings
from tests.support.serving import info_of


@dataclass
class Backend:
    """An application that was deployed."""

    app: str
    info: ServedModel
    is_closed: bool = False

    async def wait_idle(self, *, timeout_s: float) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Deployed:
    """What was deployed and removed."""

    settings: list[ServerSettings] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    kind: str = "causal-lm"


@pytest.fixture
def deployed(monkeypatch: pytest.MonkeyPatch) -> Deployed:
    found = Deployed()

    def deploy(settings: ServerSettings, *, app: str, folder: Path) -> Backend:
        found.settings.append(settings)
        if settings.source == "broken":
            raise RunError("it cannot be loaded")
        return Backend(app, info_of(kind=found.kind, digest="b" * 64))

    monkeypatch.setattr(serve_replica, "deploy", deploy)
    monkeypatch.setattr(serve_replica, "remove", found.removed.append)
    return found


@pytest.fixture
def server(tmp_path: Path) -> Any:
    server: Any = ModelServer(tmp_path, address="somewhere")
    server._settings = ServerSettings(name="s", source="first", model_name="m", adapters=("one=a",))
    server._backend, server._serving = Backend("s-1", info_of()), SimpleNamespace()
    return server


def update(server: Any, **request: Any) -> dict[str, Any]:
    asyncio.run(server._update_to({"id": "1", "step": None, "ema": False, **request}))
    found: dict[str, Any] = server._update
    return found


def test_update__names_stay_and_so_do_adapters_unless_others_are_given(server: Any, deployed: Deployed) -> None:
    assert update(server, source="/runs/second")["message"].startswith("second (bbbbbbbbbbbbbbbb) serves as 'm', ")
    update(server, source="third", adapters=["two=b"])
    assert [each.adapters for each in deployed.settings] == [("one=a",), ("two=b",)]
    assert {each.model_name for each in deployed.settings} == {"m"} and deployed.removed == ["s-1", "s-2"]


def test_update__model_of_another_kind__is_refused_and_removed(server: Any, deployed: Deployed) -> None:
    deployed.kind = "classification"
    found = update(server, source="/runs/labels")
    assert found["state"] == "failed" and "labels is a classification model" in found["message"]
    assert deployed.removed == ["s-2"] and server._backend.app == "s-1"


def test_end_after_a_failed_update__removes_what_is_served(
    server: Any, deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert update(server, source="broken")["message"] == "it cannot be loaded"
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    server._disconnect()
    assert deployed.removed == ["s-1"]


def test_update__another_one_comes_in_between__says_so(tmp_path: Path) -> None:
    updates = iter([None, None, {"id": "of another client", "state": "running"}])

    def look(name: str | None) -> ServerStatus:
        record = {"state": "ready", "update": next(updates)}
        return ServerStatus(name="s", folder=tmp_path, is_alive=True, record=record)

    with pytest.raises(RunError, match="another update took the place"):
        update_server("s", {"source": "x"}, on_message=print, look=look)

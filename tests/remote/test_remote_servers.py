"""`forge serve --cluster` on a cluster that shares no files with this machine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ArgumentError
from forge.process import free_port
from forge.remote.servers import (
    find_any_server,
    follow_server,
    list_any_servers,
    remote_server,
    server_lines,
    start_any_server,
    stop_servers_of,
    update_any_server,
)
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.runtime.servers import await_ready, server_folder
from forge.serve.http.api_keys import add_key, new_key
from forge.serve.http.settings import ServerSettings
from tests.support.command import wait_for
from tests.support.remote_client import Elsewhere
from tests.support.serving import write_causal_lm

pytestmark = pytest.mark.timeout(900)


def test_list_any_servers__cluster_is_gone__stopped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    folder = server_folder("chat")
    folder.mkdir(parents=True)
    write_remote_ref(folder, RemoteRef(cluster="lab", folder="/x/chat", job="a", events=0, steps=0))
    [found] = list_any_servers()
    assert (found.state, found.record["cluster"]) == ("stopped", "lab")
    assert "'lab' is not a cluster that was started from here" in found.message
    assert "does not run (stopped)" in CliRunner().invoke(app, ["serve", "stop", "chat"]).output


def settings_of(model: Path, **changes: Any) -> ServerSettings:
    fields: dict[str, Any] = {"name": "far", "source": str(model), "model_name": "tiny"}
    return ServerSettings(**fields | {"port": free_port("127.0.0.1")} | changes)


@pytest.mark.slow
def test_server__started_on_a_cluster__is_watched_updated_and_stopped_from_here(
    cluster: Elsewhere, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    model, other = write_causal_lm(tmp_path / "tiny"), write_causal_lm(tmp_path / "other", seed=1)
    key, messages = new_key(), list[str]()
    add_key(tmp_path / "keys.toml", name="alice", key=key)
    settings = settings_of(model, keys_file=str(tmp_path / "keys.toml"))
    start_any_server(settings, cluster="elsewhere", on_message=messages.append)
    assert any("sending tiny" in text for text in messages)
    ready = await_ready("far", on_message=print, look=find_any_server)
    assert ready.record["cluster"] == "elsewhere"
    assert ready.record["source"].startswith(str(there / ".forge" / "models"))
    assert (there / "state" / "servers" / "far" / "keys_file.txt").stat().st_mode & 0o777 == 0o600
    body = {"model": "tiny", "prompt": "the quick", "max_tokens": 4, "temperature": 0}
    asked = {"json": body, "headers": {"Authorization": f"Bearer {key}"}, "trust_env": False, "timeout": 60}
    server = remote_server("far")
    assert server is not None
    with server.forward(settings.port, local=0) as port:
        url = f"http://127.0.0.1:{port}/v1/completions"
        assert httpx.post(url, json=body, trust_env=False).status_code == 401
        before = httpx.post(url, **asked).json()
        changes = {"source": str(other), "step": None, "ema": False}
        update_any_server(find_any_server("far"), changes, on_message=print)
        after = httpx.post(url, **asked).json()
    assert before["system_fingerprint"] != after["system_fingerprint"]
    assert "updated: " in server_lines(find_any_server("far"), name="server", lines=50)
    with pytest.raises(ArgumentError, match="a server 'far' runs on 'elsewhere'"):
        start_any_server(settings, cluster=None, on_message=print)
    log = follow_server(find_any_server("far"))
    server.request_stop()
    assert "running requests are finished" in "".join(log)
    server.wait()
    assert find_any_server("far").state == "stopped"


@pytest.mark.slow
def test_cluster_down__with_a_server__stops_it_first(cluster: Elsewhere, there: Path, tmp_path: Path) -> None:
    start_any_server(settings_of(write_causal_lm(tmp_path / "tiny")), cluster="elsewhere", on_message=print)
    pid = await_ready("far", on_message=print, look=find_any_server).record["pid"]
    messages: list[str] = []
    stop_servers_of(cluster, on_message=messages.append)
    assert messages == ["stopping the server 'far'"]
    assert find_any_server("far").state == "stopped"
    wait_for(lambda: not psutil.pid_exists(pid))


@pytest.mark.slow
def test_server__wrong_model__the_reason_arrives_here(cluster: Elsewhere, tmp_path: Path) -> None:
    model = write_causal_lm(tmp_path / "tiny")
    (model / "model.safetensors").write_bytes(b"x" * 100)
    start_any_server(settings_of(model), cluster="elsewhere", on_message=print)
    with pytest.raises(Exception, match="no replica of the model became ready"):
        await_ready("far", on_message=print, look=find_any_server)


@pytest.mark.slow
def test_server__killed__died(cluster: Elsewhere, tmp_path: Path) -> None:
    start_any_server(settings_of(write_causal_lm(tmp_path / "tiny")), cluster="elsewhere", on_message=print)
    pid = await_ready("far", on_message=print, look=find_any_server).record["pid"]
    os.kill(pid, signal.SIGKILL)
    found = wait_for(lambda: (seen := find_any_server("far")).state == "died" and seen)
    assert found.state == "died"

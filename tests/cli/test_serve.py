"""`forge serve` before a server is started: what is refused, keys, and the state of servers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ArgumentError, ClusterError
from forge.fs import state_home
from forge.remote import servers as remote_servers
from forge.runtime import servers as runtime_servers
from forge.runtime.servers import find_server, list_servers, server_folder
from forge.serve.http.api_keys import KeyLimits, KeyRing
from tests.support.runs import make_run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("FORGE_SERVE_API_KEYS", raising=False)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def forge(*words: str) -> Any:
    return CliRunner().invoke(app, ["serve", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "no API key is set"),
        (["--tokens-per-minute", "-1"], "must be a positive number"),
        (["--tls-cert", "a.pem"], "belong together"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "a.pem cannot be read"),
        (["--replicas", "many"], "--replicas"),
        (["--adapter", "alone"], "NAME=RUN"),
        (["--name", "../other"], "not a server's name"),
    ],
)
def test_serve__wrong_options__refused_before_anything_starts(state: Path, words: list[str], message: str) -> None:
    result = forge(str(state / "model"), *words)
    assert isinstance(result.exception, ArgumentError)
    assert message in str(result.exception)
    assert not (state_home() / "servers").exists()


def test_serve__no_such_run__says_so(state: Path) -> None:
    result = forge("missing", "--runs", str(state))
    assert isinstance(result.exception, ArgumentError)
    assert str(result.exception).startswith("no run 'missing' under")
    assert str(result.exception).endswith("there is no folder of this name either")
    assert str(forge("stpo").exception).endswith("did you mean forge serve stop?")
    (state / "empty").mkdir()
    assert "empty has no config.json, so it holds no model; no run" in str(forge(str(state / "empty")).exception)


def test_serve__run_without_a_checkpoint__refused_before_anything_starts(state: Path) -> None:
    run = make_run(state / "runs", "mine-0101-000000-abcd")
    result = forge(str(run))
    assert isinstance(result.exception, ArgumentError)
    assert "mine-0101-000000-abcd has no checkpoint in" in str(result.exception)
    assert not (state_home() / "servers").exists()


def test_serve_key__to_a_file__prints_the_key_once(state: Path) -> None:
    result = forge("key", "alice", "--to", str(state / "keys.toml"))
    key = result.stdout.strip().splitlines()[-1]
    ring = KeyRing((), file=state / "keys.toml", limits=KeyLimits())
    assert ring.find(f"Bearer {key}") is not None
    assert isinstance(forge("key", "a b").exception, ArgumentError)


def test_serve_status__servers_that_ended__are_shown(state: Path) -> None:
    for name, content in (("one", json.dumps({"state": "stopped", "message": "done"})), ("two", "[" * 9000)):
        folder = server_folder(name)
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(content)
    assert [server.state for server in list_servers()] == ["stopped", "died"]
    records = json.loads(forge("status", "-o", "json").stdout)
    assert [record["name"] for record in records] == ["one", "two"]
    with pytest.raises(ArgumentError, match="known: one, two"):
        find_server("three")
    assert "does not run" in forge("stop", "one").output


def test_serve_status__killed_server__says_so_without_the_load_of_its_last_second(state: Path) -> None:
    record: dict[str, Any] = {"state": "ready", "message": "16 served log-probabilities", "url": "http://h"}
    record |= {"model": "m", "replicas": 2, "running": 777, "waiting": 3, "tokens_per_s": 5.5}
    folder = server_folder("one")
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps(record))
    shown = forge("status", "one").stdout
    assert "died" in shown and "its process was killed" in shown and "log-probabilities" not in shown
    assert "running" not in shown and "speed" not in shown
    (folder.parent / "two").mkdir()
    table = forge("status").stdout
    assert "777" not in table and "5.5" not in table and "died" in table


def test_serve__ctrl_c_before_it_is_ready__says_that_it_stops(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote_servers, "start_any_server", lambda *_, **__: None)
    monkeypatch.setattr(runtime_servers, "await_ready", interrupted)
    done = forge(str(state / "model"))
    assert done.exit_code == 130
    assert "stopping the server, which is not ready yet" in done.stderr


def test_serve__server_that_failed_or_runs_here__is_named_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = server_folder("one")
    folder.mkdir(parents=True)
    (folder / "status.json").write_text(
        json.dumps({"state": "failed", "message": "no room", "error": "ClusterError"})
    )
    alive = iter([4711, 4711, None])
    monkeypatch.setattr(runtime_servers, "driver_pid", lambda _: next(alive, None))
    with pytest.raises(ClusterError, match="no room; the log is"):
        runtime_servers.await_ready("one", on_message=print)
    assert next(alive, "used up") == "used up"
    assert "the server 'one' does not run (failed)" in str(forge("connect", "one").exception)
    monkeypatch.setattr(runtime_servers, "driver_pid", lambda _: 4711)
    (folder / "status.json").write_text(json.dumps({"state": "ready", "url": "http://127.0.0.1:8000"}))
    assert "http://127.0.0.1:8000/v1 needs no connection" in str(forge("connect", "one").exception)
    monkeypatch.setattr(runtime_servers, "driver_pid", lambda _: None)
    (folder.parent / "two").mkdir()
    assert "no server runs, and several have ended; name one: one, two" in str(forge("stop").exception)

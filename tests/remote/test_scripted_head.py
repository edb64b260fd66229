"""Maps and servers on the head of a cluster, from the client's side: real commands there, drivers without Ray."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import ClusterStatus
from forge.errors import ArgumentError
from forge.fs import state_home
from forge.plan.plan import plan_to_json
from forge.process import free_port
from forge.remote.mirror import ask
from forge.remote.models import PlacedModel, place_model
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
from forge.remote.shard_task import RemoteMap
from forge.remote.submit import RemoteTarget
from forge.runs.remote_ref import RemoteRef, write_remote_ref
from forge.runtime.servers import await_ready
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_map import MapTotals, StoppedError
from forge.runtime.shard_process import ShardProcess
from forge.runtime.shard_worker import ShardWorkerSpec
from forge.serve.http.settings import ServerSettings
from tests.support.command import wait_for
from tests.support.jobs import tiny_plan
from tests.support.scripted_head import ScriptedHead

SECRET = "planted-0123456789abcdef"


class Recorded(ShardProcess):
    """A process of a test, with what it said."""

    def __init__(self) -> None:
        super().__init__(None)
        self.lines: list[dict[str, Any]] = []

    def _write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def says(self, text: str) -> bool:
        return any(text in line.get("message", "") for line in self.lines)


@pytest.fixture
def there(tmp_path: Path) -> Path:
    (tmp_path / "there").mkdir()
    return tmp_path / "there"


@pytest.fixture
def target(there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteTarget:
    head = ScriptedHead(there)
    target = RemoteTarget(cluster=head, python=sys.executable, gpu=None, storage="s3://bucket")
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    for module in ("shard_task", "servers", "mirror"):
        monkeypatch.setattr(f"forge.remote.{module}.job_client", head.jobs)
    for finder in ("find_cluster", "find_known"):
        monkeypatch.setattr(f"forge.remote.servers.{finder}", lambda name: head)
    monkeypatch.setattr("forge.remote.servers.preflight", lambda cluster: target)
    return target


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


def compute(
    target: RemoteTarget, files: ShardFiles, *, count: int, stop: threading.Event, process: Recorded
) -> MapTotals:
    files.prepare()
    environment = {"AWS_SECRET_ACCESS_KEY": SECRET}
    far = RemoteMap(target, PlacedModel(cluster=target.cluster, folder="/models/tiny", environment=environment))
    spec = ShardWorkerSpec(function="a:B", config={})
    return far(
        [[number] for number in range(count)], spec=spec, files=files, num_workers=None, stop=stop, process=process
    )


@pytest.mark.slow
def test_map__remote__results_arrive_and_nothing_is_left(target: RemoteTarget, there: Path, tmp_path: Path) -> None:
    files, process = ShardFiles(folder=tmp_path / "results", digest="x"), Recorded()
    files.prepare()
    files.write(files.key([0]), [0])
    totals = compute(target, files, count=5, stop=threading.Event(), process=process)
    assert (totals.num_shards, totals.num_reused) == (5, 1)
    assert list(files.read_all([[number] for number in range(5)])) == [[number] for number in range(5)]
    assert process.lines[-1] == {"progress": [5, 5]} and process.says("sending 4 shards")
    assert process.says("key ***")  # it arrived, and is in no file
    assert not list((there / ".forge" / "maps").iterdir()) and not list((state_home() / "maps").iterdir())


def _set_after_progress(process: Recorded, stop: threading.Event) -> None:
    wait_for(lambda: any("progress" in line for line in process.lines))
    stop.set()


class Orphan(Recorded):
    """A process whose client has ended."""

    def has_client(self) -> bool:
        return False


@pytest.mark.slow
def test_map__client_ends_then_one_stops__the_driver_is_followed_then_stopped(
    target: RemoteTarget, tmp_path: Path
) -> None:
    files, stop = ShardFiles(folder=tmp_path / "results", digest="x"), threading.Event()
    stop.set()
    with pytest.raises(StoppedError, match="the cluster goes on"):
        compute(target, files, count=400, stop=stop, process=Orphan())
    second, stop = Recorded(), threading.Event()
    threading.Thread(target=_set_after_progress, args=(second, stop), daemon=True).start()
    with pytest.raises(StoppedError, match=r"shards? left"):
        compute(target, files, count=400, stop=stop, process=second)
    assert second.says("which was started on 'elsewhere' before") and not second.says("sending")
    assert 0 < sum(files.read(files.key([number])) is not None for number in range(400)) < 400
    assert not list((state_home() / "maps").iterdir())


@pytest.mark.slow
def test_server__on_a_cluster__is_watched_updated_and_stopped_from_here(
    target: RemoteTarget, there: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_SERVE_API_KEYS", SECRET)
    (tmp_path / "keys.toml").write_text("[alice]")
    messages: list[str] = []
    settings = ServerSettings(
        name="far", source=str(model), model_name="tiny", port=free_port("127.0.0.1"),
        keys_file=str(tmp_path / "keys.toml"),
    )  # fmt: skip
    start_any_server(settings, cluster="elsewhere", on_message=messages.append)
    ready = await_ready("far", on_message=print, look=find_any_server)
    assert any("sending tiny" in text for text in messages)
    assert ready.record["cluster"] == "elsewhere" and (tmp_path / "state" / "servers" / "far").is_dir()
    assert ready.record["source"].startswith(str(there / ".forge" / "models"))
    stored = there / "state" / "servers" / "far"
    assert (stored / "keys_file.txt").stat().st_mode & 0o777 == 0o600
    server = remote_server("far")
    assert server is not None
    with server.forward(settings.port, local=0) as port:
        answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).read()
    assert json.loads(answer) == [SECRET, "[alice]"]
    assert not any(SECRET.encode() in path.read_bytes() for path in there.rglob("*") if path.is_file())
    with pytest.raises(ArgumentError, match="a server 'far' runs on 'elsewhere'"):
        start_any_server(settings, cluster=None, on_message=print)
    (model / "model.safetensors").write_bytes(b"1" * 1000)
    changes = {"source": str(model), "step": None, "ema": False}
    updated = update_any_server(find_any_server("far"), changes, on_message=print)
    assert updated.endswith("/tiny serves") and updated != f"{ready.record['source']} serves"
    log = follow_server(find_any_server("far"))
    server.request_stop()
    assert "running requests are finished" in "".join(log)
    server.wait()
    assert find_any_server(None).state == "stopped"
    assert "running requests are finished" in server_lines(find_any_server("far"), name="server", lines=9)


@pytest.mark.slow
def test_cluster_down__with_servers__stops_them_first(
    target: RemoteTarget, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(name: str) -> int:
        settings = ServerSettings(name=name, source=str(model), model_name="m", port=free_port("127.0.0.1"))
        start_any_server(settings, cluster="elsewhere", on_message=print)
        return int(await_ready(name, on_message=print, look=find_any_server).record["pid"])

    start("one")
    os.kill(start("two"), signal.SIGKILL)
    wait_for(lambda: find_any_server("two").state == "died")
    messages: list[str] = []
    stop_servers_of(target.cluster, on_message=messages.append)
    assert messages == ["stopping the server 'one'"]
    assert {found.name: found.state for found in list_any_servers()} == {"one": "stopped", "two": "died"}


def test_place_model__two_machines_without_a_shared_folder__refused(target: RemoteTarget, model: Path) -> None:
    class Two(ScriptedHead):
        def status(self) -> ClusterStatus:
            return replace(super().status(), nodes=super().status().nodes * 2)

    with pytest.raises(ArgumentError, match="the 2 machines of 'elsewhere' share no folder"):
        place_model(replace(target, cluster=Two(Path("/nowhere"))), model)


def test_place_model__run_of_another_cluster__refused(target: RemoteTarget, tmp_path: Path) -> None:
    folder = tmp_path / "far"
    folder.mkdir()
    (folder / "plan.json").write_text(plan_to_json(tiny_plan(), is_file=True))
    write_remote_ref(folder, RemoteRef(cluster="lab", folder="/x/far", job="", events=0, steps=0))
    with pytest.raises(ArgumentError, match="are on the cluster 'lab'"):
        place_model(target, folder)


def test_place_model__folder_of_weights__sent_once_for_its_content(
    target: RemoteTarget, there: Path, model: Path
) -> None:
    messages: list[str] = []
    placed = [place_model(target, model, on_message=messages.append).folder for _ in range(2)]
    assert placed[0] == placed[1] and len(messages) == 1 and "sending tiny" in messages[0]
    copy = Path(placed[0])
    assert copy.is_relative_to(there / ".forge" / "models")
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in model.iterdir()
    }


def test_store__a_name_that_leads_out__refused(target: RemoteTarget, there: Path) -> None:
    with pytest.raises(ArgumentError, match="leads out of its folder"):
        ask(target.cluster, "store", "../outside")
    assert not (there / "outside").exists()

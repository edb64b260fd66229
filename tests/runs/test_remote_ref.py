"""`remote.json` is data: it names a known cluster, and nothing that it says is opened, run or given a token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.errors import ArgumentError, ForgeError
from forge.remote.mirror import find_run_handle
from forge.runs.reader import read_run
from forge.runs.remote_ref import REMOTE, RemoteRef, read_remote_ref, write_remote_ref
from tests.support.fuzz import watched
from tests.support.runs import make_run


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def _ref(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"cluster": "lab", "folder": f"/r/{folder.name}", "job": "j-1", "events": 0, "steps": 0} | changes


def test_read_remote_ref__as_written__round_trips(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    ref = RemoteRef(**_ref(folder))
    write_remote_ref(folder, ref)
    assert read_remote_ref(folder) == ref
    assert read_run(folder).status == "running"


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": "/abs/evil.yaml"}, {"cluster": "evil.yaml"}, {"cluster": "../../lab"}, {"cluster": ""},
        {"cluster": 3}, {"folder": "relative"}, {"folder": "/r/another-run"}, {"folder": "/r/../x"},
        {"job": "a b"}, {"job": "../x"}, {"job": None}, {"events": -1}, {"events": True}, {"steps": 1.5},
        {"python": "/tmp/evil"}, {"token": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_read_remote_ref__what_forge_does_not_write__is_no_reference(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = make_run(tmp_path)
    (folder / REMOTE).write_text(json.dumps(_ref(folder) | change))
    assert read_remote_ref(folder) is None
    assert read_run(folder).status == "died"


def test_find_run_handle__remote_json_names_a_cluster_file__starts_and_sends_nothing(tmp_path: Path) -> None:
    """The file claims the name of a cluster whose token this machine has."""
    from forge.cluster.base import ClusterRecord, make_token, write_record

    spec = {"name": "lab", "provider": "ssh", "machines": ["10.0.0.1"]}
    write_record(ClusterRecord(name="lab", provider="ssh", spec=spec))
    make_token("lab")
    folder = make_run(tmp_path)
    evil = folder / "evil.yaml"
    evil.write_text("name: lab\nprovider: ssh\nmachines: [attacker.example.com]\n")
    for cluster in (str(evil), "evil.yaml", f"../../../..{evil.with_suffix('')}"):
        (folder / REMOTE).write_text(json.dumps(_ref(folder, cluster=cluster)))
        with watched(folder):
            assert find_run_handle(folder) is None


def test_find_run_handle__unknown_cluster__is_said_and_forgotten(tmp_path: Path) -> None:
    folder = make_run(tmp_path)
    (folder / REMOTE).write_text(json.dumps(_ref(folder)))
    with pytest.raises(ArgumentError, match="'lab' is not a cluster that was started from here"):
        find_run_handle(folder)
    assert read_run(folder).status == "died"


def test_resume__remote_json_names_a_cluster_file__is_not_followed(tmp_path: Path) -> None:
    from forge.api import _target

    folder = make_run(tmp_path)
    (folder / "evil.yaml").write_text("name: x\nprovider: kubernetes\nnamespace: evil\nimage: i\n")
    (folder / REMOTE).write_text(json.dumps(_ref(folder, cluster=str(folder / "evil.yaml"))))
    with watched(folder):
        try:
            assert _target(None, folder) is None
        except ForgeError:
            pytest.fail("a reference that is not one was followed")

"""Find clusters by name or file, and what is saved of them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from forge.cluster.base import (
    ClusterRecord,
    cluster_lock,
    delete_state,
    list_records,
    make_token,
    read_record,
    read_token,
    state_folder,
    token_path,
    write_record,
)
from forge.cluster.local.provider import LocalCluster
from forge.cluster.registry import cluster_of, cluster_of_file, find_cluster, find_known
from forge.cluster.ssh.provider import SshCluster
from forge.config.cluster import SshSpec
from forge.errors import ArgumentError, ClusterError

SPEC = {"name": "lab", "provider": "ssh", "machines": ["10.0.0.1"], "user": "me"}


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def test_find_cluster__no_name_or_local__is_this_machines() -> None:
    assert isinstance(find_cluster(None), LocalCluster)
    assert isinstance(find_cluster("local"), LocalCluster)


def test_find_cluster__recorded_name__needs_no_file() -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    found = find_cluster("lab")
    assert isinstance(found, SshCluster) and found.name == "lab"


def test_find_cluster__file__is_read(tmp_path: Path) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in SPEC.items()))
    assert isinstance(find_cluster(str(path)), SshCluster)


@pytest.mark.parametrize("change", [{"machines": ["evil.example.com"]}, {"port": 2222}])
def test_find_cluster__file_of_another_machine_with_a_known_name__gets_no_token(
    tmp_path: Path, change: dict[str, object]
) -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    make_token("lab")
    path = tmp_path / "lab.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in (SPEC | change).items()))
    for find in (lambda: find_cluster(str(path)), lambda: cluster_of_file(path)):
        with pytest.raises(ArgumentError, match="another cluster than 'lab', which was started from here"):
            find()


def test_find_cluster__file_with_more_machines_behind_the_same_head__is_the_known_cluster(tmp_path: Path) -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    path = tmp_path / "lab.yaml"
    changed = SPEC | {"machines": ["10.0.0.1", "10.0.0.2"]}
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in changed.items()))
    assert isinstance(find_cluster(str(path)), SshCluster)


@pytest.mark.parametrize("name", ["../lab", "/tmp/lab", "lab.yaml", "", "LAB", "lab\n", "a" * 41])
def test_find_known__path_or_odd_name__is_no_cluster(tmp_path: Path, state: Path, name: str) -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    (state / "lab.json").write_text((state / "clusters" / "lab.json").read_text())
    assert read_record(name) is None
    with pytest.raises(ArgumentError, match="not a cluster that was started from here"):
        find_known(name)
    for path_of in (token_path, make_token, read_token, delete_state):
        with pytest.raises(ClusterError, match="is not a cluster's name"):
            path_of(name)


def test_find_cluster__unknown_name__lists_the_known() -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    with pytest.raises(ArgumentError, match=r"'x' is neither .* nor a file .*; known clusters: local, lab"):
        find_cluster("x")


def test_cluster_of__name_local_on_another_provider__is_refused() -> None:
    spec = SshSpec.model_validate(SPEC | {"name": "local"}, strict=False)
    with pytest.raises(ArgumentError, match="name: local is reserved for the cluster on this machine"):
        cluster_of(spec)


def test_record__written__is_private_and_listed_without_local(state: Path) -> None:
    record = ClusterRecord(name="lab", provider="ssh", spec=SPEC, state={"job_port": 1})
    write_record(record)
    write_record(ClusterRecord(name="local", provider="local", spec={}))
    assert read_record("lab") == record and list_records() == [record]
    assert stat.S_IMODE((state / "clusters" / "lab.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(state_folder("clusters").stat().st_mode) == 0o700
    make_token("lab")
    delete_state("lab")
    assert read_record("lab") is None and not token_path("lab").exists()


def test_read_record__no_state_folder__creates_none(state: Path) -> None:
    assert read_record("lab") is None
    assert not state.exists()


def test_token__empty_or_missing__says_what_to_do() -> None:
    with pytest.raises(ClusterError, match="only the machine that started a cluster has its token"):
        read_token("lab")
    token_path("lab").touch()
    with pytest.raises(ClusterError, match="was empty and has been removed; start the cluster again"):
        make_token("lab")
    assert make_token("lab") == make_token("lab") == read_token("lab")
    assert stat.S_IMODE(token_path("lab").stat().st_mode) == 0o600


def test_cluster_lock__held__is_refused_for_that_cluster_only() -> None:
    refusal = pytest.raises(ClusterError, match="another forge process is starting or stopping the cluster 'lab'")
    with cluster_lock("lab"), cluster_lock("other"), refusal:
        cluster_lock("lab").__enter__()
    with cluster_lock("lab", wait=True):
        pass


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "", ".", "A", "a\n", "x" * 41, "x" * 5000, "a\0b"])
def test_state__name_that_leaves_the_folder__is_refused(name: str, state: Path) -> None:
    (state / "clusters").mkdir(parents=True)
    (state / "x.json").write_text(json.dumps({"name": "x", "provider": "ssh", "spec": SPEC}))
    assert read_record(name) is None
    with pytest.raises(ClusterError, match="is not a cluster's name"):
        token_path(name)
    with pytest.raises(ArgumentError, match="is neither a cluster"):
        find_cluster(name or "../x")


@pytest.mark.parametrize(
    "body", ["[]", "{}", "[" * 100_000, '{"name": "lab", "provider": "ssh", "spec": []}', '{"a": 1}']
)
def test_read_record__not_a_record__is_none(body: str, state: Path) -> None:
    (state / "clusters").mkdir(parents=True)
    (state / "clusters" / "lab.json").write_text(body)
    assert read_record("lab") is None and list_records() == []


def test_find_cluster__record_of_another_name_or_no_valid_file__is_refused() -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC | {"machines": ["-oProxyCommand=x"]}))
    with pytest.raises(ClusterError, match="the record of the cluster 'lab' cannot be used"):
        find_cluster("lab")
    write_record(ClusterRecord(name="lab", provider="nowhere", spec=SPEC))
    with pytest.raises(ClusterError, match="the record of the cluster 'lab' cannot be used"):
        find_cluster("lab")


@pytest.mark.parametrize(
    "other",
    [
        SPEC | {"machines": ["attacker.example.com", "10.0.0.1"]},
        SPEC | {"port": 2222},
        {"name": "lab", "provider": "kubernetes", "image": "x"},
        {"name": "lab", "provider": "aws"},
    ],
)
def test_find_cluster__file_with_another_head__never_borrows_the_token(
    other: dict[str, object], tmp_path: Path
) -> None:
    write_record(ClusterRecord(name="lab", provider="ssh", spec=SPEC))
    make_token("lab")
    path = tmp_path / "evil.yaml"
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in other.items()))
    with pytest.raises(ArgumentError, match="describes another cluster than 'lab'"):
        find_cluster(str(path))
    path.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in (SPEC | {"min_machines": 1}).items()))
    assert find_cluster(str(path)).name == "lab"


def test_cluster_of__paths_of_this_machine__mean_the_same_in_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path, absolute in (("key", tmp_path / "key"), ("~/k/key", tmp_path / "k/key"), ("/k", Path("/k"))):
        spec = SshSpec.model_validate(SPEC | {"identity_file": path, "wheels": path}, strict=False)
        shown = cluster_of(spec).to_yaml()
        assert f"identity_file: {absolute}\n" in shown and f"wheels: {absolute}\n" in shown

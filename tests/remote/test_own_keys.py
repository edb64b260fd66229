"""The user's own cloud keys, which may rent machines, are not sent to machines that have a role."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge.cluster.base import Cluster
from forge.cluster.registry import cluster_of
from forge.config.cluster import SECTIONS
from forge.config.load import LoadedJob
from forge.config.locations import SourceMap
from forge.errors import ArgumentError
from forge.remote.local_credentials import local_credentials_note
from forge.remote.submit import RemoteTarget, adapt_job, credentials_for
from tests.support.jobs import tiny_job

KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIA-of-the-user",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-user",
    "AWS_SESSION_TOKEN": "session-of-the-user",
    "AWS_SECURITY_TOKEN": "session-of-the-user",
    "GOOGLE_CREDENTIALS": "key-of-the-user",
    "GCS_TOKEN": "token-of-the-user",
    "AZURE_STORAGE_ACCOUNT_KEY": "account-key",
    "WANDB_API_KEY": "wandb-of-the-user",
    "HF_TOKEN": "hub-of-the-user",
}
PLAIN = {
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "GOOGLE_CLOUD_PROJECT": "mine",
}
UUID = "12345678-1234-1234-1234-123456789abc"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    for name, value in (KEYS | PLAIN).items():
        monkeypatch.setenv(name, value)


def cluster(provider: str, **keys: Any) -> Cluster:
    extra: dict[str, Any] = {
        "gcp": {"project": "my-project"},
        "azure": {"project": UUID},
        "ssh": {"machines": ["10.0.0.1"]},
        "kubernetes": {"image": "x"},
    }.get(provider, {})
    values = {"name": "big", "provider": provider, **extra, **keys}
    return cluster_of(SECTIONS[provider].model_validate(values, strict=False))


@pytest.mark.parametrize(
    ("provider", "kept"),
    [
        ("aws", {name for name in KEYS if name.startswith("AWS_")}),
        ("gcp", {"GOOGLE_CREDENTIALS", "GCS_TOKEN"}),
        ("azure", set()),
        ("ssh", set()),
        ("kubernetes", set()),
    ],
)
def test_credentials_for__machines_with_a_role__get_no_keys_of_that_cloud(provider: str, kept: set[str]) -> None:
    sent = credentials_for(cluster(provider))
    assert {*KEYS} - {*sent} == kept
    assert sent.items() >= PLAIN.items(), "regions and endpoints are no secrets"


def adapted(storage: str | None, to: str) -> str:
    """The checkpoint location of a job that is sent to a cluster on AWS."""
    one = cluster("aws", **({"storage": storage} if storage else {}))
    target = RemoteTarget(cluster=one, python="python", gpu=None, storage=storage or "")
    loaded = LoadedJob(job=tiny_job(checkpoint__to=to), source=SourceMap(path="job.yaml", locations={}))
    return adapt_job(target, loaded).job.checkpoint.to


@pytest.mark.parametrize(
    ("storage", "to"),
    [
        ("s3://bucket/runs", "s3://other/runs"),
        ("s3://bucket/runs", "s3://bucket/runs-2"),
        ("s3://bucket/runs", "s3://bucket"),
        (None, "s3://bucket/runs"),
        ("gs://bucket/runs", "s3://bucket/runs"),
    ],
)
def test_adapt_job__storage_that_the_role_does_not_reach__is_refused(storage: str | None, to: str) -> None:
    with pytest.raises(ArgumentError, match=r"set storage in its cluster file.*are not sent to machines that have"):
        adapted(storage, to)


@pytest.mark.parametrize(
    ("storage", "to", "found"),
    [
        ("s3://bucket/runs", "s3://bucket/runs/", "s3://bucket/runs/"),
        ("s3://bucket", "s3://bucket/mine", "s3://bucket/mine"),
        ("s3://bucket/runs", "runs", "s3://bucket/runs"),
        ("s3://bucket/runs", "gs://another/runs", "gs://another/runs"),
    ],
)
def test_adapt_job__storage_that_is_reached__is_kept(storage: str, to: str, found: str) -> None:
    assert adapted(storage, to) == found


FILES = {
    "AWS_PROFILE": "research",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/me/keys",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
    "AZURE_CONFIG_DIR": "/home/me/azure",
}


def test_credentials_for__names_of_profiles_and_files__go_to_clusters_of_this_machine_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in FILES.items():
        monkeypatch.setenv(name, value)
    assert credentials_for(cluster("local")).items() >= FILES.items()
    for provider in ("ssh", "kubernetes", "aws"):
        assert not credentials_for(cluster(provider)).keys() & FILES.keys()


@pytest.mark.parametrize(
    ("url", "named", "how"),
    [
        (
            "s3://bucket/runs",
            "AWS_PROFILE and AWS_SHARED_CREDENTIALS_FILE refer",
            "aws configure export-credentials",
        ),
        ("gs://bucket/runs", "GOOGLE_APPLICATION_CREDENTIALS refers", "copy the file to all machines"),
        ("abfs://place/runs", "AZURE_CONFIG_DIR refers", "AZURE_STORAGE_CONNECTION_STRING"),
    ],
)
def test_local_credentials_note__profile_or_file__names_it_and_how_to_send_keys(
    url: str, named: str, how: str
) -> None:
    note = local_credentials_note(cluster("ssh"), url=url, environment=FILES)
    assert note is not None
    assert note.startswith(named)
    assert f"the machines of 'big' reach {url} by a role or files of their own, or not at all" in note
    assert how in note


def test_local_credentials_note__default_file__is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_credentials_note(cluster("ssh"), url="s3://bucket/runs", environment={}) is None
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").touch()
    note = local_credentials_note(cluster("ssh"), url="s3://bucket/runs", environment={})
    assert note is not None and note.startswith("~/.aws/credentials refers to credentials in files of this machine")


@pytest.mark.parametrize(
    ("provider", "url", "environment"),
    [
        ("ssh", "s3://bucket/runs", FILES | {"AWS_ACCESS_KEY_ID": "sent"}),
        ("ssh", "/shared/runs", FILES),
        ("ssh", "memory://runs", FILES),
        ("aws", "s3://bucket/runs", FILES),  # its machines have a role
        ("local", "s3://bucket/runs", FILES),
    ],
)
def test_local_credentials_note__nothing_stays_behind__is_none(
    provider: str, url: str, environment: dict[str, str]
) -> None:
    assert local_credentials_note(cluster(provider), url=url, environment=environment) is None

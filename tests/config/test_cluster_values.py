"""Every identifier of a cluster file has the form that its cloud, ssh or Kubernetes gives it, and one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge.config.load import load_cluster
from forge.errors import JobFileError

UUID = "12345678-1234-1234-1234-123456789abc"
FILES: dict[str, dict[str, Any]] = {
    "aws": {"provider": "aws"},
    "gcp": {"provider": "gcp", "project": "my-project"},
    "azure": {"provider": "azure", "project": UUID},
    "ssh": {"provider": "ssh", "machines": ["10.0.0.1"]},
    "kubernetes": {"provider": "kubernetes", "image": "registry.example:5000/forge:1"},
    "local": {"provider": "local"},
}
SHELL = ["a$(id)", "a`id`", "a;id", "a|id", "a'b", 'a"b', "a b\tc", "a\nb", "-a", "a\u2028b", "{{ a }}"]
"""What must reach no shell, no command line and no second line."""


def error_of(tmp_path: Path, kind: str, **keys: Any) -> JobFileError:
    with pytest.raises(JobFileError) as caught:
        load(tmp_path, kind, **keys)
    return caught.value


def load(tmp_path: Path, kind: str, **keys: Any) -> Any:
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps({"name": "a", **FILES[kind], **keys}))
    return load_cluster(path)


@pytest.mark.parametrize("value", SHELL)
@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("aws", ["regions", "gpu", "instance_types", "head", "image", "user", "allow_from", "python", "project"]),
        ("gcp", ["project", "regions", "instance_types", "head", "image", "user", "python"]),
        ("azure", ["project", "resource_group", "regions", "instance_types", "head", "image", "user"]),
        ("ssh", ["machines", "user", "folder", "python", "clouds"]),
        ("kubernetes", ["namespace", "image", "gpu"]),
    ],
)
def test_identifier__shell_syntax_or_a_second_line__is_refused(
    tmp_path: Path, kind: str, keys: list[str], value: str
) -> None:
    for key in keys:
        assert error_of(tmp_path, kind, **{key: value}).key == key


@pytest.mark.parametrize(
    ("kind", "key"),
    [("aws", "storage"), ("ssh", "storage"), ("kubernetes", "context"), ("local", "storage")]
    + [(kind, key) for kind in ("aws", "ssh") for key in ("identity_file", "wheels")],
)
def test_text__line_break_or_control_character__is_refused(tmp_path: Path, kind: str, key: str) -> None:
    for value in ("a\nb", "a\u0085b", "a\u2029b", "a\tb"):
        error = error_of(tmp_path, kind, **{key: value})
        assert error.key == key


@pytest.mark.parametrize(
    ("kind", "keys", "problem"),
    [
        ("gcp", {"project": "my-project$(touch /tmp/PWNED)"}, "is not the project, which looks like my-project"),
        ("gcp", {"project": "short"}, "is not the project"),
        ("gcp", {"regions": ["us-central1"]}, "is not a zone of gcp, which looks like us-central1-a"),
        ("azure", {"project": "my-subscription"}, "is not a subscription"),
        ("azure", {"resource_group": "ends-with."}, "is not a resource group's name"),
        ("aws", {"regions": ["auto", "us-east-1"]}, "'auto' is not a region of aws"),
        ("aws", {"regions": []}, "must name at least one region"),
        ("aws", {"instance_types": ["m5.large", "m5.large"]}, "contains a name twice"),
        ("aws", {"instance_types": ["m5-a.large", "m5.a-large"]}, "contains a name twice"),
        ("aws", {"usd_per_hour": {"g5.xlarge\n": 1}}, "must be one line"),
        ("aws", {"usd_per_hour": {"*": 1}}, "is not a machine type of aws"),
        ("aws", {"usd_per_hour": {"g5.xlarge": -1}}, "must be greater than 0"),
        ("aws", {"usd_per_hour": {"g5.xlarge": 0}}, "must be greater than 0"),
        ("ssh", {"usd_per_hour": -1}, "must be at least 0"),
        ("aws", {"workers": "0..100000000000000000"}, "must be at most 10000 machines"),
        ("kubernetes", {"workers": "0..10001"}, "must be at most 10000 machines"),
        ("aws", {"startup_timeout": "9000000d"}, "must be at most 86400"),
        ("aws", {"disk": "9000000TB"}, "disk: "),
        ("aws", {"disk": 1}, "disk: "),
        ("aws", {"max_usd_per_hour": 1e300}, "must be at most 1e+06"),
        ("aws", {"idle_minutes": 1e300}, "must be at most 10000"),
        ("aws", {"allow_from": "0.0.0.0/1"}, "must not be wider than /8"),
        ("aws", {"allow_from": "::/1"}, "must not be wider than /16"),
        ("aws", {"identity_file": "~root/key"}, "another user's home"),
        ("ssh", {"machines": ["a..b"]}, "must be host names or addresses"),
        ("ssh", {"machines": ["a" * 64 + ".example"]}, "must be host names or addresses"),
        ("ssh", {"folder": "~/a{b,c}"}, "folder: "),
        ("kubernetes", {"memory_per_worker": "9000000TB"}, "memory_per_worker: "),
        ("kubernetes", {"node_selector": {"pool": "a b"}}, "must be Kubernetes labels"),
        ("kubernetes", {"node_selector": {"a": "b\nc"}}, "must be one line"),
    ],
)
def test_value__cloud_has_none_like_it__is_refused(
    tmp_path: Path, kind: str, keys: dict[str, Any], problem: str
) -> None:
    assert problem in str(error_of(tmp_path, kind, **keys))


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("aws", {"regions": ["us-east-1", "us-gov-west-1", "ap-southeast-4"], "head": "u-6tb1.56xlarge"}),
        ("aws", {"instance_types": ["p6-b200.48xlarge", "m7i-flex.large"], "image": "ami-12c6146b"}),
        ("gcp", {"regions": ["northamerica-northeast1-a", "us-south1-ai1b"], "head": "n2-custom-8-16384-ext"}),
        ("gcp", {"image": "projects/deeplearning-platform-release/global/images/family/common-cu129-ubuntu-2404"}),
        ("gcp", {"project": "example.com:my-project"}),
        ("azure", {"head": "Standard_E64-16s_v5", "resource_group": "my_group.(1)", "regions": ["westus3"]}),
        ("azure", {"image": f"/subscriptions/{UUID}/resourceGroups/g/providers/Microsoft.Compute/galleries/a"
                   "/images/b/versions/1.0.0"}),
        ("ssh", {"machines": ["gpu-1.example.com", "fe80::1", "node-1"], "user": "a.b-c_d"}),
        ("ssh", {"python": "/opt/my_env/bin/python", "identity_file": "~/My Keys/id"}),
        ("kubernetes", {"context": "arn:aws:eks:us-east-1:123456789012:cluster/one", "node_selector": {"a/b": ""}}),
    ],
)  # fmt: skip
def test_value__as_clouds_name_things__is_accepted(tmp_path: Path, kind: str, keys: dict[str, Any]) -> None:
    loaded = load(tmp_path, kind, **keys).model_dump(mode="json")
    assert {key: loaded[key] for key in keys} == keys


def test_allow_from__one_address__becomes_a_network(tmp_path: Path) -> None:
    assert load(tmp_path, "aws", allow_from="203.0.113.4").allow_from == "203.0.113.4/32"


@pytest.mark.parametrize(
    "url",
    [
        "sftp://alice:hunter2pass@host/runs",
        "s3://AKIA:hunter2pass@bucket/runs",
        "https://alice@host/runs",
        "abfs://container:hunter2pass@account.dfs.core.windows.net/runs",
        "https://account.blob.core.windows.net/c?sv=1&sig=hunter2pass",
        "s3://bucket/runs?secret_key=hunter2pass",
        "s3://bucket/runs?X-Amz-Signature=hunter2pass",
        "sftp://alice:hunter2pass@[/runs",
    ],
)
def test_storage__url_with_a_credential__is_refused_and_not_shown(tmp_path: Path, url: str) -> None:
    error = error_of(tmp_path, "ssh", storage=url)
    assert error.key == "storage" and "give credentials to the storage" in str(error)
    assert "hunter2pass" not in str(error)


@pytest.mark.parametrize(
    "url", ["abfs://container@account.dfs.core.windows.net/runs", "s3://bucket/runs@1", "gs://b/r", "/shared/a@b"]
)
def test_storage__url_without_a_credential__is_accepted(tmp_path: Path, url: str) -> None:
    assert load(tmp_path, "ssh", storage=url).storage == url

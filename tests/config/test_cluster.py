"""Cluster files: each provider has its section, and mistakes are reported with their line."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge.config.cluster import CloudSpec, KubernetesSpec, LocalSpec, SshSpec
from forge.config.load import load_cluster
from forge.errors import JobFileError


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster(path)


def load_error(tmp_path: Path, text: str) -> str:
    with pytest.raises(JobFileError) as error:
        load(tmp_path, text)
    return str(error.value).replace(str(tmp_path) + "/", "")


@pytest.mark.parametrize(
    ("text", "section"),
    [
        ("name: here\nprovider: local\nnodes: 3\n", LocalSpec),
        ("name: four\nprovider: ssh\nmachines: [10.0.0.1, 10.0.0.2]\n", SshSpec),
        ("name: spot\nprovider: aws\ngpu: A100-80GB\nworkers: 0..64\ndisk: 300GB\n", CloudSpec),
        ("name: spot\nprovider: gcp\nproject: mine-1\nregions: [us-central1-a]\n", CloudSpec),
        ("name: pods\nprovider: kubernetes\nimage: registry/forge:1\n", KubernetesSpec),
    ],
)
def test_load_cluster__each_provider__has_its_own_section(tmp_path: Path, text: str, section: type) -> None:
    assert type(load(tmp_path, text)) is section


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cluster.yaml: is empty; a cluster needs at least a name and a provider"),
        ("name: a\n", "cluster.yaml:1: provider: is missing; give one of local, ssh, aws, gcp, azure, kubernetes"),
        ("name: a\nprovider: awz\n", "cluster.yaml:2: provider: must be one of local, ssh, aws, gcp, azure, "),
        ("name: a\nprovider: awz\n", "did you mean 'aws'?"),
        ("name: a\nprovider: local\nnode: 3\n", "cluster.yaml:3: node: unknown key; did you mean 'nodes'?"),
        ("name: a\nprovider: ssh\nmachines: [x, x]\n", "cluster.yaml:3: machines: contains a machine twice"),
        ("name: a\nprovider: ssh\nmachines: ['-oProxyCommand=x']\n", "must be host names or addresses"),
        ("name: a\nprovider: ssh\nmachines: [x]\nmin_machines: 2\n", "cluster.yaml:4: min_machines: is more than"),
        ("name: a\nprovider: ssh\nmachines: [x]\nfolder: '~/a;b'\n", "cluster.yaml:4: folder: "),
        ("name: a\nprovider: gcp\n", "project: is missing"),
        ("name: a\nprovider: aws\nallow_from: 0.0.0.0/0\n", "must not allow the whole internet"),
        ("name: a\nprovider: aws\nworkers: 4..2\n", "cluster.yaml:3: workers: "),
        ("name: a\nprovider: aws\npassword: x\n", "secrets are read from the environment"),
        ("name: A b\nprovider: local\n", "cluster.yaml:1: name: must be lower-case letters"),
    ],
)
def test_load_cluster__mistake__is_reported_with_line_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    assert message in load_error(tmp_path, text)

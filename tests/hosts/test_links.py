"""`forge cluster probe` on hosts whose links are limited: the rates it measures, and the host that it names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from forge.cluster.registry import running_spec
from forge.plan.cluster_links import cluster_links
from tests.support.command import environment, forge
from tests.support.hosts import Hosts, can_make_hosts
from tests.support.ssh_cluster import spec_of, start, write_spec
from tests.support.sshd import LOGIN_SHELLS, SSHD, use_login_shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
FAST, SLOW = 400, 80
"""Mbit/s, far below what this machine can move."""


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if not (can_make_hosts() and Path(SSHD).exists()):
        pytest.skip("this needs the right to make network namespaces, iproute2, and OpenSSH's server")
    with Hosts(3) as hosts:
        for host in range(hosts.count):
            use_login_shell(hosts, host, LOGIN_SHELLS[0])
            start(hosts, host)
            hosts.limit(host, mbit_per_s=SLOW if host == 2 else FAST)
        yield hosts


def test_probe__one_slow_host__has_the_rates_names_it_and_counts_in_plans(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    env = environment(tmp_path, FORGE_STATE=str(tmp_path / "state"))
    spec = spec_of(hosts)
    write_spec(tmp_path / "lab.yaml", spec)
    up = forge("cluster", "up", "lab.yaml", cwd=tmp_path, env=env)
    try:
        assert up.returncode == 0, up.stderr
        assert "assumed" in cluster_links(running_spec("lab")).note
        done = forge("cluster", "probe", "lab", "-o", "json", cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        rates = {node["node"]: node["between_bytes_per_s"] * 8e-6 for node in found["nodes"]}
        assert set(rates) == {hosts.ip(host) for host in range(3)}
        for host, expected in enumerate((FAST, FAST, SLOW)):
            # Acknowledgements wait behind the data that goes the same way: an exchange reaches half of the limit.
            assert 0.3 * expected < rates[hosts.ip(host)] < 1.1 * expected
        assert [node["num_ranks"] for node in found["nodes"]] == [1, 1, 1]
        # The ring of an all-gather is as slow as its slowest link.
        assert 0.3 * SLOW < found["all_gather_bytes_per_s"] * 8e-6 < 1.6 * SLOW
        (warning,) = found["warnings"]
        assert warning.startswith(hosts.ip(2)) and found["is_kept"]

        links = cluster_links(running_spec("lab"))
        assert "forge cluster probe" in links.note and "assumed" not in links.note
        assert links.warnings == (warning,)
        assert links.interconnect.gpus_per_node == 1
        shown = forge("cluster", "probe", "lab", cwd=tmp_path, env=env)
        assert shown.returncode == 0, shown.stderr
        assert hosts.ip(1) in shown.stdout and hosts.ip(2) in shown.stderr
    finally:
        forge("cluster", "down", "lab", cwd=tmp_path, env=env)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "other"))
    assert "assumed" in cluster_links(spec).note

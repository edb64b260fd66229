"""The machines that other tests rely on: what they are apart in, how they fall silent, and that they go."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.command import survivors, wait_for
from tests.support.hosts import Hosts

_PORT = 4000
_ECHO = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
connection, _ = listener.accept()
while said := connection.recv(100):
    connection.sendall(said)
"""
_SAY = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
for line in sys.stdin.buffer:
    connection.sendall(line)
    print(connection.recv(100).decode(), end="", flush=True)
"""
_DRIVER = """
import json, os, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(sys.argv[1], logging_level="ERROR")
nodes = {node["NodeManagerAddress"]: node for node in ray.nodes() if node["Alive"]}


@ray.remote(num_cpus=1)
class Actor:
    def network(self):
        return os.readlink("/proc/self/ns/net")


there = NodeAffinitySchedulingStrategy(nodes[sys.argv[2]]["NodeID"], soft=False)
actor = Actor.options(scheduling_strategy=there).remote()
cpus = {address: node["Resources"].get("CPU", 0) for address, node in nodes.items()}
print(json.dumps({"cpus": cpus, "network": ray.get(actor.network.remote())}))
"""

_GREET = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


class Conversation:
    """One TCP connection between two hosts, over which every line comes back."""

    def __init__(self, hosts: Hosts, *, caller: int, listener: int) -> None:
        there = (hosts.ip(listener), str(_PORT))
        echo = hosts.run(listener, sys.executable, "-c", _ECHO, *there, stdout=subprocess.PIPE)
        assert echo.stdout is not None
        assert echo.stdout.readline() == b"ready\n"
        self.caller = hosts.run(
            caller, sys.executable, "-c", _SAY, *there, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )

    def say(self, word: str) -> None:
        assert self.caller.stdin is not None
        self.caller.stdin.write(f"{word}\n".encode())

    def receive(self, *, within_s: float) -> str | None:
        """The next word that comes back; None if it is silent, nothing if it is over."""
        assert self.caller.stdout is not None
        ready, _, _ = select.select([self.caller.stdout], [], [], within_s)
        return self.caller.stdout.readline().decode().strip() if ready else None


def output_of(hosts: Hosts, host: int, *command: str) -> str:
    said, _ = hosts.run(host, *command, stdout=subprocess.PIPE, text=True).communicate(timeout=30)
    return str(said)


def left_of(name: str) -> list[str]:
    """Devices, namespaces and files of a network, by its name."""
    places = (Path("/sys/class/net"), Path("/var/run/netns"), Path("/tmp"))
    return [str(path) for place in places for path in place.glob(f"{name}*") if path.name.split("-")[0] == name]


def processes_of(hosts: Hosts, *running: int) -> list[psutil.Process]:
    """All that runs on hosts on which something is known to run."""
    found = []
    for host in running:
        processes = hosts.processes(host)
        assert processes
        found += processes
    return found


def output_of_ip(*command: str) -> str:
    return subprocess.run(["ip", *command], check=True, capture_output=True, text=True).stdout


def test_hosts__have_their_own_address_and_loopback(hosts: Hosts) -> None:
    for host in range(3):
        links = json.loads(output_of(hosts, host, "ip", "-j", "-4", "addr"))
        addresses = [address["local"] for link in links for address in link["addr_info"]]
        assert addresses == ["127.0.0.1", hosts.ip(host)]


class TestCut:
    @pytest.mark.parametrize(("caller", "listener"), [(0, 2), (2, 0)])
    def test_cut__open_connection__is_silent_until_reconnected(
        self, hosts: Hosts, caller: int, listener: int
    ) -> None:
        conversation = Conversation(hosts, caller=caller, listener=listener)
        conversation.say("before")
        assert conversation.receive(within_s=10) == "before"
        hosts.cut(2)
        conversation.say("during")
        assert conversation.receive(within_s=0.5) is None
        hosts.reconnect(2)
        assert conversation.receive(within_s=10) == "during"

    def test_cut__other_hosts__stay_connected(self, hosts: Hosts) -> None:
        conversation = Conversation(hosts, caller=0, listener=1)
        hosts.cut(2)
        conversation.say("still")
        assert conversation.receive(within_s=10) == "still"

    def test_cut__new_connection__times_out(self, hosts: Hosts) -> None:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((hosts.ip(2), _PORT))
        hosts.cut(2)
        # Without a permanent ARP entry the kernel would report an unreachable host after three seconds.
        with pytest.raises(TimeoutError):
            socket.create_connection((hosts.ip(2), _PORT), timeout=3.5)

    def test_cut_and_kill__open_connection__is_silent(self, hosts: Hosts) -> None:
        conversation = Conversation(hosts, caller=0, listener=2)
        conversation.say("before")
        assert conversation.receive(within_s=10) == "before"
        hosts.cut(2)
        hosts.kill(2)
        conversation.say("after")
        assert conversation.receive(within_s=0.5) is None


def test_kill__ends_all_processes_of_one_host(hosts: Hosts) -> None:
    kept = hosts.run(1, "sleep", "100")
    hosts.run(2, "sh", "-c", "setsid sleep 100 & setsid sleep 100 & wait")
    wait_for(lambda: len(output_of_ip("netns", "pids", f"{hosts.folder.name}-2").split()) == 3)
    processes = processes_of(hosts, 2)
    hosts.kill(2)
    assert survivors(processes, timeout_s=1) == []
    assert kept.poll() is None


def test_hosts__creator_was_killed__next_one_cleans_up(_hosts_allowed: None) -> None:
    script = (
        "from tests.support.hosts import Hosts; hosts = Hosts(1);"
        "print(hosts.run(0, 'sleep', '100').pid, hosts.folder, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as maker:
        assert maker.stdout is not None
        pid, folder = maker.stdout.readline().split()
        sleeper = psutil.Process(int(pid))
        wait_for(lambda: sleeper.name() == "sleep")
        maker.kill()
    assert sleeper.is_running()
    with Hosts(1) as hosts:
        assert survivors([sleeper], timeout_s=1) == []
        assert hosts.folder == Path(folder) or not left_of(Path(folder).name)


@pytest.fixture(scope="module")
def cluster(_hosts_allowed: None) -> Iterator[Hosts]:
    with Hosts(3) as hosts:
        hosts.start_ray()
        yield hosts


# They share a cluster, because one takes ten seconds to start; the last one starts its own.
@pytest.mark.slow
class TestRay:
    @pytest.fixture(params=["host 0", "outside"])
    def answer(self, request: pytest.FixtureRequest, cluster: Hosts) -> dict[str, Any]:
        """What a driver reports, on a host and outside."""
        command = [sys.executable, "-c", _DRIVER, cluster.ray_address, cluster.ip(2)]
        if request.param == "host 0":
            said = output_of(cluster, 0, *command)
        else:
            environment = os.environ | cluster.environment
            said = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        return dict(json.loads(said))

    def test_ray__driver__sees_every_node_and_reaches_an_actor(
        self, answer: dict[str, Any], cluster: Hosts
    ) -> None:
        assert answer["cpus"] == {cluster.ip(0): 0, cluster.ip(1): 1, cluster.ip(2): 1}
        assert answer["network"] == output_of(cluster, 2, "readlink", "/proc/self/ns/net").strip()

    def test_ray__wrong_token__is_refused(self, cluster: Hosts, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("f" * 64)
        command = [sys.executable, "-c", _GREET, cluster.ray_address]
        member = os.environ | cluster.environment
        assert subprocess.run(command, env=member, check=False).returncode == 0
        stranger = subprocess.run(
            command,
            env=member | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
            check=False,
            capture_output=True,
            text=True,
        )
        assert stranger.returncode != 0
        assert "InvalidAuthToken" in stranger.stderr

    def test_close__running_cluster__leaves_nothing(self, hosts: Hosts) -> None:
        hosts.start_ray()
        processes = processes_of(hosts, 0, 1, 2)
        assert len(processes) > 8
        assert len(left_of(hosts.folder.name)) == 8  # the bridge, three ports, three namespaces, the folder
        hosts.close()
        assert survivors(processes, timeout_s=1) == []
        assert left_of(hosts.folder.name) == []

"""Hosts for tests: network namespaces on a bridge, each with its own address, loopback and ports.

They share this machine's files, process ids and host name, but not its network: their packets stay on the bridge,
where this machine has the address that ends in 1. A host can fail in three ways: `kill` (its processes die and its
kernel closes their connections), `cut` (packets are dropped without notice), and both, which is a power failure. As
in a cloud, a vanished address gives no ARP error, and name lookups are answered at once; here, always as unknown.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.command import wait_for

_NAMESPACES = Path("/var/run/netns")
_FILES = Path("/etc/netns")
"""Programs in a namespace see the files in its folder here as files in `/etc`."""
_LINKS = Path("/sys/class/net")
_NUMBERS = range(1, 255)
_RAY_PORT = 6379
_RAY_START_TIMEOUT_S = 90.0
_OBJECT_STORE_BYTES = 80_000_000
_PORT_DISABLED, _PORT_FORWARDING = 0, 3
"""States of a bridge's port. Unlike a link that is down, one that is disabled leaves both ends their carrier."""


class Hosts:
    """Hosts on their own network; Ray's head runs on host 0."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: defaultdict[int, list[subprocess.Popen[Any]]] = defaultdict(list)
        self._is_closed = False
        self._number = _claim_network()
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def gateway(self) -> str:
        """This machine's address on the network."""
        return f"10.77.{self._number}.1"

    def ip(self, host: int) -> str:
        """A host's address."""
        return f"10.77.{self._number}.{11 + host}"

    @property
    def ray_address(self) -> str:
        return f"{self.ip(0)}:{_RAY_PORT}"

    @property
    def folder(self) -> Path:
        """A folder for this network, readable by its owner only, with a short path."""
        return _folder_of(self._number)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that connects to the Ray cluster."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            "RAY_prestart_worker_first_driver": "0",
        }

    def run(
        self, host: int, *command: str | Path, env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on a host, as a session leader.

        Args:
            env: its environment, by default this process's; the cluster's is added.
            popen: What `subprocess.Popen` takes besides.
        """
        inherited = {name: value for name, value in (env or os.environ).items() if name != "RAY_AUTH_TOKEN"}
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._name(host), *map(str, command)],
            env=inherited | self.environment,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **popen},
        )
        self._processes[host].append(process)
        return process

    def processes(self, host: int) -> list[psutil.Process]:
        """All processes on a host."""
        found = []
        for pid in _ip(f"netns pids {self._name(host)}").split():
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def cut(self, host: int) -> None:
        """Drop all packets to and from a host, without notice to either side."""
        _set_port(self._name(host), _PORT_DISABLED)

    def reconnect(self, host: int) -> None:
        """Undo `cut`."""
        _set_port(self._name(host), _PORT_FORWARDING)

    def limit(self, host: int, *, mbit_per_s: int) -> None:
        """Limit what a host sends."""
        limit = ("tbf", "rate", f"{mbit_per_s}mbit", "burst", "256k", "latency", "50ms")
        command = ("ip", "netns", "exec", self._name(host), "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)
        subprocess.run(command, check=True)

    def kill(self, host: int) -> None:
        """Kill all processes on a host, and wait until they are gone."""
        self._reap(host)
        _end_all(self._name(host))

    def add(self, host: int, *, etc: Mapping[str, str] | None = None) -> None:
        """Add a host with this number; nothing runs on it yet.

        Args:
            etc: files that its processes see in `/etc`, by name.
        """
        self._make(host, neighbours=())
        self.write_etc(host, etc or {})
        _ip(self._neighbour(11 + host, _bridge_of(self._number)))
        wait_for(functools.partial(_is_open, self._name(host)), timeout_s=10)

    def write_etc(self, host: int, files: Mapping[str, str]) -> None:
        """Write files that the processes which are started from now on see in `/etc`, by name."""
        for name, text in files.items():
            (_FILES / self._name(host) / name).write_text(text)

    def remove(self, host: int) -> None:
        """Remove a host; its number is free again."""
        self.kill(host)
        shutil.rmtree(_FILES / self._name(host), ignore_errors=True)
        _ip(f"link del {self._name(host)}", f"netns del {self._name(host)}")

    def start_ray(self, *, head_cpus: int = 0, cpus: int = 1) -> str:
        """Start Ray's head on host 0 and a node on every other, and wait for them. Returns: Ray's address."""
        head = ["--head", "--port", str(_RAY_PORT), "--include-dashboard", "false"]
        self._await_ray({0: self._launch_ray(0, *head, cpus=head_cpus)})
        self.join_ray(*range(1, self.count), cpus=cpus)
        return self.ray_address

    def join_ray(self, *hosts: int, cpus: int = 1) -> None:
        """Start a Ray node on each of these hosts, and wait until they are up."""
        self._await_ray({host: self._launch_ray(host, "--address", self.ray_address, cpus=cpus) for host in hosts})

    def close(self) -> None:
        """Kill all processes and remove the network.

        Raises: TimeoutError if a process stays, CalledProcessError if a device does.
        """
        if self._is_closed:
            return
        for host in range(self.count):
            self._reap(host)
        _remove_network(self._number)
        self._is_closed = True  # from here on the number may be another's

    def _name(self, host: int) -> str:
        """The name of a host's namespace, and of its port on the bridge."""
        return f"{_bridge_of(self._number)}-{host}"

    def _mac(self, last: int) -> str:
        return f"02:4d:{self._number:02x}:00:00:{last:02x}"

    def _build(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # a machine that went down leaves files but no network
        self.folder.mkdir(mode=0o700)
        (self.folder / "token").touch(mode=0o600)
        (self.folder / "token").write_text(secrets.token_hex(32))
        bridge, hosts = _bridge_of(self._number), range(self.count)
        for host in hosts:
            self._make(host, neighbours=[other for other in hosts if other != host])
        _ip(
            f"link set {bridge} address {self._mac(1)} up",
            f"addr add 10.77.{self._number}.1/24 dev {bridge}",
            *(self._neighbour(11 + host, bridge) for host in hosts),
        )
        # The kernel is late to see that a link is up, and would then open a port that was cut meanwhile.
        for host in hosts:
            wait_for(functools.partial(_is_open, self._name(host)), timeout_s=10)

    def _make(self, host: int, *, neighbours: Sequence[int]) -> None:
        """Create one host with permanent ARP entries for its neighbours."""
        name, mac = self._name(host), self._mac(11 + host)
        (_FILES / name).mkdir(parents=True, exist_ok=True)
        (_FILES / name / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        _ip(
            f"netns add {name}",
            f"link add {name} type veth peer name eth0 address {mac} netns {name}",
            f"link set {name} master {_bridge_of(self._number)} up",
        )
        _ip(
            "link set lo up",
            f"addr add {self.ip(host)}/24 dev eth0",
            "link set eth0 up",
            # Leads nowhere, but many programs ask for the route to the world to learn their own address.
            "route add default dev eth0",
            self._neighbour(1, "eth0"),
            *(self._neighbour(11 + other, "eth0") for other in neighbours),
            namespace=name,
        )

    def _neighbour(self, last: int, device: str) -> str:
        return f"neigh replace 10.77.{self._number}.{last} lladdr {self._mac(last)} dev {device} nud permanent"

    def _launch_ray(self, host: int, *arguments: str, cpus: int) -> subprocess.Popen[Any]:
        # Hosts that shared a --temp-dir would race for the names of its sockets.
        with self._ray_log(host).open("w") as log:
            return self.run(
                host,
                Path(sys.executable).with_name("ray"),
                *("start", *arguments),
                *("--node-ip-address", self.ip(host), "--temp-dir", str(self.folder / str(host))),
                *("--num-cpus", str(cpus), "--object-store-memory", str(_OBJECT_STORE_BYTES)),
                *("--no-monitor", "--include-log-monitor", "false", "--disable-usage-stats"),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _await_ray(self, starting: Mapping[int, subprocess.Popen[Any]]) -> None:
        for host, process in starting.items():
            try:
                code: int | str = process.wait(_RAY_START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = "too slow"
            if code != 0:
                raise RuntimeError(f"Ray did not start on host {host} ({code}):\n{self._ray_log(host).read_text()}")

    def _ray_log(self, host: int) -> Path:
        return self.folder / f"ray-{host}.log"

    def _reap(self, host: int) -> None:
        """End what `run` started on a host, even if it has not entered the namespace yet."""
        for process in self._processes.pop(host, []):
            process.kill()
            process.wait()


@functools.cache
def can_make_hosts() -> bool:
    """Whether this process may create network namespaces; tries it."""
    if not (shutil.which("ip") and shutil.which("bridge")):
        return False
    try:
        with Hosts(1):
            return True
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError):  # no such kernel, or no right to it
        return False


def _claim_network() -> int:
    """A number N for which 10.77.N.0/24 is free here; its bridge is created, so that no other test takes it."""
    with _only_one():
        for number in filter(_is_orphan, _NUMBERS):
            _remove_network(number)
        for number in _NUMBERS:
            bridge = _bridge_of(number)
            if not (_LINKS / bridge).exists() and not _is_in_use(f"10.77.{number}."):
                _ip(f"link add {bridge} type bridge", f"link set {bridge} alias {os.getpid()}")
                return number
    raise RuntimeError("every network from 10.77.1.0/24 to 10.77.254.0/24 is in use here")


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Hold the lock under which processes of this machine choose a network."""
    folder = os.open(_LINKS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _is_orphan(number: int) -> bool:
    """Whether the process that created a network was killed before it could remove it."""
    try:
        owner = (_LINKS / _bridge_of(number) / "ifalias").read_text().strip()
    except OSError:
        return False
    return owner.isdigit() and not psutil.pid_exists(int(owner))


def _is_in_use(prefix: str) -> bool:
    return any(
        address.address.startswith(prefix) for addresses in psutil.net_if_addrs().values() for address in addresses
    )


def _remove_network(number: int) -> None:
    """Remove what exists of a network, in any state."""
    bridge = _bridge_of(number)
    namespaces = [path.name for path in _NAMESPACES.glob(f"{bridge}-*")]
    for namespace in namespaces:
        _end_all(namespace)
    shutil.rmtree(_folder_of(number), ignore_errors=True)
    for files in _FILES.glob(f"{bridge}-*"):
        shutil.rmtree(files, ignore_errors=True)
    # The kernel takes a namespace away at its leisure, and the links in it; these go at once.
    _ip(
        *(f"link del {path.name}" for path in _LINKS.glob(f"{bridge}-*")),
        *(f"netns del {namespace}" for namespace in namespaces),
        # Last: without its bridge the number may be another's.
        *(f"link del {path.name}" for path in _LINKS.glob(bridge)),
    )


def _end_all(namespace: str) -> None:
    wait_for(lambda: not _kill_all_in(namespace), timeout_s=20)


def _kill_all_in(namespace: str) -> bool:
    """Kill all processes in a namespace. Returns: whether there were any."""
    pids = _ip(f"netns pids {namespace}").split()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    return bool(pids)


def _set_port(port: str, state: int) -> None:
    subprocess.run(["bridge", "link", "set", "dev", port, "state", str(state)], check=True)


def _is_open(port: str) -> bool:
    link = _LINKS / port
    is_up = (link / "operstate").read_text().strip() == "up"
    return is_up and int((link / "brport" / "state").read_text()) == _PORT_FORWARDING


def _ip(*commands: str, namespace: str | None = None) -> str:
    """Run commands of `ip` up to the first that fails. Returns: its output."""
    inside = ["-n", namespace] if namespace else []
    done = subprocess.run(
        ["ip", *inside, "-batch", "-"], input="\n".join(commands), capture_output=True, text=True, check=True
    )
    return done.stdout


def _bridge_of(number: int) -> str:
    return f"fh{number}"


def _folder_of(number: int) -> Path:
    # Ray's sockets lie below it, and a socket's path has at most 107 characters.
    return Path(f"/tmp/{_bridge_of(number)}")

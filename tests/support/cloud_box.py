"""A cloud in a box: EC2 and IAM by moto's server, and a real machine for each instance that runs.

`Api` is only the service, on loopback or a bridge. It can refuse requests, as a cloud without capacity does, and
reports the spot prices that a test sets. `CloudBox` adds the machines: network namespaces with the instances'
addresses, each with an sshd that accepts the instance's key, a metadata service, its own home folder and process
ids. The machine of a terminated instance is gone within a second, without notice.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.ec2.models import ec2_backends
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from tests.support.clouds import Aws
from tests.support.hosts import Hosts

IMAGE = "ami-12c6146b"
"""An image that moto has in every region."""
_ROOT = Path(__file__).parents[2]
_LOOK_S = 0.2
_making = threading.Lock()
_REGION = re.compile(r"Credential=[^/]+/[^/]+/([^/]+)/")


@functools.cache
def _session() -> Any:
    return boto3.session.Session()


@dataclass(frozen=True)
class Refusal:
    """An error that the service returns for one action in one region."""

    action: str
    region: str
    code: str
    needs: str = ""
    """Only for requests that contain this; by default for all."""


@dataclass
class Api:
    """The service of moto."""

    endpoint: str
    refusals: list[Refusal] = field(default_factory=list)
    spot_prices: dict[str, dict[str, float]] = field(default_factory=dict)
    """The whole spot price history: USD per hour by region and instance type."""
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    """The number of requests by action and region."""

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that uses this service and no real one."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "planted-secret-of-a-cloud",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self, service: str, region: str = "us-east-1") -> Any:
        """A boto3 client with the cloud's own rights."""
        with _making:
            return _session().client(
                service,
                region_name=region,
                endpoint_url=self.endpoint,
                aws_access_key_id="the-cloud",
                aws_secret_access_key="itself",
            )

    def ec2(self, region: str) -> Any:
        """The EC2 client of a region."""
        return self.client("ec2", region)

    def reset(self) -> None:
        """Empty the cloud."""
        reset = urllib.request.Request(f"{self.endpoint}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()
        self.refusals, self.spot_prices, self.calls = [], {}, Counter()

    def instances(self, region: str) -> list[dict[str, Any]]:
        """All instances of a region, terminated ones too."""
        found = self.ec2(region).describe_instances()["Reservations"]
        return [machine for reservation in found for machine in reservation["Instances"]]

    def alive(self, region: str) -> list[dict[str, Any]]:
        """The running instances of a region."""
        return [machine for machine in self.instances(region) if machine["State"]["Name"] == "running"]

    def _answer(self, environ: dict[str, Any]) -> tuple[str, bytes] | None:
        """The box's own answer to a request; None to let moto answer."""
        found = _REGION.search(environ.get("HTTP_AUTHORIZATION", ""))
        region = found[1] if found else ""
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if most := re.search(rb"MaxCount=(\d+)", body):  # moto starts the fewest that are asked for, EC2 the most
            body = re.sub(rb"MinCount=\d+", b"MinCount=" + most[1], body)
            environ["CONTENT_LENGTH"] = str(len(body))
        environ["wsgi.input"] = _Again(body)
        values = {name: given[0] for name, given in parse_qs(body.decode(errors="replace")).items()}
        action = values.get("Action", "")
        if "Credential=the-cloud/" in environ.get("HTTP_AUTHORIZATION", ""):
            return None
        self.calls[action, region] += 1
        for refusal in self.refusals:
            if (refusal.action, refusal.region) == (action, region) and refusal.needs in body.decode():
                return "400 Bad Request", _refusal(refusal.code)
        if action == "DescribeSpotPriceHistory":
            names = [value for name, value in values.items() if name.startswith("InstanceType.")]
            return "200 OK", _price_history(self.spot_prices.get(region, {}), names, region)
        return None


class _Again:
    """A request body that can be read again."""

    def __init__(self, body: bytes) -> None:
        self._body = body

    def read(self, size: int = -1) -> bytes:
        size = len(self._body) if size < 0 else size
        found, self._body = self._body[:size], self._body[size:]
        return found


@contextlib.contextmanager
def serve_api(*, address: str = "127.0.0.1") -> Iterator[Api]:
    """Serve an empty cloud from a thread; this process's environment points to it inside the `with` block."""
    moto = DomainDispatcherApplication(create_backend_app)
    api = Api(endpoint="")

    def answer(environ: dict[str, Any], start_response: Any) -> Any:
        own = api._answer(environ)
        if own is None:
            return moto(environ, start_response)
        start_response(own[0], [("Content-Type", "text/xml")])
        return [own[1]]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server(address, 0, answer, threaded=True)
    api.endpoint = f"http://{address}:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(api.environment)
    try:
        api.reset()
        yield api
    finally:
        server.shutdown()
        os.environ.clear()
        os.environ.update(before)


class CloudBox:
    """The service and its machines."""

    def __init__(self, *, regions: tuple[str, ...] = ("us-east-1",)) -> None:
        self._stack = contextlib.ExitStack()
        self._hosts = self._stack.enter_context(Hosts(0))
        self._regions = regions
        self._there: dict[str, int] = {}
        self._metadata: dict[str, Aws] = {}
        self._is_over = threading.Event()
        try:
            self.api = self._stack.enter_context(serve_api(address=self._hosts.gateway))
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, for its processes that have no rights
            for index, region in enumerate(regions):
                self._lay_network(region, index)
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
            self._stack.callback(self._stop_watching)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> CloudBox:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def network(self) -> str:
        """The network from which this machine reaches the others, as a CIDR."""
        return f"{self._hosts.gateway}/32"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that uses this service and no real one."""
        return self.api.environment

    @property
    def machines(self) -> tuple[str, ...]:
        """The addresses of the existing machines."""
        return tuple(self._hosts.ip(host) for host in self._there.values())

    def folder(self, address: str) -> Path:
        """The folder with a machine's own files; its home is `home` in it."""
        return self._hosts.folder / address

    def announce(self, instance_id: str) -> None:
        """Give one machine the two-minute preemption notice."""
        self._metadata[instance_id].announce()

    def reclaim(self, instance_id: str, *, region: str = "us-east-1") -> None:
        """Reclaim a spot machine; return when it is gone."""
        self.api.ec2(region).terminate_instances(InstanceIds=[instance_id])
        deadline = time.monotonic() + 20
        while instance_id in self._there and time.monotonic() < deadline:
            time.sleep(0.05)
        assert instance_id not in self._there

    def _lay_network(self, region: str, index: int) -> None:
        """Make the region's default network that of the bridge, in two zones, with only private addresses."""
        ec2 = self.api.ec2(region)
        for subnet in ec2.describe_subnets()["Subnets"]:
            ec2.delete_subnet(SubnetId=subnet["SubnetId"])
        for vpc in ec2.describe_vpcs()["Vpcs"]:
            ec2.delete_vpc(VpcId=vpc["VpcId"])
        backend = ec2_backends[DEFAULT_ACCOUNT_ID][region]
        prefix = self._hosts.gateway.rpartition(".")[0]
        vpc = backend.create_vpc(f"{prefix}.0/24", is_default=True)
        zones = [zone["ZoneName"] for zone in ec2.describe_availability_zones()["AvailabilityZones"][:2]]
        # A range each, so that no two machines of the box ever have one address.
        for number, zone in enumerate(zones):
            subnet = backend.create_subnet(vpc.id, f"{prefix}.{64 + 32 * (2 * index + number)}/27", zone)
            # A public address could exist on the internet; no machine of the box has one.
            ec2.modify_subnet_attribute(SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": False})

    def _watch(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            wanted = {
                machine["InstanceId"]: (region, machine)
                for region in self._regions
                for machine in self.api.alive(region)
            }
            for instance_id in [known for known in self._there if known not in wanted]:
                self._hosts.remove(self._there[instance_id])
                del self._there[instance_id]
            for instance_id, (region, machine) in wanted.items():
                if instance_id not in self._there:
                    self._start(instance_id, machine, region=region)

    def _stop_watching(self) -> None:
        self._is_over.set()
        self._watcher.join(30)

    def _start(self, instance_id: str, machine: dict[str, Any], *, region: str) -> None:
        address = machine["PrivateIpAddress"]
        host = int(address.rpartition(".")[2]) - 11
        folder = self.folder(address)
        home = folder / "home"
        home.mkdir(parents=True)
        (home / ".bashrc").touch()
        users = re.sub(r"(?m)^(root:.*:)[^:]*(:[^:]*)$", rf"\g<1>{home}\g<2>", Path("/etc/passwd").read_text())
        self._hosts.add(host, etc={"passwd": users})
        assert self._hosts.ip(host) == address
        pair = ec2_backends[DEFAULT_ACCOUNT_ID][region].key_pairs[machine["KeyName"]]
        assert "PublicIpAddress" not in machine  # it could exist on the internet
        (folder / "authorized_keys").write_bytes(pair.material_public)
        self._metadata[instance_id] = self._stack.enter_context(Aws(address=self._hosts.gateway))
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key")], check=True, timeout=30
        )
        (folder / "sshd_config").write_text(self._sshd_config(address, self._metadata[instance_id]))
        with (folder / "sshd.log").open("w") as log:
            self._hosts.run(
                host,
                *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
                *("/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._there[instance_id] = host

    def _sshd_config(self, address: str, metadata: Aws) -> str:
        folder = self.folder(address)
        environment = {
            **self.api.environment,
            **{name: value for name, value in metadata.environment.items() if name.startswith("AWS_")},
            "RAY_TMPDIR": str(folder),
            "PYTHONPATH": str(_ROOT),
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "100000000",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        return "\n".join(
            [
                f"ListenAddress {address}",
                f"HostKey {folder / 'host_key'}",
                f"AuthorizedKeysFile {folder / 'authorized_keys'}",
                "PasswordAuthentication no",
                "KbdInteractiveAuthentication no",
                "StrictModes no",
                "PidFile none",
                f"SetEnv {' '.join(f'{name}={shlex.quote(value)}' for name, value in environment.items())}",
                "",
            ]
        )


PYTHON = sys.executable
"""The Python with forge on every machine of the box."""


def _refusal(code: str) -> bytes:
    return (
        '<?xml version="1.0"?><Response><Errors><Error>'
        f"<Code>{code}</Code><Message>There is no room, or you may not.</Message>"
        "</Error></Errors><RequestID>0</RequestID></Response>"
    ).encode()


def _price_history(prices: dict[str, float], names: list[str], region: str) -> bytes:
    items = "".join(
        f"<item><instanceType>{name}</instanceType><productDescription>Linux/UNIX</productDescription>"
        f"<spotPrice>{prices[name]}</spotPrice><timestamp>2026-01-01T00:00:00.000Z</timestamp>"
        f"<availabilityZone>{region}a</availabilityZone></item>"
        for name in names
        if name in prices
    )
    return (
        '<DescribeSpotPriceHistoryResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>0</requestId>'
        f"<spotPriceHistorySet>{items}</spotPriceHistorySet><nextToken/></DescribeSpotPriceHistoryResponse>"
    ).encode()

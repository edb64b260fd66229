"""Machines rented from AWS, GCP or Azure: Ray's launcher and autoscaler rent them, forge says which and where.

`up` tries the regions in order of price, until one has the machines. What is remembered is which regions were
tried, before anything is rented there: `down` asks each of them for what bears the cluster's tag, so that nothing
is left behind, wherever and whenever `up` was ended. It is long: every step of renting can be interrupted.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

from forge.cluster.base import (
    ClusterNode,
    ClusterRecord,
    ClusterStatus,
    NodeProgress,
    OnProgress,
    cluster_lock,
    delete_state,
    make_token,
    read_record,
    read_token,
    state_folder,
    token_path,
    write_record,
)
from forge.cluster.cloud import aws, aws_network, firewall, head_ops
from forge.cluster.cloud.instance_selection import (
    InstancePlan,
    PriceOf,
    listed_price,
    order_by_price,
    plan_purchase,
)
from forge.cluster.cloud.ray_config import (
    DASHBOARD_PORT,
    HEAD,
    TOKEN_FILE,
    RegionContext,
    render,
    shell_path,
    user_of,
)
from forge.cluster.cloud.ray_launcher import Launch, Launcher
from forge.cluster.cloud.setup_commands import plan_install, would_install
from forge.cluster.cloud.ssh_access import make_key, own_address
from forge.cluster.dashboard import ray_nodes, ray_runs
from forge.cluster.ssh.session import SshHost
from forge.config.cluster import CloudSpec
from forge.config.dump import dump_plain
from forge.errors import ClusterError
from forge.pricing.catalog import regions_of, workers_of

_MADE_LATER = "made-by-forge-cluster-up"
"""Stands in a dry run where only the cloud can say more."""
_ROOM_TIMEOUT_S = 20.0
_ROOM_TIMEOUT_PER_TYPE_S = 10.0
"""Ray's autoscaler asks for one machine type after another, every five seconds."""
_POLL_S = 1.0
_HEALTH_TIMEOUT_S = 20.0


class CloudCluster:
    """The rented machines of one cluster file."""

    def __init__(self, spec: CloudSpec) -> None:
        self._spec = spec
        self._head_address: str | None = None

    @property
    def name(self) -> str:
        """As its file says."""
        return self._spec.name

    @property
    def shares_files(self) -> bool:
        """Rented machines have nothing of this one."""
        return False

    @property
    def gpu(self) -> str | None:
        """As its file says."""
        return None if self._spec.gpu == "none" else self._spec.gpu

    def token(self) -> str:
        """What its Ray wants of whoever connects. Raises: ClusterError if it cannot be read."""
        return read_token(self.name)

    def price(self) -> float | None:
        """The most that the cluster can cost, in USD per hour, by the price list; None if that is not known.

        Raises: JobFileError if the file asks for what cannot be had.
        """
        return plan_purchase(self._spec, price_of=listed_price(self._spec)).usd_per_hour

    def to_yaml(self) -> str:
        """The file that `up` would give to Ray's launcher, with the first region; nothing is asked or made.

        Raises: JobFileError, ClusterError if the file asks for what cannot be had.
        """
        spec = self._spec
        purchase = plan_purchase(spec, price_of=listed_price(spec))
        site = RegionContext(
            region=regions_of(spec)[0],
            key_file=spec.identity_file or _MADE_LATER,
            public_key_file=_MADE_LATER,
            public_key=_MADE_LATER,
            token_file=str(token_path(self.name)),
            image=spec.image or _MADE_LATER,
            cpu_image=spec.image or _MADE_LATER,
            key_name=f"forge-{self.name}",
            subnets=(_MADE_LATER,),
            security_group=_MADE_LATER,
            head_profile=f"forge-{self.name}-head",
            worker_profile=f"forge-{self.name}-worker",
        )
        return dump_plain(render(spec, purchase=purchase, site=site, installed=would_install(spec)))

    def up(self, *, on_progress: OnProgress) -> ClusterStatus:
        """Rent the head, where machines are to be had for least; the head rents the workers.

        Raises: ClusterError with what failed. What was rented until then stays, and is found by `down`; so it is
            after Ctrl-C.
        """
        with cluster_lock(self.name):
            plan_purchase(self._spec, price_of=listed_price(self._spec))  # a wrong file costs nothing
            old = read_record(self.name)
            if old is not None and old.provider != self._spec.provider:
                raise ClusterError(
                    f"a cluster '{self.name}' on {old.provider} is known already; give this one another name, or "
                    f"end that one: forge cluster down {self.name}"
                )
            facts = dict(old.state) if old is not None else {}
            if old is not None and facts.get("region") and self._answers():
                is_same = old.spec == self._plain_spec()
                on_progress(
                    NodeProgress(name="head", message="ready" if is_same else "ready, by the file of before")
                )
                return self.status()
            self._remember(facts)
            try:
                self._up_somewhere(facts, on_progress=on_progress)
            finally:
                if not facts.get("tried"):
                    self._forget(facts=facts)
        return self.status()

    def status(self) -> ClusterStatus:
        """The machines as the cloud, or where it cannot be asked quickly, Ray sees them.

        Raises: ClusterError if they cannot be asked.
        """
        record = read_record(self.name)
        if record is None or not record.state.get("tried"):
            return ClusterStatus(name=self.name, provider=self._spec.provider, address=None)
        prices = record.state.get("prices", {})
        if self._spec.provider == "aws":
            chosen = record.state.get("region")
            regions = [chosen] if chosen else record.state["tried"]
            nodes = [node for region in regions for node in aws.list_nodes(self.name, region=region, prices=prices)]
        else:
            nodes = [head_ops.priced(node, prices) for node in self._seen_by_ray()[0]]
        runs: tuple[str, ...] = ()
        head = next((node for node in nodes if node.kind == "head" and node.state == "alive"), None)
        if head is None or not record.state.get("region"):
            return ClusterStatus(name=self.name, provider=self._spec.provider, address=None, nodes=tuple(nodes))
        if self._spec.provider == "aws":
            with suppress(ClusterError):  # the machines cost, whether Ray on the head answers or not
                seen, runs = self._seen_by_ray()
                by_address = {node.name: node for node in seen if node.state == "alive"}
                nodes = [head_ops.seen(node, by_address) for node in nodes]
        return ClusterStatus(
            name=self.name,
            provider=self._spec.provider,
            address=f"{record.state['private_address']}:6379",
            nodes=tuple(nodes),
            runs=runs,
        )

    def down(self, *, on_progress: OnProgress) -> list[str]:
        """Give every machine back, in every region that was tried, and what was made for them.

        Returns: what is left all the same, by the provider's own word.
        Raises: ClusterError if that cannot be found out; the cluster is remembered then.
        """
        with cluster_lock(self.name):
            record = read_record(self.name)
            if record is None:
                return []
            left: list[str] = []
            tried = record.state.get("tried", [])
            # Ray's launcher knows of one place, the last; those before were given back when it was chosen.
            for region in tried if self._spec.provider == "aws" else tried[-1:]:
                left += self._leave(region, on_progress=on_progress)
            if not left:
                self._forget(facts=record.state)
        return left

    def on_head(
        self, command: Sequence[str], *, stdin: bytes | IO[bytes] = b"", timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command on the head, where it finds the cluster's Ray.

        Raises: ClusterError if the head is not reached.
        """
        spec = self._spec
        values = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": TOKEN_FILE, "FORGE_CLOUD": spec.provider}
        if spec.storage is not None:
            values["FORGE_STORAGE"] = spec.storage
        exports = " ".join(f"{name}={shell_path(value)}" for name, value in values.items())
        words = list(map(shlex.quote, command))
        if command[0] == "python":
            words[0] = shell_path(self._fact("python"))
        return self._head().run(f"export {exports}; exec {' '.join(words)}", stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def job_server(self) -> Iterator[str]:
        """The URL of Ray's job server, through ssh. Raises: ClusterError if it is not reached."""
        with self._head().forward(DASHBOARD_PORT) as port:
            yield f"http://127.0.0.1:{port}"

    def shell(self, machine: str | None) -> list[str]:
        """The command that opens a shell on a machine; on the head by default."""
        head = self._head()
        if machine is None:
            return head.ssh()
        # Only the head can be reached from everywhere; it passes on what it cannot read.
        return replace(head, host=machine).ssh("-o", f"ProxyCommand={shlex.join(head.ssh('-W', '%h:%p'))}")

    def _up_somewhere(self, facts: dict[str, Any], *, on_progress: OnProgress) -> None:
        """Try the regions until one has the machines. Raises: ClusterError naming why none has."""
        names = workers_of(self._spec)
        prices = self._prices(names, chosen=facts.get("region"), on_progress=on_progress)
        refusals: list[str] = []
        left: list[str] = []
        for region, price_of in prices.items():
            on_progress(NodeProgress(name=region, message="preparing"))
            facts["tried"] = [*dict.fromkeys([*facts.get("tried", []), region])]
            self._remember(facts)
            purchase = plan_purchase(self._spec, price_of=price_of)
            launch = self._launch(region, purchase, facts, on_progress=on_progress)
            if launch.is_done:
                self._settle(facts, region=region, purchase=purchase)
                is_last = region == [*prices][-1]
                word = self._await_fewest(region, purchase, is_last=is_last, on_progress=on_progress)
                if word is None:
                    on_progress(NodeProgress(name=region, message="ready"))
                    return
                launch = replace(launch, no_capacity=word)
                del facts["region"]
            if launch.no_capacity is None:
                hint = f"; {launch.hint}" if launch.hint else ""
                raise ClusterError(
                    f"the head in {region} could not be started: {launch.last_words}{hint}. The whole log is "
                    f"{_folder(self.name) / 'launch.log'}. Try again with forge cluster up, or give back what was "
                    f"rented: forge cluster down {self.name}"
                )
            on_progress(NodeProgress(name=region, message=f"no room: {launch.no_capacity}", is_failure=True))
            refusals.append(f"{region}: {launch.no_capacity}")
            left += self._leave(region, on_progress=on_progress)
        if not left:
            self._forget(facts=facts)
        raise ClusterError(
            f"no region has machines to rent now ({', '.join(refusals)}); try later, name more regions or "
            "instance_types, or raise the account's quota"
        )

    def _prices(self, names: Sequence[str], *, chosen: str | None, on_progress: OnProgress) -> dict[str, PriceOf]:
        """What machines cost, by region, the cheapest region first; only AWS can be asked for it."""
        spec, listed = self._spec, listed_price(self._spec)
        if spec.provider != "aws":
            return dict.fromkeys([chosen] if chosen else regions_of(spec), listed)
        on_progress(NodeProgress(name="aws", message="comparing prices"))
        found = [chosen] if chosen else aws.find_regions(spec, names=names)
        spot = aws.spot_prices(found, names=names) if spec.spot else {}
        return order_by_price(found, spot=spot, names=names, listed=listed)

    def _launch(
        self, region: str, purchase: InstancePlan, facts: dict[str, Any], *, on_progress: OnProgress
    ) -> Launch:
        spec, folder = self._spec, _folder(self.name)
        key = make_key(spec, folder=folder)
        site = RegionContext(
            region=region,
            key_file=key.file,
            public_key_file=key.public_file,
            public_key=key.public,
            token_file=str(token_path(self.name)),
        )
        make_token(self.name)
        allow_from = own_address() if spec.allow_from == "auto" else spec.allow_from
        if spec.provider == "aws":
            place = aws_network.prepare(spec, region=region, public_key=key.public, allow_from=allow_from)
            site = replace(site, **asdict(place))
        else:
            firewall.close_before(spec, allow_from=allow_from)
        launcher = self._launcher(region, on_progress=on_progress)
        installed = plan_install(spec, folder=folder)
        facts["python"] = installed.python
        launcher.write(dump_plain(render(spec, purchase=purchase, site=site, installed=installed)))
        (folder / "known_hosts").unlink(missing_ok=True)  # a new machine, where another may have been before
        launch = launcher.run("up", "--yes", "--no-config-cache", timeout_s=spec.startup_timeout)
        if launch.is_done and spec.provider != "aws":
            firewall.close_after(spec, allow_from=allow_from)
        return launch

    def _settle(self, facts: dict[str, Any], *, region: str, purchase: InstancePlan) -> None:
        """Remember where the head is, and what each kind of machine costs there."""
        facts["region"] = region
        self._head_address = None
        facts["prices"] = {offer.node_type: offer.usd_per_hour for offer in purchase.workers}
        facts["prices"][HEAD] = purchase.head.usd_per_hour
        if self._spec.provider == "aws":
            head = aws.list_instances(self.name, region=region)[0]
            facts["address"], facts["private_address"] = head.address, head.private_address
        else:
            launcher = self._launcher(region, on_progress=lambda stage: None)
            facts["address"] = facts["private_address"] = head_ops.head_address(launcher)
        self._remember(facts)

    def _await_fewest(
        self, region: str, purchase: InstancePlan, *, is_last: bool, on_progress: OnProgress
    ) -> str | None:
        """Ask for the fewest workers, and wait until the cloud has begun with them, if it can be asked.

        Returns: the cloud's word for it, if it has no room for them and another region might.
        """
        fewest = purchase.min_workers
        if fewest == 0:
            return None
        head_ops.ask_for_workers(self.on_head, count=fewest)
        if self._spec.provider != "aws" or is_last:
            return None  # Ray's autoscaler goes on to ask for them
        on_progress(NodeProgress(name=region, message=f"waiting for {fewest} workers"))
        deadline = time.monotonic() + _ROOM_TIMEOUT_S + _ROOM_TIMEOUT_PER_TYPE_S * len(purchase.workers)
        while time.monotonic() < deadline:
            found = aws.list_instances(self.name, region=region)
            if sum(instance.kind == "worker" for instance in found) >= fewest:
                return None
            time.sleep(_POLL_S)
        return head_ops.refusal_of_workers(self.on_head)

    def _leave(self, region: str, *, on_progress: OnProgress) -> list[str]:
        """Give back all that is in a region. Returns: what stays."""
        on_progress(NodeProgress(name=region, message="ending its machines"))
        if self._spec.provider == "aws":
            left = [f"machine {id} in {region}" for id in aws.terminate_all(self.name, region=region)]
            left += aws_network.remove_place(self.name, region=region) if not left else []
        else:
            head_ops.end_all(self._spec, self._launcher(region, on_progress=on_progress))
            firewall.open_again(self._spec)
            left = []
        on_progress(
            NodeProgress(name=region, message="gone" if not left else "not all is gone", is_failure=bool(left))
        )
        return left

    def _seen_by_ray(self) -> tuple[list[ClusterNode], tuple[str, ...]]:
        """The machines by Ray's word, and the runs. Raises: ClusterError if it does not answer."""
        with self.job_server() as url:
            return ray_nodes(url, token=self.token(), prices={}), tuple(ray_runs(url, token=self.token()))

    def _answers(self) -> bool:
        """Whether the head is there, and Ray on it well."""
        with suppress(ClusterError):
            address = f"{self._fact('private_address')}:6379"
            ask = ["python", "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
            return self.on_head(ask, timeout_s=_HEALTH_TIMEOUT_S).returncode == 0
        return False

    def _head(self) -> SshHost:
        if self._head_address is None:
            self._head_address = self._fact("address")
        return SshHost(
            host=self._head_address,
            known_hosts=_folder(self.name) / "known_hosts",
            user=user_of(self._spec),
            identity_file=self._spec.identity_file or str(_folder(self.name) / "key"),
        )

    def _fact(self, name: str) -> str:
        """What is remembered of a cluster that is up. Raises: ClusterError if it is not."""
        record = read_record(self.name)
        fact = record.state.get(name) if record is not None else None
        if fact is None:
            raise ClusterError(f"the cluster '{self.name}' is not up; start it: forge cluster up FILE")
        return str(fact)

    def _launcher(self, region: str, *, on_progress: OnProgress) -> Launcher:
        return Launcher(
            folder=_folder(self.name), on_news=lambda news: on_progress(NodeProgress(name=region, message=news))
        )

    def _remember(self, facts: dict[str, Any]) -> None:
        write_record(
            ClusterRecord(name=self.name, provider=self._spec.provider, spec=self._plain_spec(), state=facts)
        )

    def _plain_spec(self) -> dict[str, Any]:
        return self._spec.model_dump(mode="json", exclude_unset=True)

    def _forget(self, *, facts: Mapping[str, Any]) -> None:
        if self._spec.provider == "aws" and facts.get("tried"):
            aws_network.remove_profiles(self.name)
        shutil.rmtree(_folder(self.name), ignore_errors=True)
        delete_state(self.name)


def _folder(name: str) -> Path:
    """What is kept of a cluster here, besides its record and its token: key, launch file, log."""
    return state_folder(f"clusters/{name}.d")

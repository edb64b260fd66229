"""Times of clusters: to start one, to query its status, and to the first output of a submitted run.

    python -m benchmarks.cluster --json FILE

`local_up`: forge cluster up on this machine, and a bare `ray start` with the same options. `ssh_up`: four machines,
and one (network namespaces with sshd, with an existing environment). `submission`: `forge train --cluster` to the
first line of its job, and `ray job submit` of a command that prints a word. All take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.program import FORGE, running
from benchmarks.report import Measured, benchmark_parser, parse_options, print_table, write_json
from forge.cluster.ssh.provider import SshCluster
from forge.config.cluster import SshSpec
from forge.process import free_port
from tests.support.hosts import Hosts, can_make_hosts
from tests.support.sshd import client_key, start_sshd

RAY = str(Path(sys.executable).with_name("ray"))
NUM_MACHINES = 4
_JOB = """\
name: bench
model: {architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2}
data: {source: python-stdlib, seq_len: 64, tokenizer: {vocab_size: 512}}
training: {total_steps: 20, global_batch_size: 4, optimizer: {lr: 1.0e-2}}
resources: {workers: 1, gpu: none}
tracking: {wandb: {mode: disabled}}
"""


def main() -> None:
    """Measure all, `--repeats` times, in turn."""
    options = parse_options(benchmark_parser(__doc__), smallest={})  # without machines reached by ssh
    with tempfile.TemporaryDirectory(prefix="forge-bench-", ignore_cleanup_errors=True) as name:
        os.environ |= {"FORGE_STATE": f"{name}/state", "RAY_AUTH_MODE": "token"}
        times: dict[str, list[float]] = {"ray start": [], "forge cluster up": [], "status, local": []}
        for _ in range(options.repeats):
            times["ray start"].append(bare_start(Path(name)))
            up_s, status_s = local_up()
            times["forge cluster up"].append(up_s)
            times["status, local"].append(status_s)
        if can_make_hosts() and not options.smallest:
            times |= machines(Path(name), repeats=options.repeats)
    measured = {what: Measured(values=tuple(values)) for what, values in times.items()}
    print_table(
        "Clusters",
        header=["what", "seconds: median [range]"],
        rows=[[what, values.text(".2f")] for what, values in measured.items()],
    )
    median = {what: values.median for what, values in measured.items()}
    figures: dict[str, object] = {
        "local_up_ratio": median["forge cluster up"] / median["ray start"],
        "status_s": max(value for what, value in median.items() if what.startswith("status")),
        "all_s": times,
    }
    if "up, 4 machines" in median:
        figures["ssh_up_ratio"] = median["up, 4 machines"] / median["up, 1 machine"]
        figures["submission_s"] = median["submission"]
        figures["ray_job_submit_s"] = median["ray job submit"]
    write_json(options.json, figures=figures)
    for key, value in figures.items():
        if isinstance(value, float):
            print(f"{key}: {value:.2f}")


def bare_start(folder: Path) -> float:
    """Run Ray's own command with forge's options, then end its processes and no other Ray's."""
    temporary = tempfile.mkdtemp(prefix="fb", dir="/tmp")
    command = [RAY, "start", "--head", "--port", str(free_port()), "--include-dashboard", "true"]
    command += ["--dashboard-host", "127.0.0.1", "--dashboard-port", str(free_port()), "--disable-usage-stats"]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--temp-dir", temporary]
    command += ["--object-store-memory", str(128 * 2**20)]
    began = time.monotonic()
    with running(command, folder=folder) as program:
        if program.process.wait():
            raise RuntimeError(f"ray start failed:\n{program.last_words()}")
        return time.monotonic() - began


def local_up() -> tuple[float, float]:
    """Start forge's local cluster. Returns: seconds until it is up, and of one status query."""
    try:
        up_s = timed([FORGE, "cluster", "up"])
        return up_s, timed([FORGE, "cluster", "status"])
    finally:
        subprocess.run([FORGE, "cluster", "down"], check=True, capture_output=True)


def timed(command: list[str]) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began


def machines(folder: Path, *, repeats: int) -> dict[str, list[float]]:
    """Measure machines reached by ssh: up with one and with four, status, submission."""
    times: dict[str, list[float]] = {"up, 1 machine": [], "up, 4 machines": [], "status, ssh": []}
    times |= {"ray job submit": [], "submission": []}
    (folder / "job.yaml").write_text(_JOB)
    subprocess.run([FORGE, "plan", str(folder / "job.yaml")], check=True, capture_output=True, cwd=folder)
    with Hosts(NUM_MACHINES) as hosts:
        for host in range(NUM_MACHINES):
            start_sshd(hosts, host)
        for _ in range(repeats):
            with up(hosts, folder, count=1) as (_, seconds, _name):
                times["up, 1 machine"].append(seconds)
            with up(hosts, folder, count=NUM_MACHINES) as (cluster, seconds, name):
                times["up, 4 machines"].append(seconds)
                times["status, ssh"].append(timed([FORGE, "cluster", "status", name]))
                times["ray job submit"].append(bare_submission(cluster))
                times["submission"].append(submission(cluster, folder))
    return times


@contextlib.contextmanager
def up(hosts: Hosts, folder: Path, *, count: int) -> Iterator[tuple[SshCluster, float, str]]:
    """Start a cluster of some machines with the user's command, and time it."""
    spec = SshSpec(
        name=f"bench-{count}",
        provider="ssh",
        machines=tuple(hosts.ip(host) for host in range(count)),
        user="root",
        identity_file=str(client_key(hosts)),
        python=sys.executable,
        folder=str(hosts.folder / "forge"),
        storage=str(hosts.folder / "shared"),
    )
    file = folder / f"{spec.name}.yaml"
    settings = spec.model_dump(mode="json", exclude_unset=True)
    file.write_text("\n".join(f"{key}: {json.dumps(value)}" for key, value in settings.items()))
    try:
        yield SshCluster(spec), timed([FORGE, "cluster", "up", str(file)]), spec.name
    finally:
        subprocess.run([FORGE, "cluster", "down", spec.name], check=True, capture_output=True)


def bare_submission(cluster: SshCluster) -> float:
    """Time Ray's own command to the first line of the job."""
    with cluster.job_server() as url:
        env = os.environ | {"RAY_AUTH_TOKEN": cluster.token(), "RAY_ADDRESS": url}
        began = time.monotonic()
        command = [RAY, "job", "submit", "--", "echo", "first-line"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() == "first-line":
                    return time.monotonic() - began
    raise RuntimeError("the job said nothing")


def submission(cluster: SshCluster, folder: Path) -> float:
    """Time `forge train --cluster` to the first line of the job, with the corpus already on the cluster."""
    command = [FORGE, "train", str(folder / "job.yaml"), "--cluster", cluster.name]
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=folder
    ) as client:
        assert client.stderr is not None
        for line in client.stderr:
            if "driver: process" in line:
                break
        else:
            raise RuntimeError("the driver of the job was not named")
        seconds = time.monotonic() - began
        client.send_signal(signal.SIGINT)
        client.communicate()
    return seconds


if __name__ == "__main__":
    main()

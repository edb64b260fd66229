"""Run Ray's own cluster launcher, unchanged, in a subprocess with a log file.

A launch succeeds, fails for lack of capacity, which another region may have, or fails otherwise. The launcher never
outlives this process; machines that it started have the cluster's tag, so that `down` finds them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forge.errors import ClusterError, printable
from forge.process import die_with_parent

_POLL_S = 0.1
_END_TIMEOUT_S = 10.0

_CAPACITY_ERRORS = re.compile(
    # EC2 API reference, "Error codes"
    r"(InsufficientInstanceCapacity|InsufficientHostCapacity|InsufficientCapacity|MaxSpotInstanceCountExceeded"
    r"|SpotMaxPriceTooLow|VcpuLimitExceeded|InstanceLimitExceeded|InsufficientFreeAddressesInSubnet|Unsupported"
    # Compute Engine documentation, "Troubleshooting resource availability errors", "Allocation quotas"
    r"|ZONE_RESOURCE_POOL_EXHAUSTED(?:_WITH_DETAILS)?|QUOTA_EXCEEDED|quotaExceeded"
    # Azure documentation, "Resolve errors for SKU not available", "Troubleshoot allocation failures"
    r"|SkuNotAvailable|AllocationFailed|ZonalAllocationFailed|OverconstrainedAllocationRequest|QuotaExceeded"
    r"|OperationNotAllowed)\b"
)
"""The clouds' error codes for an instance type that is not available, or whose quota is used up."""

_HINTS = {
    r"No module named '(googleapiclient|google\b)": "pip install google-api-python-client google-auth",
    r"No module named '(azure|msrest)": "pip install azure-cli-core azure-identity azure-mgmt-compute "
    "azure-mgmt-network azure-mgmt-resource azure-common msrestazure",
    r"No module named 'boto": "pip install 'forge-train[aws]'",
    r"DefaultCredentialsError|default credentials were not found": "set up credentials: "
    "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    r"AzureCliCredential|az login|CredentialUnavailable": "set up credentials: az login",
    r"rsync: (command )?not found|No such file or directory: 'rsync'": "install rsync on this machine",
    r"wait_ready timeout exceeded|SSH still not available": "the machine could not be reached by ssh in time: "
    "does allow_from cover this machine's address, and is `user` the image's user?",
}
"""What to do about errors of Ray's launcher."""

_STEPS = {
    "environment settings": "asking the cloud",
    "Acquiring an up-to-date head node": "renting the head",
    "Launched a new head node": "the head starts",
    "Waiting for SSH": "waiting for ssh",
    "Processing file mounts": "copying files",
    "Running setup commands": "installing",
    "Starting the Ray runtime": "starting Ray",
}
"""Progress messages by what Ray's launcher prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchResult:
    """How a run of the launcher ended."""

    is_done: bool
    capacity_error: str | None = None
    """The cloud's error code, if the instance type is not available or its quota is used up."""
    output: str = ""
    """The last lines of its output, those about errors if it failed."""
    hint: str = ""
    """What to do, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RayLauncher:
    """Ray's launcher with the file of one cluster."""

    folder: Path
    """For the file, the log and the launcher's temporary files."""
    report: Callable[[str], None]
    """Called with progress messages."""

    @property
    def file(self) -> Path:
        return self.folder / "launch.yaml"

    @property
    def log(self) -> Path:
        """The output of all its runs."""
        return self.folder / "launch.log"

    def write(self, text: str) -> None:
        """Write its file, readable by its owner only."""
        self.file.touch(mode=0o600)
        self.file.write_text(text, encoding="utf-8")

    def run(self, command: str, *options: str, timeout_s: float) -> LaunchResult:
        """Run `ray COMMAND FILE OPTIONS` to its end.

        Raises: ClusterError if it takes too long. On any exception, such as Ctrl-C, the launcher is ended first.
        """
        self.log.touch(mode=0o600)
        (self.folder / "tmp").mkdir(mode=0o700, exist_ok=True)
        start = self.log.stat().st_size
        environment = os.environ | {
            "TMPDIR": str(self.folder / "tmp"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "1",
            "AUTOSCALER_NODE_START_WAIT_S": f"{timeout_s:.0f}",
            "PYTHONUNBUFFERED": "1",
        }
        parent = os.getpid()
        with self.log.open("a") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), command, str(self.file), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that Ctrl-C reaches only this process
                preexec_fn=lambda: die_with_parent(parent, signal_number=signal.SIGTERM),
            )
        try:
            self._follow(process, start=start, timeout_s=timeout_s)
        except BaseException:
            _end(process)
            raise
        return parse_result(process.returncode, output=_read(self.log, start))

    def _follow(self, process: subprocess.Popen[bytes], *, start: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        shown = ""
        while process.poll() is None:
            step = current_step(_read(self.log, start))
            if step and step != shown:
                self.report(step)
                shown = step
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray's launcher did not finish within {timeout_s:.0f} s; its last step: {shown or 'none'}; "
                    f"its log is {self.log}. Allow more time with startup_timeout in the cluster file"
                )
            time.sleep(_POLL_S)


def current_step(text: str) -> str:
    """The last step that Ray's launcher has printed; empty if none."""
    found = {text.rfind(words): step for words, step in _STEPS.items()}
    last = max(found)
    return found[last] if last >= 0 else ""


def find_capacity_error(text: str) -> str | None:
    """The first of the clouds' capacity error codes in a text; None if there is none."""
    found = _CAPACITY_ERRORS.search(text)
    return found[1] if found else None


def parse_result(code: int, *, output: str) -> LaunchResult:
    """Read how a run of Ray's launcher ended from its exit code and output."""
    lines = [plain for line in output.splitlines() if (plain := printable(line.strip(), limit=300))]
    if code == 0:
        return LaunchResult(is_done=True, output=lines[-1] if lines else "")
    errors = [line for line in lines if re.search(r"error|exception|failed|denied|timeout", line, re.IGNORECASE)]
    hint = next((hint for words, hint in _HINTS.items() if re.search(words, output)), "")
    return LaunchResult(
        is_done=False,
        capacity_error=find_capacity_error(output),
        output=" / ".join((errors or lines)[-3:]) or "it printed nothing",
        hint=hint,
    )


def _read(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and its children: its ssh and rsync are in its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)

"""Ray's own cluster launcher, run unchanged as a process of its own, with what it says in a log file.

A launch ends well, for want of machines, which another region may have, or badly. The launcher never
outlives this process, and whatever it started meanwhile bears the cluster's tag, so that `down` finds it.
"""

from __future__ import annotations

import contextlib
import ctypes
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

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
_END_TIMEOUT_S = 10.0

_NO_CAPACITY = re.compile(
    # EC2 API reference, "Error codes"
    r"(InsufficientInstanceCapacity|InsufficientHostCapacity|InsufficientCapacity|MaxSpotInstanceCountExceeded"
    r"|SpotMaxPriceTooLow|VcpuLimitExceeded|InstanceLimitExceeded|InsufficientFreeAddressesInSubnet|Unsupported"
    # Compute Engine documentation, "Troubleshooting resource availability errors", "Allocation quotas"
    r"|ZONE_RESOURCE_POOL_EXHAUSTED(?:_WITH_DETAILS)?|QUOTA_EXCEEDED|quotaExceeded"
    # Azure documentation, "Resolve errors for SKU not available", "Troubleshoot allocation failures"
    r"|SkuNotAvailable|AllocationFailed|ZonalAllocationFailed|OverconstrainedAllocationRequest|QuotaExceeded"
    r"|OperationNotAllowed)\b"
)
"""What the clouds say where there is no machine of the kind to be had, or no more are allowed."""

_HINTS = {
    r"No module named '(googleapiclient|google\b)": "pip install google-api-python-client google-auth",
    r"No module named '(azure|msrest)": "pip install azure-cli-core azure-identity azure-mgmt-compute "
    "azure-mgmt-network azure-mgmt-resource azure-common msrestazure",
    r"No module named 'boto": "pip install 'forge-train[aws]'",
    r"DefaultCredentialsError|default credentials were not found": "give credentials: "
    "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
    r"AzureCliCredential|az login|CredentialUnavailable": "give credentials: az login",
    r"rsync: (command )?not found|No such file or directory: 'rsync'": "install rsync on this machine",
    r"wait_ready timeout exceeded|SSH still not available": "the machine did not let anybody in by ssh in time: "
    "does allow_from cover this machine's address, and is `user` the image's?",
}
"""What to do about what Ray's launcher may say."""

_STAGES = {
    "environment settings": "asking the cloud",
    "Acquiring an up-to-date head node": "renting the head",
    "Launched a new head node": "the head starts",
    "Waiting for SSH": "waiting for ssh",
    "Processing file mounts": "copying files",
    "Running setup commands": "installing",
    "Starting the Ray runtime": "starting Ray",
}
"""News, by the words of Ray's launcher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How it went."""

    is_done: bool
    no_capacity: str | None = None
    """The cloud's word for it, if it has no such machine, or allows no more of them."""
    last_words: str = ""
    hint: str = ""
    """What to do, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Ray's launcher with one cluster's file."""

    folder: Path
    """Of the file, the log, and what the launcher writes meanwhile."""
    on_news: Callable[[str], None]

    @property
    def file(self) -> Path:
        """What it reads."""
        return self.folder / "launch.yaml"

    @property
    def log(self) -> Path:
        """What it said, of all its runs."""
        return self.folder / "launch.log"

    def write(self, text: str) -> None:
        """Write its file, for the user alone."""
        self.file.touch(mode=0o600)
        self.file.write_text(text, encoding="utf-8")

    def run(self, command: str, *options: str, timeout_s: float) -> Launch:
        """Run `ray COMMAND FILE OPTIONS` to its end.

        Raises: ClusterError if it takes too long. Ctrl-C goes on to the caller; the launcher has ended by then.
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
        with self.log.open("a") as output:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), command, str(self.file), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's to handle
                preexec_fn=_end_with_parent,
            )
        try:
            self._follow(process, start=start, timeout_s=timeout_s)
        except BaseException:
            _end(process)
            raise
        return judge(process.returncode, output=_read(self.log, start))

    def _follow(self, process: subprocess.Popen[bytes], *, start: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        told = ""
        while process.poll() is None:
            news = news_of(_read(self.log, start))
            if news and news != told:
                self.on_news(news)
                told = news
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"Ray's launcher was not done within {timeout_s:.0f} s, last: {told or 'silent'}; its log is "
                    f"{self.log}. startup_timeout in the cluster file allows more"
                )
            time.sleep(_POLL_S)


def _end_with_parent() -> None:
    """The launcher is told to end when this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def news_of(text: str) -> str:
    """The newest stage that Ray's launcher has told; empty if none."""
    found = {text.rfind(words): stage for words, stage in _STAGES.items()}
    place = max(found)
    return found[place] if place >= 0 else ""


def no_capacity(text: str) -> str | None:
    """A cloud's word for having no such machine, or allowing no more; None if it is not in the text."""
    found = _NO_CAPACITY.search(text)
    return found[1] if found else None


def judge(code: int, *, output: str) -> Launch:
    """How a run of Ray's launcher went, by its exit code and what it said."""
    lines = [plain for line in output.splitlines() if (plain := printable(line.strip(), limit=300))]
    if code == 0:
        return Launch(is_done=True, last_words=lines[-1] if lines else "")
    telling = [line for line in lines if re.search(r"error|exception|failed|denied|timeout", line, re.IGNORECASE)]
    hint = next((hint for words, hint in _HINTS.items() if re.search(words, output)), "")
    return Launch(
        is_done=False,
        no_capacity=no_capacity(output),
        last_words=" / ".join((telling or lines)[-3:]) or "it said nothing",
        hint=hint,
    )


def _read(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the launcher and what it runs: ssh and rsync are of its session's group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_TIMEOUT_S)

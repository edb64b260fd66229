"""vLLM's own server as a child process of a replica, in vLLM's environment.

It listens on a Unix socket in a folder of this user alone. It sends no usage statistics, asks no hub for a model,
and never executes code of the model's folder. It ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from forge.environment import child_environment
from forge.errors import ClusterError, printable
from forge.fs import default_cache_dir
from forge.limits import usable_cpus
from forge.process import ending, open_log

MODEL = "model"
"""The name of the model itself in requests to vLLM; those of adapters begin with `ADAPTER`."""
ADAPTER = "adapter:"
VLLM_MODULE = "vllm.entrypoints.launchers.api_server.entry"
"""What `vllm serve` runs; that command itself does not find its version in the CPU build."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Source: vllm.config.lora, MaxLoRARanks, version 0.32.0."""
_POLL_S = 0.2
_ANSWER_S = 5.0
_END_S = 20.0
_GRACE_S = 15.0
"""How long vLLM's processes may take to end by themselves."""
_REASON = re.compile(r"\b[A-Za-z]*(?:Error|Exception): ")
_SUPERVISE = """
import ctypes, os, signal, subprocess, sys, time
parent, grace_s, me = int(sys.argv[1]), float(sys.argv[2]), os.getpid()

def end_with(parent):
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)

def end_group(group):
    deadline = time.monotonic() + grace_s
    try:
        os.killpg(group, signal.SIGTERM)
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass

end_with(parent)
server = subprocess.Popen(
    [sys.executable, *sys.argv[3:]], start_new_session=True, preexec_fn=lambda: end_with(me)
)
reading, writing = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.close(writing)
    os.read(reading, 1)
    end_group(server.pid)
    os._exit(0)
os.close(reading)
signal.signal(signal.SIGTERM, lambda *_: server.terminate())
code = server.wait()
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(me, -code)
sys.exit(code)
"""
"""Runs vLLM's server in a process group of its own, and ends the whole group with the replica or with the server:
vLLM's other processes outlive a server that is killed. Ray kills the children of a replica without warning, so a
second process waits for the end of this one, which closes a pipe, and ends the group.

It is a script because vLLM's environment has no forge. Source: prctl(2), PR_SET_PDEATHSIG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmInstall:
    """An environment with vLLM."""

    python: Path
    version: str
    is_cuda: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOptions:
    """What one vLLM server serves, and how."""

    install: VllmInstall
    model: Path
    """A folder of transformers."""
    dtype: str
    """`float32` or `bfloat16`."""
    max_length: int
    max_rows: int
    cache_bytes: int | None
    """Of keys and values; None: the share of the GPU's memory that vLLM takes by itself."""
    log: Path
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of peft."""
    max_rank: int = 0
    """Largest rank of the adapters."""

    def arguments(self, address: str) -> list[str]:
        """The arguments of vLLM's server."""
        words = ["--model", str(self.model), "--uds", address, "--served-model-name", MODEL]
        words += ["--dtype", self.dtype, "--max-model-len", str(self.max_length)]
        words += ["--max-num-seqs", str(self.max_rows), "--enable-prompt-tokens-details"]
        words += ["--disable-uvicorn-access-log", "--generation-config", "vllm"]
        if self.cache_bytes is not None:
            words += ["--kv-cache-memory-bytes", str(self.cache_bytes)]
        if shutil.which("g++") is None and not self.install.is_cuda:  # without a compiler torch.compile fails
            words.append("--enforce-eager")
        if self.adapters:
            rank = next((rank for rank in _RANKS if rank >= self.max_rank), _RANKS[-1])
            words += ["--enable-lora", "--max-loras", str(len(self.adapters)), "--max-lora-rank", str(rank)]
            words += ["--lora-modules", *(f"{ADAPTER}{name}={path}" for name, path in self.adapters.items())]
        return words


class VllmProcess:
    """A running vLLM server.

    Raises: ClusterError with vLLM's own reason if it does not become ready.
    """

    def __init__(self, options: VllmOptions) -> None:
        self._options = options
        self._folder = Path(tempfile.mkdtemp(prefix="forge-vllm-"))  # only this user can enter it
        self.address = str(self._folder / "api.sock")
        self._process = self._start()
        try:
            self._await_ready()
        except BaseException:
            self.close()
            raise

    def error(self) -> str | None:
        """Why it does not serve any more; None while it does."""
        code = self._process.poll()
        return None if code is None else f"vLLM ended with {ending(code)}: {self._reason()}"

    def close(self) -> None:
        """End it; `_SUPERVISE` ends its workers."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> subprocess.Popen[bytes]:
        options = self._options
        python = str(options.install.python)
        command = [python, "-I", "-c", _SUPERVISE, str(os.getpid()), str(_GRACE_S)]
        command += ["-m", VLLM_MODULE, *options.arguments(self.address)]
        with os.fdopen(open_log(options.log), "ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env=_environment(options.install, folder=self._folder),
            )

    def _await_ready(self) -> None:
        while not _is_healthy(self.address):
            if (error := self.error()) is not None:
                raise ClusterError(f"{error}; its log is {self._options.log}")
            time.sleep(_POLL_S)

    def _reason(self) -> str:
        """The last line of the log that names an error, without what vLLM's logger puts before it."""
        with contextlib.suppress(OSError):
            lines = self._options.log.read_text(errors="replace")[-(2**16) :].splitlines()
            found = [line[match.start() :] for line in lines if (match := _REASON.search(line))]
            specific = [line for line in found if "Engine core initialization failed" not in line]
            return printable((specific or found or ["it names no error"])[-1].strip(), limit=300)
        return "its log cannot be read"


def _environment(install: VllmInstall, *, folder: Path) -> dict[str, str]:
    # The last two are settings of forge's engine, with which vLLM's threads would sleep between products.
    unwanted = ("PYTHON", "RAY_", "VLLM_", "VIRTUAL_ENV", "LD_PRELOAD", "GOMP_SPINCOUNT", "MKL_CBWR")
    found = {name: value for name, value in child_environment().items() if not name.startswith(unwanted)}
    found |= {"PYTHONUTF8": "1", "PATH": f"{install.python.parent}{os.pathsep}{found.get('PATH', os.defpath)}"}
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    found |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_RPC_BASE_PATH": str(folder)}
    found["VLLM_CACHE_ROOT"] = str(default_cache_dir() / "vllm" / "compiled")
    # Not bound to cores: other replicas, and other programs, share them.
    found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    found.setdefault("OMP_NUM_THREADS", str(usable_cpus()))
    return found


def _is_healthy(address: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_ANSWER_S)
        connection.connect(address)
        connection.sendall(b"GET /health HTTP/1.0\r\nHost: vllm\r\n\r\n")
        return connection.recv(64).split(maxsplit=2)[1:2] == [b"200"]
    return False

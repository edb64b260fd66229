"""Environment variables and folders that forge's own processes start with, wherever a user starts forge.

Variables of an outer Ray job, an outer W&B run or an odd locale would silently change what forge's processes do.
`child_environment` returns an environment without them; `adopt_environment` makes it this process's own. Which
variables have which effect is listed in docs/environments.md.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from forge.errors import ArgumentError, ClusterError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_FOREIGN = re.compile(
    # Of a Ray job or task that forge was started in: `ray.init` and `ray start` would take them as theirs.
    r"RAY_(ADDRESS|NAMESPACE|JOB_.*|CLIENT_.*|RAYLET_.*|RUNTIME_ENV_.*|WORKER_.*|NODE_.*|OVERRIDE_.*)"
    # Of a W&B run or sweep that forge was started in: the run would be recorded as part of it.
    r"|WANDB_(RUN_ID|RESUME|RESUME_.*|SWEEP_.*|SERVICE|RUN_NAME|DISABLED)|WANDB__SERVICE.*|_WANDB_.*"
)
LEAST_FILES = 512
"""Ray does not start with fewer open files."""
_LOOPBACK_TIMEOUT_S = 5.0
_USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""What `getpass.getuser` reads before /etc/passwd."""
_SOCKET_PATH_BYTES = 107
"""Source: unix(7), sun_path without its final NUL."""
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""What Ray appends to its folder, at the longest."""
_PLAIN = re.compile(r"/[A-Za-z0-9_./-]*")


_left_out: set[str] = set()
"""What `adopt_environment` has removed."""


def child_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a process of forge, or of Ray on this machine.

    - Requests to this machine do not go through a proxy; downloads still may.
    - Python imports nothing from the current folder, and reads and writes UTF-8 in any locale.
    - A user id without a name is its own name.
    - Ray's sockets are in a folder with a short path.
    - Variables of an outer Ray job or W&B run are left out.
    - Under `uv run`, Ray's workers use the interpreter that runs forge.
    """
    given = os.environ if environment is None else environment
    found = {name: value for name, value in given.items() if not _FOREIGN.fullmatch(name)}
    found |= {"PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
    # Otherwise Ray packs the current folder, and starts each worker by the same `uv run` in a copy of it.
    found["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
    if "PYTHONPATH" in found:  # an empty entry is the current folder
        found["PYTHONPATH"] = os.pathsep.join(filter(None, found["PYTHONPATH"].split(os.pathsep)))
    hosts = ",".join(found.get(name, "") for name in ("no_proxy", "NO_PROXY"))
    direct = ",".join(dict.fromkeys([*filter(None, map(str.strip, hosts.split(","))), *_LOOPBACK]))
    found |= {"no_proxy": direct, "NO_PROXY": direct}
    if not any(found.get(name) for name in _USER_NAMES) and not _has_name():
        found["USER"] = found["LOGNAME"] = str(os.getuid())
    if "RAY_TMPDIR" not in found and found.get("TMPDIR") and ray_folder_problem(found["TMPDIR"]) is not None:
        found["RAY_TMPDIR"] = "/tmp"
    return found


def foreign_variables() -> list[str]:
    """Names of this process's variables that belong to another Ray job or W&B run; forge ignores them."""
    return sorted({*_left_out, *filter(_FOREIGN.fullmatch, os.environ)})


def adopt_environment() -> None:
    """Give this process the environment of `child_environment`."""
    wanted = child_environment()
    _left_out.update(foreign_variables())
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)


def run_in_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if its locale cannot express every character.

    What its terminal cannot show is then replaced, rather than an error.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" == (sys.stdout.encoding or "").lower():
        return
    terminal = {"PYTHONIOENCODING": f"{sys.stdout.encoding or 'ascii'}:backslashreplace"}
    os.execve(sys.executable, sys.orig_argv, terminal | os.environ | {"PYTHONUTF8": "1"})


def home_folder() -> Path:
    """The user's home folder.

    Raises: ArgumentError if HOME is not set and the user id has no entry in /etc/passwd.
    """
    if home := os.environ.get("HOME"):
        return Path(home)
    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        raise ArgumentError(
            f"there is no home folder: HOME is not set, and user id {os.getuid()} has no entry in /etc/passwd; set "
            "HOME to a folder that this user can write"
        ) from None


def expand_home(path: str) -> str:
    """Replace `~` at the beginning of a path by the home folder, and `~name` by that of another user.

    Raises: ArgumentError if there is no such folder.
    """
    if not path.startswith("~"):
        return path
    user, slash, rest = path.partition("/")
    if user == "~":
        return str(home_folder()) + slash + rest
    try:
        return pwd.getpwnam(user[1:]).pw_dir + slash + rest
    except KeyError:
        raise ArgumentError(
            f"{path}: there is no user {user[1:]!r} on this machine; write './{path}' for a file of that name"
        ) from None


def looked_in(path: str | Path) -> str:
    """Return ` (looked in FOLDER)` for a message about a relative path that does not exist, else nothing."""
    with contextlib.suppress(OSError):  # the current folder was removed
        return "" if Path(path).is_absolute() or str(path).startswith("~") else f" (looked in {Path.cwd()})"
    return " (the current folder does not exist any more)"


def is_writable(path: Path) -> bool:
    """Whether files can be created in a folder, or in the nearest one above it that exists; tried, not asked."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(path)):
            return True
    except OSError:
        return False


def nearest_existing(path: Path) -> Path:
    """Return a path, or the nearest one above it that exists."""
    return next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))


def require_ray_folder() -> None:
    """Check the folder of Ray's sockets and logs on this machine. Raises: ClusterError that says what to set."""
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if folder := child_environment().get(name):
            break
    else:
        name, folder = "TMPDIR", "/tmp"
    problem = ray_folder_problem(folder)
    if problem is not None:
        raise ClusterError(f"Ray cannot run in the temporary folder {folder}: {problem}; set {name} to another")


def require_loopback() -> None:
    """Connect to this machine's loopback address, without which Ray would wait for minutes.

    Raises: ClusterError if that fails.
    """
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_TIMEOUT_S),
        ):
            return
    except OSError as error:
        raise ClusterError(
            f"this machine does not reach itself at 127.0.0.1: {error.strerror or error}; bring its loopback "
            "interface up: ip link set lo up"
        ) from error


def ray_folder_problem(folder: str) -> str | None:
    """What is wrong with a temporary folder for Ray; None if nothing is."""
    longest = _SOCKET_PATH_BYTES - len(_RAY_SOCKET)
    if len(os.fsencode(folder)) > longest:
        return f"its path has {len(os.fsencode(folder))} bytes, and a socket's path allows {longest} of them"
    if not _PLAIN.fullmatch(folder):
        return "it must be an absolute path of letters, digits and _ . / - only"
    if not Path(folder).is_dir():
        return "it is not a folder"
    return None if is_writable(Path(folder)) else "it cannot be written"


def _has_name() -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwuid(os.getuid()).pw_name)
    return False

"""OpenSSH's server on the hosts of a test network, with a key that root can log in with."""

from __future__ import annotations

import contextlib
import pwd
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.command import wait_for
from tests.support.hosts import Hosts

SSHD = "/usr/sbin/sshd"
LOGIN_SHELLS = ("tcsh", "fish", "bash")
START_UP_TEXT = "Welcome to this machine"
_START_UP_FILES = {"tcsh": ".tcshrc", "fish": ".config/fish/config.fish", "bash": ".bashrc"}
_CONFIG = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {keys}
PidFile {folder}/pid
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PermitRootLogin yes
MaxStartups 100
MaxSessions {max_sessions}
{environment}
"""


def client_key(hosts: Hosts) -> Path:
    """The private key that all hosts accept."""
    path = hosts.folder / "client_key"
    if not path.exists():
        _make_key(path)
    return path


def stranger_key(hosts: Hosts) -> Path:
    """A private key that no host accepts."""
    path = hosts.folder / "stranger_key"
    _make_key(path)
    return path


def start_sshd(
    hosts: Hosts,
    host: int,
    *,
    environment: Mapping[str, str] | None = None,
    private: Sequence[Path] = (),
    max_sessions: int = 10,
) -> None:
    """Start the server of one host, with the same host key each time; return when it listens.

    Args:
        environment: variables of the sessions there.
        private: folders that are empty there at first, and not shared with other hosts.
        max_sessions: of a connection.
    """
    folder = hosts.folder / f"sshd-{host}"
    folder.mkdir(exist_ok=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    if not (folder / "host_key").exists():
        _make_key(folder / "host_key")
    settings = " ".join(f'"{name}={value}"' for name, value in (environment or {}).items())
    (folder / "config").write_text(
        _CONFIG.format(
            folder=folder,
            keys=client_key(hosts).with_suffix(".pub"),
            max_sessions=max_sessions,
            environment=f"SetEnv {settings}" if settings else "",
        )
    )
    (folder / "log").unlink(missing_ok=True)
    for path in private:
        path.mkdir(parents=True, exist_ok=True)
    server = [SSHD, "-D", "-f", str(folder / "config"), "-E", str(folder / "log")]
    mounts = [f"mount -t tmpfs none {path}" for path in private]  # in the mount namespace that `ip` has created
    hosts.run(host, "/bin/sh", "-c", " && ".join([*mounts, f"exec {shlex.join(server)}"]))
    wait_for(lambda: _listens(folder), timeout_s=10)


def printing_home(folder: Path) -> Path:
    """Make a home whose start-up files print to both outputs, in each of `LOGIN_SHELLS`."""
    for name in _START_UP_FILES.values():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"echo '{START_UP_TEXT}'\nsh -c 'echo {START_UP_TEXT} >&2'\n")
    return folder


def use_login_shell(hosts: Hosts, host: int, shell: str) -> None:
    """Give root on a host one of `LOGIN_SHELLS`, with start-up files that print. Call it before `start_sshd`."""
    path = shutil.which(shell)
    assert path is not None, f"{shell} is not installed: tests/install_tools.sh"
    home = printing_home(hosts.folder / f"home-{host}")
    users = [user for user in pwd.getpwall() if user.pw_uid]
    lines = [f"root:x:0:0:root:{home}:{path}"]
    lines += [":".join(map(str, (*user[:6], user.pw_shell))) for user in users]
    hosts.write_etc(host, {"passwd": "\n".join([*lines, ""])})


@contextlib.contextmanager
def another_host_key(hosts: Hosts, host: int) -> Iterator[None]:
    """Servers started in this context have another host key, as on a reinstalled host."""
    folder = hosts.folder / f"sshd-{host}"
    kept = {path: path.read_bytes() for path in folder.glob("host_key*")}
    for path in kept:
        path.unlink()
    yield
    for path, content in kept.items():
        path.write_bytes(content)


def _listens(folder: Path) -> bool:
    log = folder / "log"
    return log.exists() and "Server listening" in log.read_text()


def _make_key(path: Path) -> None:
    path.unlink(missing_ok=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)

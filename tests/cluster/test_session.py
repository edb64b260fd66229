"""SshHost: commands over ssh, and the explanation of OpenSSH's errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from forge.cluster.ssh.session import SshHost
from forge.errors import ClusterError


def ssh_host(tmp_path: Path, host: str, **options: object) -> SshHost:
    return SshHost(host=host, known_hosts=tmp_path / "known_hosts", **options)  # type: ignore[arg-type]


def test_run__unknown_host_name__is_explained(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nobody\.invalid cannot be reached: .*resolve"):
        ssh_host(tmp_path, "nobody.invalid").run(["true"])


def test_run_and_forward__closed_port__are_explained(tmp_path: Path, closed_port: int) -> None:
    with pytest.raises(ClusterError, match=r"cannot be reached: .*Connection refused"):
        ssh_host(tmp_path, "127.0.0.1", port=closed_port).run(["true"])
    with (
        pytest.raises(ClusterError, match="cannot be reached"),
        ssh_host(tmp_path, "127.0.0.1", port=closed_port).forward(1),
    ):
        pytest.fail("it was reached")


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        (
            b"h: Permission denied (publickey).",
            "SSH authentication to h failed with any of your keys: .*by hand",
        ),
        (b"WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.", "ssh-keygen -R"),
        (
            b"Permissions 0644 for 'k' are too open.\nWARNING: UNPROTECTED PRIVATE KEY FILE!\nh: Permission denied",
            "chmod 600",
        ),
        (b"ssh: connect to host h port 22: Connection refused", "start its sshd"),
        (b"ssh: Could not resolve hostname h: Name or service not known", "correct it under machines"),
        (b"ssh: connect to host h port 22: No route to host", "No route to host; try it by hand: ssh -p 22 "),
        (b"", "no error message"),
    ],
)
def test_run__ssh_fails__says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: bytes, message: str
) -> None:
    ssh = tmp_path / "ssh"
    (tmp_path / "words").write_bytes(stderr)
    ssh.write_text(f"#!/bin/sh\ncat {tmp_path}/words >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=message):
        ssh_host(tmp_path, "h").run(["true"])


def test_run__identity_file_missing__names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'h: Permission denied (publickey).' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=r"to me@h failed: the key .*/gone does not exist here; correct"):
        ssh_host(tmp_path, "h", user="me", identity_file=str(tmp_path / "gone")).run(["true"])


@pytest.mark.parametrize("kill_on_disconnect", [False, True])
def test_run__command_fails__returns_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_on_disconnect: bool
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = ssh_host(tmp_path, "h").run(
        ["sh", "-c", "cat; echo $0 two  words; exit 3", "it's"], stdin=b"in ", kill_on_disconnect=kill_on_disconnect
    )
    assert (done.returncode, done.stdout) == (3, b"in it's two words\n")


def test_run__ssh_not_installed__says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="install OpenSSH's client"):
        ssh_host(tmp_path, "h").run(["true"])


def test_run__no_answer__times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexec sleep 30\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match="did not answer within 1 s"):
        ssh_host(tmp_path, "h").run(["true"], timeout_s=1.0)


def test_ssh__options__are_accepted_by_openssh(tmp_path: Path) -> None:
    command = ssh_host(tmp_path, "h", user="me", port=2222, identity_file="~/k").ssh()
    assert command[-1] == "h"
    assert command[command.index("-l") : command.index("-l") + 2] == ["-l", "me"]
    assert f'IdentityFile="{Path("~/k").expanduser()}"' in command
    assert subprocess.run([*command[:1], "-G", *command[1:]], capture_output=True, check=False).returncode == 0

"""What OpenSSH says when it fails, in words that say what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from forge.cluster.ssh.session import SshHost
from forge.errors import ClusterError


def machine(tmp_path: Path, host: str, **options: object) -> SshHost:
    return SshHost(host=host, known_hosts=tmp_path / "known_hosts", **options)  # type: ignore[arg-type]


def test_a_name_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"nobody\.invalid cannot be reached: .*resolve"):
        machine(tmp_path, "nobody.invalid").run(["true"])


def test_a_port_where_nobody_listens(tmp_path: Path, closed_port: int) -> None:
    with pytest.raises(ClusterError, match=r"cannot be reached: .*Connection refused"):
        machine(tmp_path, "127.0.0.1", port=closed_port).run(["true"])
    with (
        pytest.raises(ClusterError, match="cannot be reached"),
        machine(tmp_path, "127.0.0.1", port=closed_port).forward(1),
    ):
        pytest.fail("it was reached")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (b"root@h: Permission denied (publickey).", "does not let you in with any key of yours: .*try it by hand"),
        (b"WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.", "ssh-keygen -R"),
        (
            b"Permissions 0644 for 'k' are too open.\nWARNING: UNPROTECTED PRIVATE KEY FILE!\nh: Permission denied",
            "chmod 600",
        ),
        (b"ssh: connect to host h port 22: Connection refused", "start its sshd"),
        (b"ssh: Could not resolve hostname h: Name or service not known", "correct it under machines"),
        (b"ssh: connect to host h port 22: No route to host", "No route to host; try it by hand: ssh -p 22 "),
        (b"", "it did not say why"),
    ],
)
def test_every_refusal_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: bytes, said: str
) -> None:
    ssh = tmp_path / "ssh"
    (tmp_path / "words").write_bytes(words)
    ssh.write_text(f"#!/bin/sh\ncat {tmp_path}/words >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=said):
        machine(tmp_path, "h").run(["true"])


def test_a_key_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\necho 'h: Permission denied (publickey).' >&2\nexit 255\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match=r"does not let me in: there is no key .*/gone here; name another"):
        machine(tmp_path, "h", user="me", identity_file=str(tmp_path / "gone")).run(["true"])


@pytest.mark.parametrize("ends_with_us", [False, True])
def test_a_command_that_fails_there_is_the_callers_to_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_with_us: bool
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    done = machine(tmp_path, "h").run(
        ["sh", "-c", "cat; echo $0 two  words; exit 3", "it's"], stdin=b"in ", ends_with_us=ends_with_us
    )
    assert (done.returncode, done.stdout) == (3, b"in it's two words\n")


def test_without_ssh_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterError, match="install OpenSSH's client"):
        machine(tmp_path, "h").run(["true"])


def test_a_machine_that_does_not_answer_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text("#!/bin/sh\nexec sleep 30\n")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match="did not answer within 1 s"):
        machine(tmp_path, "h").run(["true"], timeout_s=1.0)


def test_the_users_own_choices_are_handed_on(tmp_path: Path) -> None:
    command = machine(tmp_path, "h", user="me", port=2222, identity_file="~/k").ssh()
    assert command[-1] == "h"
    assert command[command.index("-l") : command.index("-l") + 2] == ["-l", "me"]
    assert str(Path("~/k").expanduser()) in command
    assert subprocess.run([*command[:1], "-G", *command[1:]], capture_output=True, check=False).returncode == 0

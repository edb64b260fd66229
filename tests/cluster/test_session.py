"""SshHost: commands over ssh, and the explanation of OpenSSH's errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from forge.cluster.ssh.bootstrap import probe
from forge.cluster.ssh.session import SshHost
from forge.errors import ClusterError
from tests.support.sshd import LOGIN_SHELLS, printing_home


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


@pytest.fixture(params=LOGIN_SHELLS)
def login_shell(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The program ssh hands its command to a login shell on this machine, whose start-up files print."""
    shell = shutil.which(request.param)
    if shell is None:
        pytest.skip(f"{request.param} is not installed")
    home = printing_home(tmp_path / "home")
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        f'exec env HOME={home} BASH_ENV={home}/.bashrc XDG_CONFIG_HOME={home}/.config {shell} -c "$last"\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return shell


@pytest.mark.parametrize("kill_on_disconnect", [False, True])
def test_run__other_login_shell__output_is_the_commands(
    tmp_path: Path, login_shell: str, kill_on_disconnect: bool
) -> None:
    words = ["it's", "a!b", "!!", "$HOME `id` *", "c\\d\n%e", "ü", '"', "~", ""]
    done = ssh_host(tmp_path, "h").run(
        ["sh", "-c", 'cat; printf "<%s>" "$@"; echo problem >&2; exit 3', "sh", *words],
        stdin=b"in ",
        kill_on_disconnect=kill_on_disconnect,
    )
    assert done.stdout.decode() == "in " + "".join(f"<{word}>" for word in words)
    assert (done.returncode, done.stderr) == (3, b"problem\n")


def test_probe__other_login_shell__reads_the_facts(tmp_path: Path, login_shell: str) -> None:
    facts = probe(ssh_host(tmp_path, "h"), folder=str(tmp_path / "it's !here"), python=sys.executable)
    assert facts["folder"] == str(tmp_path / "it's !here")
    assert facts["versions"]["ray"] == metadata.version("ray")


def test_run__login_shell_runs_no_command__says_what_it_must_do_without_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = tmp_path / "ssh"
    ssh.write_text(
        "#!/bin/sh\ncase \"$*\" in *' -M '*) exit 1; esac\n"
        "cat\necho 'This account is currently not available.'\nexit 1\n"
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ClusterError, match="login shell there ended with 1 and did not run") as raised:
        ssh_host(tmp_path, "h").run(["cat"], stdin=b"token-of-the-cluster")
    assert "token-of-the-cluster" not in str(raised.value)


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

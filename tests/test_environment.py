"""The environment of forge's own processes: proxies, folders, names, and variables of other runs."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forge.environment import (
    child_environment,
    expand_home,
    home_folder,
    is_writable,
    ray_folder_problem,
    require_loopback,
    require_ray_folder,
)
from forge.errors import ArgumentError, ClusterError


@pytest.fixture
def nameless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without a passwd entry, and no variable that says more."""

    def no_entry(_: object) -> None:
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


class TestChildEnvironment:
    @pytest.mark.parametrize(
        "given",
        [{"NO_PROXY": "a.org"}, {"no_proxy": "a.org"}, {"no_proxy": "", "NO_PROXY": "a.org"}],
    )
    def test_proxies__loopback_is_added_to_what_goes_direct(self, given: dict[str, str]) -> None:
        found = child_environment({"http_proxy": "http://proxy:3128"} | given)
        assert found["http_proxy"] == "http://proxy:3128"
        assert found["no_proxy"] == found["NO_PROXY"] == "a.org,127.0.0.1,localhost,::1"

    def test_variables_of_an_outer_run__are_left_out_and_settings_kept(self) -> None:
        outer = dict.fromkeys(
            ("RAY_ADDRESS", "RAY_JOB_ID", "RAY_RAYLET_PID", "WANDB_RUN_ID", "WANDB__SERVICE"), "1"
        )
        kept = dict.fromkeys(("RAY_AUTH_MODE", "RAY_TMPDIR", "RAY_task_retry_delay_ms", "WANDB_API_KEY"), "1")
        found = child_environment(outer | kept)
        assert not found.keys() & outer.keys()
        assert kept.items() <= found.items()

    def test_pythonpath__an_empty_entry__is_dropped(self) -> None:
        given = os.pathsep.join(["", "/mine", ""])
        assert child_environment({"PYTHONPATH": given})["PYTHONPATH"] == "/mine"

    @pytest.mark.usefixtures("nameless")
    def test_user_id_without_a_name__is_its_own_name(self) -> None:
        assert child_environment({})["USER"] == str(os.getuid())
        assert "USER" not in child_environment({"LOGNAME": "me"})

    def test_temporary_folder__too_long_for_a_socket__is_not_used_by_ray(self, tmp_path: Path) -> None:
        (long := tmp_path / ("x" * 90)).mkdir()
        assert child_environment({"TMPDIR": str(long)})["RAY_TMPDIR"] == "/tmp"
        assert "RAY_TMPDIR" not in child_environment({"TMPDIR": "/tmp"})


@pytest.mark.parametrize(
    "folder", ["/" + "x" * 90, "relative", "/no/such/folder", "/dev/null", "/tmp/a b", "/proc"]
)
def test_ray_folder_problem__unusable_folders__have_one(folder: str) -> None:
    assert ray_folder_problem(folder) is not None


def test_require_ray_folder__too_long__names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/" + "x" * 90)
    with pytest.raises(ClusterError, match=r"91 bytes.*set RAY_TMPDIR to another"):
        require_ray_folder()


class TestHome:
    @pytest.mark.usefixtures("nameless")
    def test_home_folder__no_variable_and_no_passwd_entry__says_what_to_set(self) -> None:
        with pytest.raises(ArgumentError, match="set HOME to a folder"):
            home_folder()

    def test_expand_home__own_and_another_users(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/me")
        assert expand_home("~/runs") == "/me/runs"
        assert expand_home("~") == "/me"
        assert expand_home("a/~/b") == "a/~/b"
        assert expand_home("~root/x") == pwd.getpwnam("root").pw_dir + "/x"
        with pytest.raises(ArgumentError, match="no user 'nosuchuser'"):
            expand_home("~nosuchuser/x")

    def test_is_writable__a_folder_that_root_may_not_write_either__is_not(self, tmp_path: Path) -> None:
        assert is_writable(tmp_path / "new" / "folder")
        assert not is_writable(Path("/proc/x"))


def test_require_loopback__it_is_down__says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    require_loopback()

    def unreachable(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ClusterError, match=r"Network is unreachable; .* ip link set lo up"):
        require_loopback()


def test_require_loopback__network_namespace_without_loopback__says_so() -> None:
    look = [sys.executable, "-c", "from forge.environment import require_loopback; require_loopback()"]
    apart = ["unshare", "--net"]
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a network namespace needs root")
    done = subprocess.run([*apart, *look], capture_output=True, text=True, timeout=20, check=False)
    assert "this machine does not reach itself at 127.0.0.1: Network is unreachable" in done.stderr


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LANG": "C"}])
def test_locale__not_utf8__prints_and_reads_every_character(tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "jöb.yaml").write_text("näme: ü\n", encoding="utf-8")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "forge.cli.app", "plan", "jöb.yaml"],
        cwd=tmp_path,
        env=plain | locale | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"n\\xe4me" in done.stderr, done.stderr
    assert b"Traceback" not in done.stderr


def test_child_environment__started_by_uv_run__rays_workers_are_not(tmp_path: Path) -> None:
    look = (
        "import ray._private.worker as worker; from ray._private.runtime_env import uv_runtime_env_hook as hook; "
        "print(bool(hook._get_uv_run_cmdline()), worker._maybe_modify_runtime_env({}, False))"
    )
    start = "import subprocess, sys; from forge.environment import child_environment as child; "
    start += f"subprocess.run([sys.executable, '-c', {look!r}], env=child(), check=True)"
    uv = Path(sys.executable).parent / "uv"
    done = subprocess.run(
        [uv, "run", "--offline", "--no-project", "--python", sys.executable, sys.executable, "-c", start],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True {}\n", done.stderr

"""`forge ui` on the command line: what it refuses before it listens, and a server of its own."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.errors import ArgumentError, ForgeError
from forge.serve.http.settings import require_certificate
from forge.ui import server
from tests.support.command import environment, start_forge
from tests.support.runs import make_run

TOKEN = "a-token-of-more-than-20-characters"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("missing", "is no folder"),
        (". --cluster nowhere", "not a cluster that was started from here"),
        (". --tls-cert x.pem", "belong together"),
        (". --tls-cert x.pem --tls-key y.pem", "--tls-cert x.pem cannot be read: No such file"),
        (". --tls-cert job.yaml --tls-key job.yaml", "cannot be used: "),
        (". --host 256.0.0.1 --port 0", "give an address of this machine"),
        (". --host 192.0.2.1 --port 0", "give an address of this machine"),
        (". --port 0 --allow-host https://forge.example", "is no name of a host: leave out scheme"),
        (". --port TAKEN", "choose another with --port"),
    ],
)
def test_ui__wrong_input__is_refused(
    words: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("name: mine\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["ui", *words.replace("TAKEN", port).split()])
    assert isinstance(done.exception, ForgeError)
    assert expected in str(done.exception)


@pytest.mark.parametrize(
    ("options", "expected"),
    [("-nodes", None), ("-passout pass:secret", "has a password; write it without: openssl pkey")],
)
def test_require_certificate__key_with_or_without_a_password__never_asks(
    options: str, expected: str | None, tmp_path: Path
) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -subj /CN=localhost -days 2"
    command += f" -keyout key.pem -out certificate.pem {options}"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    refused = contextlib.nullcontext() if expected is None else pytest.raises(ArgumentError, match=expected)
    with refused:
        require_certificate(tmp_path / "certificate.pem", tmp_path / "key.pem")


def test_ui__short_token__is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_UI_TOKEN", "short")
    done = CliRunner().invoke(app, ["ui", str(tmp_path), "--port", "0"])
    assert "20 or more" in str(done.exception)


def test_ui__packages_missing__names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "find_spec", lambda name: None if name == "uvicorn" else object())
    done = CliRunner().invoke(app, ["ui", str(tmp_path)])
    assert str(done.exception) == "forge ui needs uvicorn: pip install 'forge-train[serve]'"


def test_ui__on_other_addresses__prints_a_link_with_the_token_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    make_run(tmp_path / "runs", "mine")
    process = start_forge("ui", "--host", "0.0.0.0", "--port", "0", cwd=tmp_path)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        link = re.search(r"(http://127\.0\.0\.1:\d+)/login#(\S+)", line)
        assert link is not None
        with httpx.Client(base_url=link[1], trust_env=False) as client:
            assert client.get("/").status_code == 401
            page = client.get("/", headers={"Authorization": f"Bearer {link[2]}"})
            assert page.status_code == 200 and "forge" in page.text
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    assert "unencrypted" in process.stderr.read()


@pytest.mark.slow
def test_ui__token_of_the_environment__is_not_printed(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    process = start_forge("ui", "--port", "0", cwd=tmp_path, env=environment(tmp_path) | {"FORGE_UI_TOKEN": TOKEN})
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "http://" in line)
        url = line.split()[-1]
        assert url.endswith("/login") and TOKEN not in line
        answer = httpx.get(url.removesuffix("login"), headers={"Authorization": f"Bearer {TOKEN}"}, trust_env=False)
        assert answer.status_code == 200
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0

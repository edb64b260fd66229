"""Values of secrets are removed from text in every usual encoding; names decide what a secret is."""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import cast
from urllib.parse import quote, quote_plus

import pytest

from forge.process import open_log
from forge.redact import RedactingStream, is_credential, is_secret_variable, redacted, redacted_values

SECRET = 'wJalr/XUtn+FEMI"K7\\MDENG=é'
PEM = (
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQ\n"
    "Z7Xk3pQ9sLw0aYbT1uVcR5eNd2\n-----END PRIVATE KEY-----\n"
)
ACCOUNT = json.dumps({"type": "service_account", "private_key": PEM, "private_key_id": "0123456789abcdef"})


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "FSSPEC_S3_SECRET", "MINIO_SECRET_KEY", "PGPASSWORD",
     "DB_PASSWD", "my_secret", "GITHUB_PAT", "apikey", "AZURE_STORAGE_CONNECTION_STRING", "GOOGLE_CREDENTIALS",
     "SSH_PASSPHRASE", "GPG_KEY2", "SLACK_BOT_TOKEN", "AZURE_STORAGE_SAS_TOKEN", "SERVICE_AUTH", "DB_CREDS",
     "SMTP_PASS", "AWS_SESSION_TOKEN", "SENTRY_DSN", "NPM_TOKEN_1"],
)  # fmt: skip
def test_is_secret_variable__names_of_secrets__are_known(name: str) -> None:
    assert is_secret_variable(name) and is_credential(name)


@pytest.mark.parametrize(
    "name",
    ["HOME", "PWD", "OLDPWD", "TOKENIZER", "TOKENIZERS_PARALLELISM", "TOTAL_TOKENS", "NUM_TOKENS",
     "KEYBOARD_LAYOUT", "CORPUS", "TEAM", "AUTHOR", "PATH", "WANDB_PROJECT", "AWS_REGION", "COMPASS", "PASSES"],
)  # fmt: skip
def test_is_credential__other_names__are_not(name: str) -> None:
    assert not is_credential(name) and not is_secret_variable(name)


@pytest.mark.parametrize("name", ["AWS_PROFILE", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN_PATH"])
def test_is_credential__places_of_credentials__but_their_values_are_no_secrets(name: str) -> None:
    assert is_credential(name) and not is_secret_variable(name)


def written_forms(value: str) -> dict[str, str]:
    basic = base64.b64encode(f"user:{value}".encode()).decode()
    return {
        "raw": value,
        "json": json.dumps({"message": value}),
        "json in json": json.dumps({"message": value}, ensure_ascii=False),
        "repr": repr({"key": value}),
        "url": f"https://x/?key={quote(value, safe='')}&a=1",
        "url path": f"https://x/{quote(value)}/y",
        "form": f"key={quote_plus(value)}",
        "lower url": f"https://x/{quote(value, safe='').replace('%2F', '%2f').replace('%2B', '%2b')}",
        "base64": base64.b64encode(value.encode()).decode(),
        "urlsafe": base64.urlsafe_b64encode(value.encode()).decode(),
        "basic auth": f"Authorization: Basic {basic}",
        "hex": value.encode().hex(),
        "cut short": f"denied for {value[:20]}…",
    }


@pytest.mark.parametrize("form", written_forms(SECRET))
def test_redacted__every_form_of_a_secret__is_hidden(form: str) -> None:
    text = redacted(written_forms(SECRET)[form], {"MINIO_SECRET_KEY": SECRET, "HOME": "/home/me"})
    assert "***" in text
    for leaked in (SECRET[:12], quote(SECRET, safe="")[:14], json.dumps(SECRET)[1:14], SECRET.encode().hex()[:20]):
        assert leaked.lower() not in text.lower()
    encoded = base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert encoded[8:24] not in text


@pytest.mark.parametrize("line", PEM.splitlines())
@pytest.mark.parametrize("value", [PEM, ACCOUNT])
def test_redacted__single_line_of_a_secret__is_hidden(value: str, line: str) -> None:
    assert redacted(f"cannot parse {line}!", {"GOOGLE_CREDENTIALS": value}) == "cannot parse ***!"


def test_redacted__short_values_and_paths__are_kept() -> None:
    environment = {
        "API_KEY": "short",
        "GOOGLE_APPLICATION_CREDENTIALS": "/home/me/key.json",
        "TOTAL_TOKENS": "100000000",
    }
    text = "short of 100000000 in /home/me/key.json"
    assert redacted(text, environment) == text


def test_redacted_values__record__keys_and_numbers_are_kept() -> None:
    record = {"event": "RunFailed", "message": f"got {SECRET}", "steps": [1, SECRET, {"a": SECRET}], "loss": 1.5}
    assert redacted_values(record, {"S3_SECRET": SECRET}) == {
        "event": "RunFailed", "message": "got ***", "steps": [1, "***", {"a": "***"}], "loss": 1.5,
    }  # fmt: skip


def test_redacting_stream__secret_in_pieces_of_a_line__is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIO_SECRET_KEY", "hunter2hunter2")
    sent = io.StringIO()
    stream = RedactingStream(sent)
    for piece in ("key hunter2", "hunter2 is", " wrong\nand", " more"):
        stream.write(piece)
    assert sent.getvalue() == "key *** is wrong\n"
    stream.flush()
    assert sent.getvalue() == "key *** is wrong\nand more"


def test_open_log__new_and_old_log__only_this_user_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-0.log"
    path.parent.mkdir(mode=0o755)
    path.write_text("old\n")
    path.chmod(0o644)
    os.close(open_log(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.read_text() == "old\n"


def test_redirect_output__traceback_print_and_logging__have_no_secret(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "rank-0.log"
    code = (
        "import logging, os, sys, pathlib; from forge.process import redirect_output; "
        f"redirect_output(pathlib.Path({str(log)!r})); key = os.environ['FSSPEC_S3_SECRET']; "
        "print('printed', key, flush=True); logging.error('logged %s', key); sys.stderr.write('written ' + key); "
        "raise ValueError(f'raised {key}')"
    )
    environment = {**os.environ, "FSSPEC_S3_SECRET": SECRET}
    subprocess.run([sys.executable, "-P", "-c", code], env=environment, check=False, timeout=30)
    text = log.read_text()
    assert SECRET not in text and SECRET[:12] not in text
    assert all(f"{word} ***" in text for word in ("printed", "logged", "written", "raised"))
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_redacting_stream__is_a_file() -> None:
    stream = cast(io.TextIOBase, RedactingStream(sys.__stderr__))  # type: ignore[arg-type]
    assert stream.writable() and stream.fileno() == 2

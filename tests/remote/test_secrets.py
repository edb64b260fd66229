"""Secrets reach the driver through memory, for the same user only, and are removed from every text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from forge.errors import RunError
from forge.redact import redacted
from forge.remote.secrets import stash_secrets, take_secrets
from forge.runs.secrets import credentials

_ENVIRONMENT = {
    "WANDB_API_KEY": "wandb-0123456789",
    "MLFLOW_TRACKING_TOKEN": "mlflow-0123456789",
    "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
    "AWS_SECRET_ACCESS_KEY": "aws-secret-0123456789",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:5000",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:1338",
    "AZURE_METADATA_ENDPOINT": "http://127.0.0.1:1339",
    "AWS_PROFILE": "mine",
    "AWS_SHARED_CREDENTIALS_FILE": "/home/me/.aws/credentials",
    "HOME": "/home/me",
}


def test_credentials__environment__keeps_secrets_and_endpoints_only() -> None:
    assert set(credentials(_ENVIRONMENT)) == {
        *("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_URI"),
        *("AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"),
    }


def test_redacted__text_with_secrets__hides_them_and_keeps_endpoints() -> None:
    text = "PUT http://127.0.0.1:5000/x with aws-secret-0123456789: key wandb-0123456789 refused"
    assert redacted(text, _ENVIRONMENT) == "PUT http://127.0.0.1:5000/x with ***: key *** refused"


def test_take_secrets__second_call__returns_nothing() -> None:
    name = f"test-{os.getpid()}-once"
    stash_secrets(name, {"WANDB_API_KEY": "x" * 40})
    assert take_secrets(name) == {"WANDB_API_KEY": "x" * 40}
    assert take_secrets(name) == {}


def test_stash_secrets__name_in_use__raises() -> None:
    name = f"test-{os.getpid()}-twice"
    stash_secrets(name, {"A": "first"})
    with pytest.raises(RunError, match="already staged"):
        stash_secrets(name, {"A": "second"})
    assert take_secrets(name) == {"A": "first"}


def test_stash_secrets__reader_of_the_command__is_not_blocked_by_the_stash() -> None:
    name = f"test-{os.getpid()}-command"
    code = f"from forge.remote.secrets import stash_secrets; stash_secrets({name!r}, {{'A': 'value'}})"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=20)
    assert take_secrets(name) == {"A": "value"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_gets_nothing() -> None:
    name = f"test-{os.getpid()}-stranger"
    stash_secrets(name, {"A": "value"})
    address = f"\\0forge-0-{name}"
    code = (
        "import os, socket; os.setuid(65534); peer = socket.socket(socket.AF_UNIX); "
        f"peer.connect('{address}'); peer.settimeout(5); print(peer.recv(100))"
    )
    stranger = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert stranger.stdout.strip() in ("b''", ""), stranger.stdout

"""Detect keys that look like secrets: their values must not be in job files, nor in any message."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, urlsplit

SECRET_PROBLEM = (
    "must not be in a file, which forge copies and shows; "
    "secrets are read from the environment, such as WANDB_API_KEY"
)

_ENDINGS = (
    "api_?key|access_?key|secret_?key|private_?key|wandb_?key"
    "|api_?token|access_?token|auth_?token|hf_?token|wandb_?token"
    "|password|passwd|passphrase|secret|credentials?"
)
_SECRET = re.compile(rf"(.*_)?({_ENDINGS})|token|key|auth", re.IGNORECASE | re.DOTALL)


def is_secret(key: str) -> bool:
    """Whether a key, such as `api_key` or `HF-Token`, looks like the name of a secret."""
    return _SECRET.fullmatch(key.replace("-", "_")) is not None


_CONTAINER_SCHEMES = ("abfs", "abfss", "wasb", "wasbs")
"""Azure's, whose URLs have a container before the `@`: `abfs://container@account.dfs.core.windows.net/runs`."""
_SIGNED = frozenset({"sig", "signature", "x-amz-signature", "x-amz-credential", "x-goog-signature", "sas"})


def has_credential(url: str) -> bool:
    """Whether a URL contains a user's name or password, or a signature or secret among its parameters."""
    try:
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        parameters = parse_qsl(parts.query)
    except ValueError:  # no URL that anything could open
        return "@" in url
    if at and not (parts.scheme.lower() in _CONTAINER_SCHEMES and ":" not in user):
        return True
    return any(is_secret(key) or key.lower() in _SIGNED for key, _ in parameters)

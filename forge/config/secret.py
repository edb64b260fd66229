"""Detect keys that look like secrets: their values must not be in job files, nor in any message."""

from __future__ import annotations

import re

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

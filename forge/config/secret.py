"""Which keys sound like secrets: their values stay out of job files, and so out of every message."""

from __future__ import annotations

import re

SECRET_PROBLEM = (
    "secrets do not stand in a file that is copied and shown; they come from the environment, such as WANDB_API_KEY"
)

_ENDINGS = (
    "api_?key|access_?key|secret_?key|private_?key|wandb_?key"
    "|api_?token|access_?token|auth_?token|hf_?token|wandb_?token"
    "|password|passwd|passphrase|secret|credentials?"
)
_SECRET = re.compile(rf"(.*_)?({_ENDINGS})|token|key|auth", re.IGNORECASE | re.DOTALL)


def is_secret(key: str) -> bool:
    """Whether a key, such as `api_key` or `HF-Token`, sounds like a secret's."""
    return _SECRET.fullmatch(key.replace("-", "_")) is not None

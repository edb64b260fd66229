"""Which environment variables a run needs as secrets, and how their values are kept out of files and logs."""

from __future__ import annotations

from collections.abc import Mapping

_PREFIXES = ("WANDB_", "AWS_", "AZURE_", "GOOGLE_", "GCS_", "HF_")
# What a machine asks about itself is another's on another.
_OF_ONE_MACHINE = ("METADATA", "CONTAINER")
# What names a file or a profile of the asking machine means nothing on another.
_OF_THIS_MACHINE = ("_FILE", "_DIR", "_PROFILE", "_PATH", "GOOGLE_APPLICATION_CREDENTIALS")
_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "CONNECTION_STRING")
_LEAST_LENGTH = 8
"""A shorter value is no secret, and would be found everywhere."""


def credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a run needs for its stores and its tracking: secrets of theirs, and their endpoints."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_PREFIXES)
        and not name.endswith(_OF_THIS_MACHINE)
        and not any(word in name for word in _OF_ONE_MACHINE)
    }


def redacted(text: str, environment: Mapping[str, str]) -> str:
    """`text` without the values of the environment's secrets: `***` stands in their place."""
    for name, value in credentials(environment).items():
        if len(value) >= _LEAST_LENGTH and any(word in name for word in _WORDS):
            text = text.replace(value, "***")
    return text

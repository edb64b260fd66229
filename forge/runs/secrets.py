"""Select the environment variables that a run's processes need; `forge.redact` keeps them out of files and logs."""

from __future__ import annotations

import os
from collections.abc import Mapping

from forge.config.templates import variables_of
from forge.plan.plan import Plan
from forge.redact import CREDENTIAL_PREFIXES, is_secret_variable

# Specific to a machine: instance metadata and container credentials are not forwarded.
_MACHINE_WORDS = ("METADATA", "CONTAINER")
# Names of files and profiles of the client machine, which do not exist on another.
_LOCAL_SUFFIXES = ("_FILE", "_DIR", "_PROFILE", "_PATH", "GOOGLE_APPLICATION_CREDENTIALS")


def credentials(environment: Mapping[str, str], *, with_files: bool = False) -> dict[str, str]:
    """Select the variables that storage and tracking need: credentials and endpoints.

    Args:
        with_files: also those that name a profile or a file, because the processes run on this machine.
    """
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(CREDENTIAL_PREFIXES)
        and (with_files or not names_file(name))
        and not any(word in name for word in _MACHINE_WORDS)
    }


def names_file(name: str) -> bool:
    """Whether a variable of storage or tracking names a file or a profile, which another machine does not have."""
    return name.startswith(CREDENTIAL_PREFIXES) and name.endswith(_LOCAL_SUFFIXES)


def without_keys(environment: Mapping[str, str], *, prefixes: tuple[str, ...]) -> dict[str, str]:
    """Leave out the keys of a cloud: variables with one of its prefixes that sound like a secret."""
    return {
        name: value
        for name, value in environment.items()
        if not (name.startswith(prefixes) and is_secret_variable(name))
    }


def variables_for(plan: Plan) -> dict[str, str]:
    """Return the variables that the job file names as `${env:NAME}`: the run's files have only their names."""
    return {name: os.environ[name] for name in variables_of(plan.templates) if name in os.environ}


def environment_of(plan: Plan, *, with_files: bool = False) -> dict[str, str]:
    """Return the environment variables of this process that a run's other processes need."""
    return credentials(os.environ, with_files=with_files) | variables_for(plan)

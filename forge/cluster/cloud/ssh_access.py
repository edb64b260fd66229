"""The ssh key with which forge logs in to rented machines, and this machine's public address."""

from __future__ import annotations

import ipaddress
import subprocess
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from forge.config.cluster import CloudSpec
from forge.errors import ClusterError

_OWN_ADDRESS_URL = "https://checkip.amazonaws.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class SshKey:
    """A pair of key files."""

    file: str
    """The private key's."""
    public_file: str
    public: str
    """Type and text of the public key, without its comment."""


def make_key(spec: CloudSpec, *, folder: Path) -> SshKey:
    """The key that the cluster file names, or the cluster's own, created if it does not exist.

    Raises: ClusterError if it cannot be used.
    """
    file = Path(spec.identity_file or folder / "key").expanduser()
    if any(character.isspace() for character in str(file)):
        raise ClusterError(
            f"Ray's launcher cannot use a key whose path has a space: {file}; "
            + ("set FORGE_STATE to a folder without" if spec.identity_file is None else "move identity_file")
        )
    if spec.identity_file is None and not file.exists():
        # RSA is the one type that all three clouds accept.
        _ssh_keygen("-t", "rsa", "-b", "3072", "-N", "", "-C", f"forge-{spec.name}", "-f", str(file))
    public_file = folder / "key.pub"
    public_file.write_bytes(_ssh_keygen("-y", "-f", str(file)))
    public = " ".join(public_file.read_text().split()[:2])
    return SshKey(file=str(file), public_file=str(public_file), public=public)


def own_address() -> str:
    """This machine's public address as a CIDR. Raises: ClusterError if it cannot be found out."""
    try:
        with urllib.request.urlopen(_OWN_ADDRESS_URL, timeout=10) as answer:
            address = ipaddress.ip_address(answer.read(100).decode().strip())
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"this machine's public address could not be read from {_OWN_ADDRESS_URL} ({error}); write it into the "
            "cluster file: allow_from: 203.0.113.4/32"
        ) from None
    return f"{address}/{address.max_prefixlen}"


def _ssh_keygen(*arguments: str) -> bytes:
    """Run ssh-keygen without a terminal, so that it cannot prompt. Raises: ClusterError if it fails."""
    try:
        done = subprocess.run(
            ["ssh-keygen", "-q", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            timeout=60,
            check=False,
        )
    except OSError as error:
        raise ClusterError(f"ssh-keygen cannot be run: {error.strerror}; install OpenSSH's client") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no error message"]
        raise ClusterError(f"the ssh key {arguments[-1]} cannot be used: {lines[-1]}")
    return done.stdout

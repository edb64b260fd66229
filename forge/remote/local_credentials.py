"""Say which credentials for object storage are in files of this machine, and so do not reach a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from forge.cluster.base import Cluster
from forge.environment import expand_home
from forge.runs.secrets import names_file


@dataclass(frozen=True, slots=True, kw_only=True)
class _Store:
    """One kind of object store, and where its client looks for credentials."""

    schemes: tuple[str, ...]
    prefixes: tuple[str, ...]
    keys: tuple[str, ...]
    """Variables that hold the credentials themselves, and are sent."""
    default_file: str
    how_to_send: str


_STORES = (
    _Store(
        schemes=("s3", "s3a"),
        prefixes=("AWS_",),
        keys=("AWS_ACCESS_KEY_ID",),
        default_file="~/.aws/credentials",
        how_to_send='eval "$(aws configure export-credentials --format env)" before forge train',
    ),
    _Store(
        schemes=("gs", "gcs"),
        prefixes=("GOOGLE_",),
        keys=("GCS_TOKEN", "GOOGLE_CREDENTIALS"),
        default_file="~/.config/gcloud/application_default_credentials.json",
        how_to_send="copy the file to all machines and set the variable there, or attach a service account to them",
    ),
    _Store(
        schemes=("abfs", "abfss", "az"),
        prefixes=("AZURE_",),
        keys=("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CLIENT_SECRET"),
        default_file="~/.azure/msal_token_cache.json",
        how_to_send="set AZURE_STORAGE_CONNECTION_STRING, or AZURE_CLIENT_ID, _TENANT_ID and _CLIENT_SECRET",
    ),
)


def local_credentials_note(cluster: Cluster, *, url: str, environment: Mapping[str, str]) -> str | None:
    """Return a sentence about credentials that stay on this machine, with what to do; None if there are none.

    Args:
        url: where the run's checkpoints go.
        environment: of this process.
    """
    scheme, is_url, _ = url.partition("://")
    store = next((store for store in _STORES if is_url and scheme in store.schemes), None)
    if store is None or cluster.shares_files or (cluster.role is not None and cluster.role.scheme == scheme):
        return None
    if any(environment.get(key) for key in store.keys):
        return None
    named = [name for name in environment if names_file(name) and name.startswith(store.prefixes)]
    if not named and Path(expand_home(store.default_file)).is_file():
        named = [store.default_file]
    if not named:
        return None
    return (
        f"{' and '.join(sorted(named))} {'refers' if len(named) == 1 else 'refer'} to credentials in files of this "
        f"machine, which are not sent: the machines of '{cluster.name}' reach {url} by a role or files of their "
        f"own, or not at all. To send your keys: {store.how_to_send}"
    )

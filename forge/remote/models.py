"""Give a cluster the model that `forge eval`, `forge generate` or `forge serve` use on it.

A run that lives on the cluster stays where it is, and one with checkpoints in object storage is read from there by
the cluster's own machines. Only weights that are on this machine alone are sent: once for each content, to where
all nodes of the cluster can read them.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from forge.checkpoint.best import open_verified
from forge.checkpoint.storage import open_storage
from forge.cluster.base import Cluster
from forge.code_archive import TRUST, require_trusted
from forge.errors import ArgumentError
from forge.fs import default_cache_dir, digest_file
from forge.remote.mirror import ask
from forge.remote.submit import RemoteTarget, credentials_for, send_stream
from forge.runs.reader import read_plan
from forge.runs.remote_ref import read_remote_ref
from forge.runs.run_files import SMALL_FILES
from forge.units import format_bytes

_IDENTIFY_TIMEOUT_S = 600.0
"""Of importing transformers, and verifying a checkpoint in object storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """A model on a cluster."""

    cluster: Cluster
    folder: str
    """Of the run or the weights, on the cluster's head."""
    environment: Mapping[str, str]
    """What processes there need to read it: credentials, and the trust in its code."""

    def identify(self, *, step: int | str | None, ema: bool) -> dict[str, Any]:
        """The fields of `forge.inference.identity.ModelIdentity`. Raises: what `identify` raises; ClusterError."""
        request = {"source": self.folder, "step": step, "ema": ema, "environment": dict(self.environment)}
        found: dict[str, Any] = ask(
            self.cluster,
            stdin=json.dumps(request).encode(),
            module="forge.inference.identity",
            timeout_s=_IDENTIFY_TIMEOUT_S,
        )
        return found


def place_model(
    target: RemoteTarget,
    source: Path,
    *,
    step: int | str | None = None,
    on_message: Callable[[str], None] = lambda _: None,
) -> PlacedModel:
    """Find a model on a cluster, or send it there.

    Args:
        source: the folder of a run or of weights (or adapters) on this machine.
        step: of the checkpoint that is sent, if it has to be.
        on_message: called with what is sent.

    Raises: ArgumentError if the weights are on another cluster, or there is no place for them; CheckpointError;
        UserCodeError for a run with code that is not trusted; ClusterError.
    """
    cluster, environment = target.cluster, credentials_for(target.cluster)
    if (source / "plan.json").is_file():
        plan = read_plan(source)
        if plan.code is not None:
            require_trusted(plan.code.digest, run_folder=source)
            environment |= {TRUST: plan.code.digest}
        ref = read_remote_ref(source)
        if ref is not None and ref.cluster == cluster.name and _has_folder(cluster, ref.folder):
            return PlacedModel(cluster=cluster, folder=ref.folder, environment=environment)
        files = {name: source / name for name in SMALL_FILES if (source / name).exists()}
        url = plan.job.checkpoint.url_of(str(source))
        if "://" not in url:
            files |= _checkpoint_files(source, url=url, step=step, elsewhere=None if ref is None else ref.cluster)
    else:
        files = {path.name: path for path in sorted(source.iterdir()) if not path.name.startswith(".")}
    folder = _sent(target, source, files, on_message=on_message)
    return PlacedModel(cluster=cluster, folder=folder, environment=environment)


def _has_folder(cluster: Cluster, folder: str) -> bool:
    found: bool = ask(cluster, "check", "--folder", folder)["has_folder"]
    return found


def _checkpoint_files(source: Path, *, url: str, step: int | str | None, elsewhere: str | None) -> dict[str, Path]:
    """The checkpoint of a run on this machine, by its name in the run folder."""
    if elsewhere is not None:
        raise ArgumentError(
            f"the checkpoints of {source.name} are on the cluster '{elsewhere}'; use it there (--cluster "
            f"{elsewhere}), or train with checkpoint.to: a URL that every cluster reads"
        )
    found = Path(open_verified(open_storage(url), step=step).url)
    return {f"checkpoints/{found.name}": found}


def _sent(
    target: RemoteTarget, source: Path, files: Mapping[str, Path], *, on_message: Callable[[str], None]
) -> str:
    """Send files, unless the cluster has them. Returns: their folder there, which has the name of `source`."""
    each = {name: path for top, under in files.items() for name, path in _files(top, under)}
    cache = default_cache_dir() / "digests"
    digests = [f"{name} {digest_file(path, cache=cache)}" for name, path in sorted(each.items())]
    digest = hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()
    name, size = f"models/{digest}/{source.resolve().name}", sum(path.stat().st_size for path in each.values())
    root = _root(target, source, has_weights=not set(files) <= set(SMALL_FILES))
    words = [name] if root is None else [name, "--root", root]
    if root is not None and _has_folder(target.cluster, f"{root}/{name}"):
        return f"{root}/{name}"
    known: str | None = ask(target.cluster, "stored", name) if root is None else None
    if known is not None:
        return known
    on_message(f"sending {source.name}, {format_bytes(size)}, to the cluster '{target.cluster.name}'")

    def write(stream: IO[bytes]) -> None:
        with tarfile.open(fileobj=stream, mode="w|") as archive:
            for inner, path in each.items():
                archive.add(path.resolve(), arcname=inner)

    stored: str = send_stream(target.cluster, "store", *words, write=write)
    return stored


def _root(target: RemoteTarget, source: Path, *, has_weights: bool) -> str | None:
    """The folder for a model on a cluster that all nodes read; None: the head's own, if that is enough."""
    if target.storage and "://" not in target.storage:
        return target.storage.rstrip("/")
    alive = [node for node in target.cluster.status().nodes if node.state == "alive"]
    if has_weights and len(alive) > 1:
        raise ArgumentError(
            f"the weights of {source.name} are on this machine alone, and the {len(alive)} machines of "
            f"'{target.cluster.name}' share no folder that they could be sent to: set storage in its cluster file "
            "to a folder that all of them have, or put a run's checkpoints into object storage (checkpoint.to)"
        )
    return None


def _files(name: str, path: Path) -> Iterator[tuple[str, Path]]:
    """The files of a file or a folder, by their names in the archive."""
    if path.is_file():
        yield name, path
        return
    for inner in sorted(path.rglob("*")):
        if inner.is_file():
            yield f"{name}/{inner.relative_to(path)}", inner

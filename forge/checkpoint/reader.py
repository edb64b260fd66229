"""Read any range of a checkpoint.

    checkpoints/step-00001000/
      part-00003-1f0c.safetensors   the intervals of one rank, keys `kind/start/name`
      state-1f0c.json               step, tokens, digests, shapes of parameters, format version
      manifest.json                 written last: all parts with their intervals, sizes and checksums

A reader reads only the ranges it needs, independent of the world size that wrote them. Integrity checks are in
`forge.checkpoint.verify`, the format of the small files in `forge.checkpoint.manifest`. No torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forge.checkpoint.intervals import Interval, IntervalIndex, kind_numel
from forge.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    ModelShape,
    Progress,
    base_difference,
    manifest_from_bytes,
    shape_differences,
    state_from_bytes,
    step_name,
    unacked_metrics_from_bytes,
)
from forge.checkpoint.storage import Storage
from forge.errors import CheckpointError


class Checkpoint:
    """A checkpoint open for reading; use `open_checkpoint`."""

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        manifest: Manifest,
        progress: Progress,
        shape: ModelShape,
        unacked_metrics: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self.name = name
        self.url = f"{storage.url}/{name}"
        self.manifest = manifest
        self.progress = progress
        self.shape = shape
        self.unacked_metrics = unacked_metrics
        """Metrics of its last steps that may not have been recorded."""
        self._storage = storage
        self._index = IntervalIndex((part.name, part.layout, part.data_start) for part in manifest.parts)

    @property
    def kinds(self) -> set[str]:
        """All kinds that it stores."""
        return self._index.kinds

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval, reading only these bytes.

        Raises: CheckpointError if an element is missing, or a file cannot be read.
        """
        try:
            ranges = self._index.ranges(wanted)
        except ValueError as error:
            raise CheckpointError(f"{self.url} {error}") from error
        for part, entries in ranges.items():
            try:
                self._storage.read_into(f"{self.name}/{part}", entries)
            except (OSError, EOFError) as error:
                raise CheckpointError(f"{self.url}/{part} cannot be read: {error}") from error

    def value_interval(self, name: str, *, ema: bool = False) -> Interval:
        """Return the interval to `read` for the whole value of a parameter or buffer.

        The interval of a parameter of kind `base` cannot be read from the checkpoint; its value is in `shape.base`.

        Args:
            ema: for trained parameters, the moving average in place of the weight.
        """
        name = self.shape.tied.get(name, name)
        parameter = self.shape.parameters[name]
        is_trained = parameter.kind == "master"
        return Interval(
            kind="ema" if ema and is_trained else parameter.kind,
            name=name,
            start=0,
            stop=math.prod(parameter.shape),
            dtype="F32" if is_trained else parameter.dtype,
        )

    def require_job(self, *, config_digest: str, corpus: str, shape: ModelShape) -> None:
        """Raises: CheckpointError unless it was written with this job's model, data and training settings."""
        differences = shape_differences(self.shape, shape)
        if differences:
            raise CheckpointError(
                f"{self.url} is of another model: {'; '.join(differences)}. Start a new run, or resume with the "
                "job file the checkpoint was made with"
            )
        difference = base_difference(self.shape.base, shape.base)
        if difference is not None:
            raise CheckpointError(
                f"{self.url}: {difference}. Restore the file, or start a new run from the changed weights"
            )
        if self.progress.config_digest != config_digest:
            raise CheckpointError(
                f"{self.url} belongs to another job: its model, data or training section differs from this one's; "
                "start a new run, or resume with the job file the checkpoint was made with"
            )
        if self.progress.corpus != corpus:
            raise CheckpointError(
                f"{self.url} was trained on another corpus ({self.progress.corpus[:12]}, now {corpus[:12]}): the "
                "text behind data: has changed, so the sample order would not be the same"
            )


def list_checkpoints(storage: Storage) -> list[str]:
    """List checkpoint names, newest first, unverified. Raises: CheckpointError if the storage cannot be listed."""
    try:
        return [name for name in reversed(storage.names()) if name.startswith("step-")]
    except OSError as error:
        raise CheckpointError(f"{storage.url} cannot be listed: {error}") from error


def open_checkpoint(storage: Storage, name: str) -> Checkpoint:
    """Read a checkpoint's manifest and state file. Raises: CheckpointError if they are not valid."""
    url = f"{storage.url}/{name}"
    try:
        return read_checkpoint(storage, name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: {file_name_of(error)} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{url}: {error}") from error


def read_checkpoint(storage: Storage, name: str) -> Checkpoint:
    """Like `open_checkpoint`. Raises: FileNotFoundError, OSError; ValueError with the reason if it is not valid."""
    manifest = read_manifest(storage, name)
    text = storage.read(f"{name}/{manifest.state_name}")
    if zlib.crc32(text) != manifest.state_crc32:
        raise ValueError(f"{manifest.state_name} does not match its checksum")
    progress, shape = state_from_bytes(text)
    if not name.endswith(step_name(manifest.step)) or progress.step != manifest.step:
        raise ValueError(f"its manifest is of step {manifest.step}, its state of step {progress.step}")
    _require_complete(manifest, shape)
    unacked_metrics = unacked_metrics_from_bytes(text)
    return Checkpoint(
        storage, name, manifest=manifest, progress=progress, shape=shape, unacked_metrics=unacked_metrics
    )


def _require_complete(manifest: Manifest, shape: ModelShape) -> None:
    """Raises: ValueError unless each element of each parameter is stored exactly once per kind."""
    held: dict[tuple[str, str], list[tuple[int, int]]] = {
        (parameter.kind, name): [] for name, parameter in shape.parameters.items() if parameter.kind != "base"
    }
    for part in manifest.parts:
        for interval in part.layout.intervals:
            held.setdefault((interval.kind, interval.name), []).append((interval.start, interval.stop))
    for (kind, name), intervals in held.items():
        parameter = shape.parameters.get(name)
        edges = [0, *(edge for interval in sorted(intervals) for edge in interval)]
        edges.append(kind_numel(kind, parameter.shape) if parameter else -1)
        if edges[::2] != edges[1::2]:
            raise ValueError(f"its parts do not hold every element of {name} ({kind}) exactly once")


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read the manifest. Raises: FileNotFoundError, OSError; ValueError with the reason if it is not valid."""
    return manifest_from_bytes(storage.read(f"{name}/{MANIFEST}"))


def file_name_of(error: FileNotFoundError) -> str:
    """Return the name of the missing file, without its folder."""
    name = str(error.filename or error.args[-1] if error.args else error)
    return name.rstrip("/").rpartition("/")[2]

"""Read any part of a durable checkpoint.

    checkpoints/step-00001000/
      part-00003-1f0c.safetensors   the intervals of one writer, keys `kind/start/name`
      state-1f0c.json               step, tokens, digests, the parameters' shapes, format version
      manifest.json                 written last: every part with its intervals, size and checksum

A reader reads the ranges it needs, whichever rank wrote them, at any world size. Which checkpoints are whole is
decided in `forge.checkpoint.verify`, the format of the small files in `forge.checkpoint.manifest`. No torch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from forge.checkpoint.intervals import Interval, IntervalIndex
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
    """A checkpoint that is open for reading; use `open_checkpoint`."""

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
        """Metrics of its last steps, which may not have been recorded."""
        self._storage = storage
        self._holdings = IntervalIndex((part.name, part.layout, part.data_start) for part in manifest.parts)

    @property
    def kinds(self) -> set[str]:
        """The kinds it holds of any parameter."""
        return self._holdings.kinds

    def read(self, wanted: Iterable[tuple[Interval, memoryview]]) -> None:
        """Fill each view with the bytes of its interval; nothing else is read.

        Raises: CheckpointError if an element is not there, or a file cannot be read.
        """
        try:
            ranges = self._holdings.ranges(wanted)
        except ValueError as error:
            raise CheckpointError(f"{self.url} {error}") from error
        for part, entries in ranges.items():
            try:
                self._storage.read_into(f"{self.name}/{part}", entries)
            except (OSError, EOFError) as error:
                raise CheckpointError(f"{self.url}/{part} cannot be read: {error}") from error

    def value_interval(self, name: str, *, ema: bool = False) -> Interval:
        """Where the value of a whole parameter or buffer is: the interval to `read`.

        Args:
            ema: of what is trained, its average.

        The interval of a parameter of kind `base` cannot be read from the checkpoint: it refers to `shape.base`.
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
        """Raises: CheckpointError unless it was made by this job's model, data and training."""
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
    """Names of what claims to be a checkpoint, newest first. Raises: CheckpointError if there is no asking."""
    try:
        return [name for name in reversed(storage.names()) if name.startswith("step-")]
    except OSError as error:
        raise CheckpointError(f"{storage.url} cannot be listed: {error}") from error


def open_checkpoint(storage: Storage, name: str) -> Checkpoint:
    """Read a checkpoint's manifest and state. Raises: CheckpointError saying what is wrong with them."""
    url = f"{storage.url}/{name}"
    try:
        return read_checkpoint(storage, name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{url}: {file_of(error)} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{url}: {error}") from error


def read_checkpoint(storage: Storage, name: str) -> Checkpoint:
    """Raises: FileNotFoundError, OSError; ValueError saying why it is not to be believed."""
    manifest = read_manifest(storage, name)
    text = storage.read(f"{name}/{manifest.state_name}")
    if zlib.crc32(text) != manifest.state_crc32:
        raise ValueError(f"{manifest.state_name} does not match its checksum")
    progress, shape = state_from_bytes(text)
    if not name.endswith(step_name(manifest.step)) or progress.step != manifest.step:
        raise ValueError(f"its manifest is of step {manifest.step}, its state of step {progress.step}")
    _require_whole(manifest, shape)
    unacked_metrics = unacked_metrics_from_bytes(text)
    return Checkpoint(
        storage, name, manifest=manifest, progress=progress, shape=shape, unacked_metrics=unacked_metrics
    )


def _require_whole(manifest: Manifest, shape: ModelShape) -> None:
    """Raises: ValueError if an element of a parameter is there twice in one kind, or not at all."""
    held: dict[tuple[str, str], list[tuple[int, int]]] = {
        (parameter.kind, name): [] for name, parameter in shape.parameters.items() if parameter.kind != "base"
    }
    for part in manifest.parts:
        for interval in part.layout.intervals:
            held.setdefault((interval.kind, interval.name), []).append((interval.start, interval.stop))
    for (kind, name), intervals in held.items():
        parameter = shape.parameters.get(name)
        edges = [0, *(edge for interval in sorted(intervals) for edge in interval)]
        edges.append(math.prod(parameter.shape) if parameter else -1)
        if edges[::2] != edges[1::2]:
            raise ValueError(f"its parts do not hold every element of {name} ({kind}) exactly once")


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Raises: FileNotFoundError, OSError; ValueError saying why it is not to be believed."""
    return manifest_from_bytes(storage.read(f"{name}/{MANIFEST}"))


def file_of(error: FileNotFoundError) -> str:
    """The file's own name: what a person looks for."""
    name = str(error.filename or error.args[-1] if error.args else error)
    return name.rstrip("/").rpartition("/")[2]

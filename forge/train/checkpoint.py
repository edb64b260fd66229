"""Durable checkpoints: the shards of every rank, in rank-free coordinates, without pickle.

    checkpoints/step-00001000/
      part-00003.safetensors   the shards of one rank, keys `kind/start/name`
      state.json               step, recipe, number of parameters, format version
      manifest.json            written last: every part with its size and checksum

Ranks write into a folder under a temporary name; rank 0 writes the manifest, flushes and renames. A
reader believes only a manifest whose parts are all there with the right sizes and checksums, and walks
back to the checkpoint before. Loading reads the intervals a rank needs, whoever wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from forge.errors import CheckpointError
from forge.train.state import Shard, TrainState

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All of a run's state that is not a tensor."""

    step: int
    num_tokens: int
    recipe: str
    """Digest of what determines the loss curve; see `forge.plan.plan.training_digest`."""
    corpus: str
    """Digest of the prepared corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint as it was written."""

    folder: Path
    size_bytes: int
    seconds: float


def save_checkpoint(root: Path, state: TrainState, progress: Progress, *, keep: int) -> Saved:
    """Write this step's checkpoint and drop the oldest beyond `keep`; collective.

    Raises: CheckpointError on every rank if any rank could not write its part.
    """
    began = time.monotonic()
    rank = dist.get_rank()
    final = root / f"step-{progress.step:08d}"
    draft = root / f".draft-{progress.step:08d}"
    failure = _attempt(lambda: draft.mkdir(parents=True, exist_ok=True)) if rank == 0 else None
    _agree_on_success(failure, draft)
    part = draft / f"part-{rank:05d}.safetensors"
    failure = _attempt(lambda: _write_part(part, state))
    parts = _agree_on_success(failure, draft, own=None if failure else _describe(part))
    failure = _attempt(lambda: _seal(draft, final, progress, parts)) if rank == 0 else None
    _agree_on_success(failure, draft)
    if rank == 0:
        for old in list_checkpoints(root)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    size = sum(part["size_bytes"] for part in parts)
    return Saved(folder=final, size_bytes=size, seconds=time.monotonic() - began)


def load_checkpoint(folder: Path, state: TrainState, *, recipe: str, corpus: str) -> Progress:
    """Fill this rank's shards from a checkpoint that verifies, whatever the world size it was written at.

    Raises: CheckpointError if it is of another recipe, corpus or model.
    """
    progress = read_progress(folder)
    if progress.recipe != recipe:
        raise CheckpointError(
            f"{folder} belongs to another job: its model, data or training section differs from this one's; "
            "start a new run, or resume with the job file the checkpoint was made with"
        )
    if progress.corpus != corpus:
        raise CheckpointError(
            f"{folder} was trained on another corpus ({progress.corpus[:12]}, now {corpus[:12]}): the text behind "
            "data: has changed, so the sample order would not be the same"
        )
    with ExitStack() as stack:
        reader = PartReader(folder, stack)
        for shard in state.shards:
            for kind in state.kinds:
                reader.fill(state.tensor(shard, kind), name=shard.name, kind=kind, start=shard.start)
    state.set_step(progress.step)
    state.refresh_weights()
    return progress


class PartReader:
    """Ranged reads over the parts of one checkpoint."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._where: dict[tuple[str, str], list[tuple[int, int, str, str]]] = {}
        self._files = {}
        for part in sorted(folder.glob("part-*.safetensors")):
            file = stack.enter_context(safe_open(part, framework="pt"))
            self._files[part.name] = file
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                kind, start, name = key.split("/", 2)
                stop = int(start) + file.get_slice(key).get_shape()[0]
                self._where.setdefault((name, kind), []).append((int(start), stop, part.name, key))

    def names(self, kind: str) -> list[str]:
        """Parameters that are there in `kind`."""
        return sorted(name for name, its_kind in self._where if its_kind == kind)

    def numel(self, name: str, kind: str) -> int:
        """Elements of one parameter."""
        return max(stop for _, stop, _, _ in self._where[name, kind])

    def fill(self, target: Tensor, *, name: str, kind: str, start: int) -> None:
        """Copy elements `[start, start + len(target))` of a parameter into a flat tensor.

        Raises: CheckpointError if any of them is missing.
        """
        stop, filled = start + target.numel(), 0
        for low, high, part, key in self._where.get((name, kind), ()):
            first, last = max(low, start), min(high, stop)
            if first < last:
                piece = self._files[part].get_slice(key)[first - low : last - low]
                target[first - start : last - start].copy_(piece)
                filled += last - first
        if filled != target.numel():
            raise CheckpointError(
                f"{self._folder} holds {filled} of the {target.numel()} elements needed of {name} ({kind}): "
                "it belongs to another model, or was written by another version of forge"
            )


def list_checkpoints(root: Path) -> list[Path]:
    """Complete checkpoints under `root`, newest first; drafts are not among them."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), reverse=True)


def find_checkpoint(root: Path, *, on_skip: Callable[[Path, str], None]) -> Path | None:
    """The newest checkpoint that verifies, walking back past broken ones; None if there is none."""
    for folder in list_checkpoints(root):
        problem = verify_checkpoint(folder)
        if problem is None:
            return folder
        on_skip(folder, problem)
    return None


def verify_checkpoint(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: the manifest, then every size, then every checksum."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format version {manifest['format_version']}, this forge reads {FORMAT_VERSION}"
        for part in manifest["parts"]:
            path = folder / part["name"]
            size = path.stat().st_size
            if size != part["size_bytes"]:
                return f"{part['name']} has {size} bytes, its manifest says {part['size_bytes']}"
        for part in manifest["parts"]:
            if _checksum(folder / part["name"]) != part["blake2b"]:
                return f"{part['name']} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename or '').name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_MANIFEST} cannot be read ({error})"
    return None


def read_progress(folder: Path) -> Progress:
    """The part of the state that is no tensor. Raises: CheckpointError."""
    try:
        return Progress(**json.loads((folder / _STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / _STATE} cannot be read: {error}") from error


def read_weights(folder: Path, *, kind: str = "master") -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a checkpoint, flat in fp32, one at a time. Raises: CheckpointError."""
    try:
        with ExitStack() as stack:
            reader = PartReader(folder, stack)
            names = reader.names(kind)
            if not names:
                raise CheckpointError(f"{folder} holds no {kind} weights")
            for name in names:
                flat = torch.empty(reader.numel(name, kind), dtype=torch.float32)
                reader.fill(flat, name=name, kind=kind, start=0)
                yield name, flat
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error


def _write_part(path: Path, state: TrainState) -> None:
    tensors = {
        _key(shard, kind): state.tensor(shard, kind).cpu().clone()
        for shard in state.claims
        for kind in state.kinds
        if shard.stop > shard.start
    }
    save_file(tensors, path)
    _flush(path)


def _key(shard: Shard, kind: str) -> str:
    return f"{kind}/{shard.start}/{shard.name}"


def _seal(draft: Path, final: Path, progress: Progress, parts: list[dict[str, Any]]) -> None:
    """State, manifest, flush, rename: the checkpoint exists from here on."""
    _write_json(draft / _STATE, asdict(progress))
    manifest = {"format_version": FORMAT_VERSION, "parts": [*parts, _describe(draft / _STATE)]}
    _write_json(draft / _MANIFEST, manifest)
    _flush(draft)
    if final.exists():  # the same step, saved again after a resume
        shutil.rmtree(final)
    draft.rename(final)
    _flush(final.parent)


def _write_json(path: Path, body: dict[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    _flush(path)


def _describe(path: Path) -> dict[str, Any]:
    return {"name": path.name, "size_bytes": path.stat().st_size, "blake2b": _checksum(path)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(action: Callable[[], object]) -> str | None:
    """Run it; the reason if it failed."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _agree_on_success(
    failure: str | None, draft: Path, *, own: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Gather every rank's outcome. Raises: CheckpointError on all ranks if one failed."""
    outcomes: list[tuple[str | None, dict[str, Any] | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(outcomes, (failure, own))
    reasons = [(rank, reason) for rank, (reason, _) in enumerate(outcomes) if reason]
    if reasons:
        if dist.get_rank() == 0:
            shutil.rmtree(draft, ignore_errors=True)
        rank, reason = reasons[0]
        raise CheckpointError(f"checkpoint {draft.parent} could not be written by rank {rank}: {reason}")
    return [described for _, described in outcomes if described]

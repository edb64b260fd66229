"""Format of the small files of a checkpoint: manifest, state file, header of a part.

Pure functions between bytes and typed values, as described in `docs/checkpoint-format.md`. Inconsistent input
raises ValueError with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forge.checkpoint.intervals import ITEM_BYTES, KINDS, Layout, layout_from_record, safetensors_header
from forge.foreign import MAX_INT, file_name, from_record, parse_object, typed

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
_MAX_MANIFEST_VALUES = 32_000_000
"""Of a checkpoint with about five million intervals, such as 500 parameters in four kinds on 2,500 ranks."""
# The data of a part starts at a page boundary, as it does in memory, which direct I/O requires.
_ALIGNMENT = 4096
# The manifest's own checksum has a fixed position, and is computed with zeros there.
_CRC_PREFIX = b'{"crc32": "00000000", '
_CRC_DIGITS = slice(11, 19)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """State of a run apart from tensors; learning rate, sample order and dropout are functions of the step."""

    step: int
    num_tokens: int
    config_digest: str
    """Digest of all settings that determine the loss curve; see `forge.plan.curve.config_digest`."""
    corpus: str
    """Digest of the prepared corpus."""
    best_value: float | None = None
    """With `training.early_stopping`: the best value of its metric; None before the first finite one."""
    best_step: int = 0
    num_evaluations_since_best: int = 0
    metric: str = ""
    """What compares the checkpoints of a run, such as `eval/loss`; empty if this step was not evaluated."""
    metric_value: float | None = None
    """Its value at this very step; None if the step was not evaluated, or the value is not finite."""
    metric_direction: Literal["min", "max"] = "min"
    """Whether a smaller or a larger value is better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of the model."""

    shape: tuple[int, ...]
    dtype: str
    """Type in the model, by its safetensors name; the stored master weight may be `F32`."""
    kind: str
    """Kind that stores its value: `master` (trained), `frozen`, `buffer` or `base`. Values of kind `base` are not
    in the checkpoint, but in the weights that `ModelShape.base` names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights:
    """The pretrained weights that a checkpoint refers to, for parameters that are not trained."""

    source: str
    """Folder or Hugging Face Hub id, as in the job file."""
    revision: str | None
    """Commit, for a Hub id."""
    files: Mapping[str, str]
    """xxh3_128 of each weight file, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The tensors of a model; two models with equal shapes can load each other's checkpoints."""

    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    """Alias → name of the parameter that it is tied to."""
    config: Mapping[str, Any]
    """The transformers config, which makes a checkpoint self-contained; empty for any other model."""
    base: BaseWeights | None = None
    """The weights that parameters of kind `base` are read from, or that the objective compares the model with."""
    adapters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """The fields of `forge.checkpoint.adapter_config.AdapterConfig`; empty without adapters."""

    @property
    def values_base(self) -> BaseWeights | None:
        """`base` if values of parameters are read from it."""
        return self.base if any(one.kind == "base" for one in self.parameters.values()) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The file of one rank."""

    name: str
    size_bytes: int
    crc32: int
    layout: Layout

    @property
    def data_start(self) -> int:
        """Offset of the first interval, in bytes."""
        return self.size_bytes - self.layout.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The files of a checkpoint."""

    step: int
    parts: tuple[Part, ...]
    state_name: str
    state_size_bytes: int
    state_crc32: int

    @property
    def size_bytes(self) -> int:
        """Size of all files except the manifest."""
        return self.state_size_bytes + sum(part.size_bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class _StateEntry:
    """`state` of a manifest."""

    name: str
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartEntry:
    """One of the `parts` of a manifest."""

    name: str
    size_bytes: int
    crc32: int
    data_start: int
    intervals: Any
    """Checked by `layout_from_record`, as there are many."""


def step_name(step: int) -> str:
    """Return `step-00001000`: names sort by step."""
    return f"step-{step:08d}"


def part_name(rank: int, *, token: str) -> str:
    """Return a name unique to one save: two jobs that save the same step to one object store do not mix files."""
    return f"part-{rank:05d}-{token}.safetensors"


def state_name(*, token: str) -> str:
    """Return a name unique to one save, like `part_name`."""
    return f"state-{token}.json"


def manifest_from_bytes(text: bytes) -> Manifest:
    """Parse the output of `manifest_bytes`. Raises: ValueError with the reason if it is not valid."""
    try:
        body = parse_object(text, max_values=_MAX_MANIFEST_VALUES)
        version = body.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version!r:.40}, this forge reads {FORMAT_VERSION}")
        blank = text[: _CRC_DIGITS.start] + b"0" * 8 + text[_CRC_DIGITS.stop :]
        if body.get("crc32") != f"{zlib.crc32(blank):08x}":
            raise ValueError(f"{MANIFEST} does not match its checksum")
        state = from_record(_StateEntry, body.get("state"))
        parts = tuple(part_from_record(part) for part in typed(tuple[Any, ...], body.get("parts"), where="parts"))
        step = typed(int, body.get("step"), where="step")
        names = [file_name(state.name), *(part.name for part in parts)]
    except ValueError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from error
    if len(set(names)) < len(names) or MANIFEST in names:
        raise ValueError(f"{MANIFEST} cannot be read: it names a file twice")
    if step < 0 or state.size_bytes < 0:
        raise ValueError(f"{MANIFEST} cannot be read: a number is negative")
    return Manifest(
        step=step,
        parts=parts,
        state_name=state.name,
        state_size_bytes=state.size_bytes,
        state_crc32=state.crc32,
    )


def manifest_bytes(step: int, *, parts: Sequence[Part], state: bytes, token: str) -> bytes:
    """Return the content of `manifest.json`, including its own checksum."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "state": {"name": state_name(token=token), "size_bytes": len(state), "crc32": zlib.crc32(state)},
        "parts": [part_record(part) for part in parts],
    }
    blank = _CRC_PREFIX + json.dumps(body, sort_keys=True).encode()[1:] + b"\n"
    return blank[: _CRC_DIGITS.start] + f"{zlib.crc32(blank):08x}".encode() + blank[_CRC_DIGITS.stop :]


def state_from_bytes(text: bytes) -> tuple[Progress, ModelShape]:
    """Parse the output of `state_bytes`. Raises: ValueError with the reason if it is not valid."""
    try:
        body = parse_object(text)
        fields = {field.name for field in dataclasses.fields(Progress)}
        progress = from_record(Progress, {name: value for name, value in body.items() if name in fields})
        shape = shape_from_record(body)
    except ValueError as error:
        raise ValueError(f"the state cannot be read: {error}") from error
    return progress, shape


def unacked_metrics_from_bytes(text: bytes) -> list[dict[str, Any]]:
    """Return the `unacked_metrics` in the output of `state_bytes`. Raises: ValueError if it is not valid."""
    found = parse_object(text).get("unacked_metrics", [])
    metrics: list[dict[str, Any]] = typed(list[dict[str, Any]], found, where="unacked_metrics")
    return metrics


def state_bytes(
    progress: Progress, shape: ModelShape, *, unacked_metrics: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """Return the content of the state file.

    Args:
        unacked_metrics: metrics of steps up to this one that were not acknowledged by the recorder yet.
    """
    body = {"format_version": FORMAT_VERSION} | dataclasses.asdict(progress) | shape_record(shape)
    if unacked_metrics:
        body["unacked_metrics"] = [dict(metrics) for metrics in unacked_metrics]
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def shape_record(shape: ModelShape) -> dict[str, Any]:
    """Return a model's shape as JSON."""
    parameters = {name: dataclasses.asdict(entry) for name, entry in shape.parameters.items()}
    record = {"parameters": parameters, "tied": dict(shape.tied), "config": dict(shape.config)}
    record |= {"base": base_record(shape.base)} if shape.base is not None else {}
    return record | ({"adapters": dict(shape.adapters)} if shape.adapters else {})


def shape_from_record(record: Mapping[str, Any]) -> ModelShape:
    """Parse the output of `shape_record`. Raises: ValueError with the reason if it is not valid."""
    names = ("parameters", "tied", "config", "base", "adapters")
    found = {name: record[name] for name in names if name in record}
    shape = from_record(ModelShape, found)
    for name, parameter in shape.parameters.items():
        if parameter.dtype not in ITEM_BYTES or parameter.kind not in (*KINDS, "base"):
            raise ValueError(f"{name[:80]} has the type {parameter.dtype[:40]} and the kind {parameter.kind[:40]}")
        if min(parameter.shape, default=0) < 0 or math.prod(parameter.shape) > MAX_INT:
            raise ValueError(f"{name[:80]} has an impossible shape")
    for alias, name in shape.tied.items():
        if name not in shape.parameters:
            raise ValueError(f"{alias[:80]} is tied to {name[:80]}, which the state does not describe")
    return shape


def base_record(base: BaseWeights | None) -> dict[str, Any] | None:
    """Return a reference to base weights as JSON."""
    return None if base is None else dataclasses.asdict(base)


def base_from_record(record: Mapping[str, Any] | None) -> BaseWeights | None:
    """Parse the output of `base_record`. Raises: ValueError with the reason if it is not valid."""
    base: BaseWeights | None = typed(BaseWeights | None, record, where="base")
    return base


def base_difference(held: BaseWeights | None, wanted: BaseWeights | None) -> str | None:
    """Return how base weights differ from those that a state refers to; None if their content is the same."""
    if held is None or wanted is None or held.files == wanted.files:
        return None
    for name, digest in sorted(held.files.items()):
        now = wanted.files.get(name)
        if now != digest:
            change = f"had the digest {digest}, now {now}" if now else "is missing"
            return f"{name} of {held.source}, which frozen parameters or the reference are taken from, {change}"
    extra = min(set(wanted.files) - set(held.files))
    return f"{held.source}, which frozen parameters or the reference are taken from, now has {extra} as well"


def part_record(part: Part) -> dict[str, Any]:
    """Return the manifest entry of a part."""
    return {
        "name": part.name,
        "size_bytes": part.size_bytes,
        "crc32": part.crc32,
        "data_start": part.data_start,
        "intervals": part.layout.to_record(),
    }


def part_from_record(record: Any) -> Part:
    """Parse the output of `part_record`. Raises: ValueError with the reason if it is not valid."""
    entry = from_record(_PartEntry, record)
    part = Part(
        name=file_name(entry.name),
        size_bytes=entry.size_bytes,
        crc32=entry.crc32,
        layout=layout_from_record(entry.intervals),
    )
    if part.data_start != entry.data_start or part.data_start < 0:
        raise ValueError(f"{part.name} has {part.size_bytes} bytes, which does not match its intervals")
    return part


def part_header(layout: Layout) -> bytes:
    """Return the safetensors header of a part, with one flat tensor per interval."""
    tensors = {i.key: (i.dtype, (i.numel,)) for i in layout.intervals}
    return safetensors_header(tensors, alignment=_ALIGNMENT)


def shape_differences(held: ModelShape, wanted: ModelShape, *, most: int = 5) -> list[str]:
    """List the differences between a checkpoint's model and the one that loads it, by parameter."""
    found = []
    for name in sorted({*held.parameters, *wanted.parameters}):
        ours, theirs = wanted.parameters.get(name), held.parameters.get(name)
        if ours is None:
            found.append(f"it has {name}, which this model does not have")
        elif theirs is None:
            found.append(f"it has no {name}")
        elif ours.shape != theirs.shape:
            found.append(f"{name} is {_shape(theirs)} in the checkpoint and {_shape(ours)} in this model")
        elif ours.kind != theirs.kind:
            found.append(f"{name} is {theirs.kind} in the checkpoint and {ours.kind} in this model")
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]


def _shape(parameter: Parameter) -> str:
    return "×".join(map(str, parameter.shape)) or "a number"

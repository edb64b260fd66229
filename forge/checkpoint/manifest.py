"""What the small files of a checkpoint say, and how they are written: manifest, state, a part's header.

Pure functions between bytes and typed values; `docs/checkpoint-format.md` says the same in words. What is
read and does not add up is a ValueError with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forge.checkpoint.intervals import Layout, layout_from_record, safetensors_header

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
# The data of a part begins at a page's beginning, as it does in memory: a disk then takes it without a copy.
_ALIGNMENT = 4096
# The manifest's own checksum stands at a fixed place, and is taken with zeros there.
_SEAL = b'{"crc32": "00000000", '
_SEAL_AT = slice(11, 19)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """All of a run's state that is not a tensor. Schedule, sample order and dropout follow from the step."""

    step: int
    num_tokens: int
    config_digest: str
    """Digest of what determines the loss curve; see `forge.plan.plan.training_digest`."""
    corpus: str
    """Digest of the prepared corpus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One tensor of the model, as the model has it."""

    shape: tuple[int, ...]
    dtype: str
    """Of the model's own copy, by safetensors' name."""
    kind: str
    """`master` (trained), `frozen`, `buffer` or `base`: the kind that holds its value. The values of `base` are in
    no part: they are those of `ModelShape.base`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeights:
    """The pretrained weights that a checkpoint refers to, for parameters that are not trained."""

    source: str
    """A folder or a hub id, as the job names it."""
    revision: str | None
    """The commit of a hub id."""
    files: Mapping[str, str]
    """xxh3_128 of each weight file, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Which tensors a model has; two models with equal shapes can load each other's checkpoints."""

    parameters: Mapping[str, Parameter]
    tied: Mapping[str, str]
    """Names that are another parameter's second name."""
    config: Mapping[str, Any]
    """The transformers config, so that a checkpoint alone tells its model; empty for any other model."""
    base: BaseWeights | None = None
    """Where the values of kind `base` are; None if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One writer's file."""

    name: str
    size_bytes: int
    crc32: int
    layout: Layout

    @property
    def data_start(self) -> int:
        """The byte at which the first interval begins."""
        return self.size_bytes - self.layout.size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is made of."""

    step: int
    parts: tuple[Part, ...]
    state_name: str
    state_size_bytes: int
    state_crc32: int

    @property
    def size_bytes(self) -> int:
        """Of all files but the manifest itself."""
        return self.state_size_bytes + sum(part.size_bytes for part in self.parts)


def step_name(step: int) -> str:
    """`step-00001000`: sorts as the steps do."""
    return f"step-{step:08d}"


def part_name(rank: int, *, token: str) -> str:
    """Unique to one writing: two who write one checkpoint at once on an object store do not mix."""
    return f"part-{rank:05d}-{token}.safetensors"


def state_name(*, token: str) -> str:
    """Unique to one writing, like the parts' names."""
    return f"state-{token}.json"


def manifest_from_bytes(text: bytes) -> Manifest:
    """Read what `manifest_bytes` gave. Raises: ValueError saying why it is not to be believed."""
    try:
        body = json.loads(text)
        version = body["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format version {version}, this forge reads {FORMAT_VERSION}")
        blank = text[: _SEAL_AT.start] + b"0" * 8 + text[_SEAL_AT.stop :]
        if body["crc32"] != f"{zlib.crc32(blank):08x}":
            raise ValueError(f"{MANIFEST} does not match its checksum")
        return Manifest(
            step=body["step"],
            parts=tuple(part_from_record(part) for part in body["parts"]),
            state_name=body["state"]["name"],
            state_size_bytes=body["state"]["size_bytes"],
            state_crc32=body["state"]["crc32"],
        )
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error


def manifest_bytes(step: int, *, parts: Sequence[Part], state: bytes, token: str) -> bytes:
    """`manifest.json`, its own checksum included."""
    body = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "state": {"name": state_name(token=token), "size_bytes": len(state), "crc32": zlib.crc32(state)},
        "parts": [part_record(part) for part in parts],
    }
    blank = _SEAL + json.dumps(body, sort_keys=True).encode()[1:] + b"\n"
    return blank[: _SEAL_AT.start] + f"{zlib.crc32(blank):08x}".encode() + blank[_SEAL_AT.stop :]


def state_from_bytes(text: bytes) -> tuple[Progress, ModelShape]:
    """Read what `state_bytes` gave. Raises: ValueError saying why it cannot be read."""
    try:
        body = json.loads(text)
        progress = Progress(**{field.name: body[field.name] for field in dataclasses.fields(Progress)})
        shape = shape_from_record(body)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the state cannot be read ({error})") from error
    return progress, shape


def unacked_metrics_from_bytes(text: bytes) -> list[dict[str, Any]]:
    """The steps that `state_bytes` was given. Raises: ValueError if they cannot be read."""
    try:
        unacked_metrics: list[dict[str, Any]] = json.loads(text).get("unacked_metrics", [])
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"the state cannot be read ({error})") from error
    return unacked_metrics


def state_bytes(
    progress: Progress, shape: ModelShape, *, unacked_metrics: Sequence[Mapping[str, Any]] = ()
) -> bytes:
    """The file of the state.

    Args:
        unacked_metrics: metrics of the steps up to this one that were perhaps not recorded yet when it was made.
    """
    body = {"format_version": FORMAT_VERSION} | dataclasses.asdict(progress) | shape_record(shape)
    if unacked_metrics:
        body["unacked_metrics"] = [dict(metrics) for metrics in unacked_metrics]
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def shape_record(shape: ModelShape) -> dict[str, Any]:
    """A model's shape as JSON."""
    parameters = {name: dataclasses.asdict(entry) for name, entry in shape.parameters.items()}
    record = {"parameters": parameters, "tied": dict(shape.tied), "config": dict(shape.config)}
    return record | ({"base": base_record(shape.base)} if shape.base is not None else {})


def shape_from_record(record: Mapping[str, Any]) -> ModelShape:
    """Read what `shape_record` gave. Raises: KeyError, TypeError."""
    parameters = {
        key: Parameter(shape=tuple(entry["shape"]), dtype=entry["dtype"], kind=entry["kind"])
        for key, entry in record["parameters"].items()
    }
    base = base_from_record(record.get("base"))
    return ModelShape(parameters=parameters, tied=record["tied"], config=record["config"], base=base)


def base_record(base: BaseWeights | None) -> dict[str, Any] | None:
    """A reference to base weights as JSON."""
    return None if base is None else dataclasses.asdict(base)


def base_from_record(record: Mapping[str, Any] | None) -> BaseWeights | None:
    """Read what `base_record` gave. Raises: KeyError, TypeError."""
    if record is None:
        return None
    return BaseWeights(source=record["source"], revision=record["revision"], files=dict(record["files"]))


def base_difference(held: BaseWeights | None, wanted: BaseWeights | None) -> str | None:
    """Why the base weights of now are not those that a state refers to; None if their content is the same."""
    if held is None or wanted is None or held.files == wanted.files:
        return None
    for name, digest in sorted(held.files.items()):
        now = wanted.files.get(name)
        if now != digest:
            change = f"had the digest {digest}, now {now}" if now else "is missing"
            return f"{name} of {held.source}, which the frozen parameters were taken from, {change}"
    extra = min(set(wanted.files) - set(held.files))
    return f"{held.source}, which the frozen parameters were taken from, now has {extra} as well"


def part_record(part: Part) -> dict[str, Any]:
    """A part as it stands in the manifest."""
    return {
        "name": part.name,
        "size_bytes": part.size_bytes,
        "crc32": part.crc32,
        "data_start": part.data_start,
        "intervals": part.layout.to_record(),
    }


def part_from_record(record: Mapping[str, Any]) -> Part:
    """Read what `part_record` gave. Raises: KeyError, TypeError; ValueError if it contradicts itself."""
    part = Part(
        name=record["name"],
        size_bytes=record["size_bytes"],
        crc32=record["crc32"],
        layout=layout_from_record(record["intervals"]),
    )
    if part.data_start != record["data_start"]:
        raise ValueError(f"{part.name} has {part.size_bytes} bytes, but its intervals end elsewhere")
    return part


def part_header(layout: Layout) -> bytes:
    """What stands before the data of a part: a safetensors header with a flat tensor for each interval."""
    tensors = {i.key: (i.dtype, (i.numel,)) for i in layout.intervals}
    return safetensors_header(tensors, alignment=_ALIGNMENT)


def shape_differences(held: ModelShape, wanted: ModelShape, *, most: int = 5) -> list[str]:
    """How a checkpoint's model differs from the one that is to be loaded, parameter by parameter."""
    found = []
    for name in sorted({*held.parameters, *wanted.parameters}):
        ours, theirs = wanted.parameters.get(name), held.parameters.get(name)
        if ours is None:
            found.append(f"it has {name}, which this model has not")
        elif theirs is None:
            found.append(f"it has no {name}")
        elif ours.shape != theirs.shape:
            found.append(f"{name} is {_shape(theirs)} there and {_shape(ours)} here")
        elif ours.kind != theirs.kind:
            found.append(f"{name} is {theirs.kind} there and {ours.kind} here")
    return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]


def _shape(parameter: Parameter) -> str:
    return "×".join(map(str, parameter.shape)) or "a number"

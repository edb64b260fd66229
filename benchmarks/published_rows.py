"""Rows of a CSV file of published measurements, as what the estimate of throughput needs of them.

The columns are model, num_params, seq_len, gpus, gpu, internode_gbps_per_node, micro_batch, grad_accum, sharding,
act_ckpt, precision and tokens_per_s_per_gpu, in any order and among others. Models of other shapes than MPT's have
hidden_size and num_layers, and vocab_size unless it is MPT's; without them the shape is assumed from num_params,
and said. Any other row is refused with its line: an error of an estimate of something else would mean nothing.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forge.config.training import TrainingSpec
from forge.errors import ArgumentError, printable
from forge.plan.batch import BatchPlan
from forge.plan.gpus import GPUS, Gpu, find_gpu
from forge.plan.inputs import ModelInfo
from forge.plan.parameter_groups import OptimizerState
from forge.plan.step_work import step_work
from forge.plan.throughput import Efficiency, Interconnect, StepWork, estimate_step

_COLUMNS = (
    "model",
    "num_params",
    "seq_len",
    "gpus",
    "gpu",
    "internode_gbps_per_node",
    "micro_batch",
    "grad_accum",
    "sharding",
    "act_ckpt",
    "precision",
    "tokens_per_s_per_gpu",
)
_MPT_SHAPES = {
    "mpt-125m": (768, 12),
    "mpt-350m": (1024, 24),
    "mpt-760m": (1536, 24),
    "mpt-1b": (2048, 24),
    "mpt-3b": (2560, 32),
    "mpt-7b": (4096, 32),
    "mpt-13b": (5120, 40),
    "mpt-30b": (7168, 48),
    "mpt-70b": (8192, 80),
}
"""Hidden size and number of layers. Source: LLM Foundry, scripts/train/yamls/pretrain, commit 8c8dd48f."""
_MPT_VOCAB = 50368
_PLAUSIBLE = 2.0
"""A shape is not that of a model with more parameters than this many times its own, or fewer than that share."""
_STAGES = {
    **{"zero3": 3, "fullshard": 3, "zero2": 2, "shardgradop": 2},
    **{"zero1": 1, "zero0": 0, "noshard": 0, "ddp": 0, "none": 0},
}
"""FSDP's names too, which move the same bytes."""
_PRECISIONS = {"bf16": "bf16", "fp16": "bf16", "fp32": "fp32", "float32": "fp32"}
"""fp16 has the peak and the width of bf16."""
_CHECKPOINTING: Mapping[str, bool | str] = {
    **dict.fromkeys(("true", "1", "full", "yes"), True),
    **dict.fromkeys(("false", "0", "", "none", "no"), False),
    "selective": "selective",
}
_GPUS_PER_NODE = 8
_MOST = 10**15
_ValueT = TypeVar("_ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One measured configuration."""

    model: str
    work: StepWork
    gpu: Gpu
    interconnect: Interconnect
    tokens_per_s: float
    """Measured, of one GPU."""
    assumed_shape: str | None
    """The shape that was assumed; None if it is known."""

    def estimate(self, efficiency: Efficiency | None = None) -> float:
        """Return the tokens/s of one GPU."""
        return estimate_step(
            self.work, gpu=self.gpu, interconnect=self.interconnect, efficiency=efficiency
        ).tokens_per_s


def read_file(path: Path) -> list[PublishedRow]:
    """Read a CSV file. Raises: ArgumentError if it cannot be read, and as `read_rows`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ArgumentError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: byte {error.start:,} is not UTF-8; expected a CSV file of text") from error
    return read_rows(text, where=str(path))


def read_rows(text: str, *, where: str) -> list[PublishedRow]:
    """Read the rows of a CSV file. Raises: ArgumentError with the line of the first one that is wrong."""
    reader = csv.reader(io.StringIO(text, newline=""))
    rows = []
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(cells)
                continue
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} fields; the header has {len(header)}")
            rows.append(_row(dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    except (ValueError, csv.Error) as error:
        raise ArgumentError(f"{where}:{reader.line_num}: {printable(str(error), limit=300)}") from error
    if not rows:
        raise ArgumentError(f"{where}: no rows; expected a CSV file with the columns {', '.join(_COLUMNS)}")
    return rows


def _header(cells: list[str]) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    if missing := [name for name in _COLUMNS if name not in names]:
        raise ValueError(f"the header has no column {', '.join(missing)}")
    if twice := [name for name in _COLUMNS if names.count(name) > 1]:
        raise ValueError(f"the header has the column {twice[0]} twice")
    return names


def _row(record: Mapping[str, str]) -> PublishedRow:
    """Raises: ValueError with the column, the value and what is expected."""
    gpu = find_gpu(record["gpu"].replace("_", "-"))
    if gpu is None:
        raise ValueError(f"gpu '{record['gpu']}' is not known; known are {', '.join(one.name for one in GPUS)}")
    rate = _number(record, "tokens_per_s_per_gpu")
    model, assumed = _model(record)
    world_size, micro, steps = (_count(record, name) for name in ("gpus", "micro_batch", "grad_accum"))
    precision = record["precision"].lower().removeprefix("amp_")
    sharding = re.sub(r"[^a-z0-9]", "", record["sharding"].lower())
    training = TrainingSpec.model_validate(
        {
            "total_steps": 1,
            "precision": _chosen(record, "precision", _PRECISIONS, key=precision),
            "zero": {"stage": _chosen(record, "sharding", _STAGES, key=sharding)},
            "activation_checkpointing": _chosen(record, "act_ckpt", _CHECKPOINTING, key=record["act_ckpt"].lower()),
        }
    )
    # Within one node nothing is sent over its network.
    is_one_node = world_size <= _GPUS_PER_NODE and not record["internode_gbps_per_node"]
    gbps = math.inf if is_one_node else _number(record, "internode_gbps_per_node")
    return PublishedRow(
        model=record["model"],
        work=step_work(
            model,
            training,
            seq_len=_count(record, "seq_len"),
            batch=BatchPlan(
                global_batch_size=micro * steps * world_size,
                world_size=world_size,
                micro_batch_size=micro,
                gradient_accumulation_steps=steps,
            ),
            state=OptimizerState(sharded_bytes=8 * model.num_parameters, replicated_bytes=0),
            gpu=gpu,
        ),
        gpu=gpu,
        interconnect=Interconnect(gpus_per_node=_GPUS_PER_NODE, inter_node_bytes_per_s=gbps * 1e9 / 8),
        tokens_per_s=rate,
        assumed_shape=assumed,
    )


def _model(record: Mapping[str, str]) -> tuple[ModelInfo, str | None]:
    """The model, and its shape if that was assumed."""
    num_parameters = int(_number(record, "num_params"))
    vocab = _count(record, "vocab_size") if record.get("vocab_size") else _MPT_VOCAB
    name, assumed = record["model"].lower(), None
    if record.get("hidden_size") or record.get("num_layers"):
        hidden, layers = _count(record, "hidden_size"), _count(record, "num_layers")
    elif name in _MPT_SHAPES:
        hidden, layers = _MPT_SHAPES[name]
    else:
        hidden, layers = _likely_shape(num_parameters, vocab=vocab)
        assumed = f"{layers} layers of {hidden:,}"
    of_shape = 12 * hidden**2 * layers + vocab * hidden
    if not 1 / _PLAUSIBLE <= num_parameters / of_shape <= _PLAUSIBLE:
        raise ValueError(
            f"num_params {num_parameters:.3g} is not that of {layers} layers of {hidden:,}, about {of_shape:.3g}"
        )
    return ModelInfo(
        architecture="mpt",
        class_name="MPTForCausalLM",
        num_parameters=num_parameters,
        num_trainable_parameters=num_parameters,
        num_matmul_parameters=of_shape,
        num_head_matmul_parameters=vocab * hidden,
        largest_module_parameters=vocab * hidden,
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        attention_width=hidden,
        vocab_size=vocab,
        max_seq_len=None,
        has_linear_head=True,
        isolation_problem=None,
    ), assumed


def _likely_shape(num_parameters: int, *, vocab: int) -> tuple[int, int]:
    """Hidden size and layers of a model of so many parameters: as many layers as the MPT model nearest in size."""

    def distance(shape: tuple[int, int]) -> float:
        hidden, layers = shape
        return abs(math.log(num_parameters / (12 * hidden**2 * layers + _MPT_VOCAB * hidden)))

    layers = min(_MPT_SHAPES.values(), key=distance)[1]
    # 12·layers·h² + vocab·h = num_parameters
    hidden = (math.sqrt(vocab**2 + 48 * layers * num_parameters) - vocab) / (24 * layers)
    return max(64, 64 * round(hidden / 64)), layers


def _number(record: Mapping[str, str], name: str) -> float:
    try:
        value = float(record[name])
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST:
        raise ValueError(f"{name} is '{record[name]}'; expected a number above 0, at most {_MOST:.0e}")
    return value


def _count(record: Mapping[str, str], name: str) -> int:
    value = _number({name: record.get(name, "")}, name)
    if value != int(value):
        raise ValueError(f"{name} is '{record[name]}'; expected a whole number")
    return int(value)


def _chosen(record: Mapping[str, str], name: str, values: Mapping[str, _ValueT], *, key: str) -> _ValueT:
    if key not in values:
        raise ValueError(f"{name} '{record[name]}' is not estimated; known are {', '.join(filter(None, values))}")
    return values[key]

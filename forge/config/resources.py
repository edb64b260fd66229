"""`resources:`, `checkpoint:` and `tracking:` where the run lives and what it leaves behind."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from forge.config.section import FieldError, Interval, Section, WholeOrAuto, WholeRange
from forge.units import Every, Range


class ResourcesSpec(Section):
    """What the run asks of the cluster."""

    workers: WholeRange = Range(low=1, high=1)
    """Ranks, `4` or `1..4`: as many as the cluster has room for, one GPU (or one CPU) each. Any number
    works, whether it divides the batch or not."""

    gpu: str = Field("auto", min_length=1)
    """`auto`: GPUs where the cluster has any, otherwise CPUs; `none`: CPUs; or a GPU's name such as
    `A100-80GB`, whose memory and peak the plan then uses."""

    engine: Literal["elastic", "ray-train"] = "elastic"
    """What keeps the ranks together. `elastic`: forge's own supervisor, which goes on with the machines there are
    from copies in memory; `ray-train`: Ray Train, which starts over from the newest checkpoint."""

    max_usd: float | None = Field(None, gt=0)
    """What the run may cost in all, over every time that it is resumed; it then stops, with a checkpoint. Every
    machine must tell its price: `usd_per_hour` in the cluster's file, or the cloud's own."""

    max_usd_per_hour: float | None = Field(None, gt=0)
    """What its machines may cost together at any moment; the run stops, with a checkpoint, when they cost more."""

    @model_validator(mode="after")
    def _limits_are_watched(self) -> ResourcesSpec:
        for key in ("max_usd", "max_usd_per_hour"):
            if getattr(self, key) is not None and self.engine != "elastic":
                raise FieldError(key, "is watched by forge's own supervisor: it needs engine: elastic")
        return self


class CheckpointSpec(Section):
    """Durable copies of the training state."""

    every: Interval = Every(seconds=600.0)
    """How often; one is written at the end, and on Ctrl-C, in any case."""

    keep: int = Field(3, ge=1)
    """How many of the newest are kept."""

    snapshot_every: WholeOrAuto = "auto"
    """Steps between copies of the state in memory, on two machines: what a lost machine makes the run repeat at
    most. `auto`: every step where that costs at most 1 % of its time, else every n-th, from measured costs."""

    to: str = Field("runs", min_length=1)
    """The folder under which each run gets its own: `runs/<run_id>/`. Or a URL that fsspec knows, such as
    `s3://bucket/runs`, `gs://...` or `abfs://...`: checkpoints then go to `<to>/<run_id>/checkpoints/`, and the
    rest of the run stays in `runs/<run_id>/`. Credentials are the store's own, from the environment."""

    @field_validator("snapshot_every")
    @classmethod
    def _is_positive(cls, value: int | Literal["auto"]) -> int | Literal["auto"]:
        if value != "auto" and value < 1:
            raise ValueError("must be auto, or a number of steps from 1 on")
        return value

    @field_validator("to")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        scheme, separator, place = value.partition("://")
        if separator and scheme in ("file", "local"):
            raise ValueError("must be a plain path where it is local, without file://")
        if separator and (not scheme.isalnum() or not place.strip("/")):
            raise ValueError("must be a folder, or a URL with a bucket such as s3://bucket/runs")
        return value

    @property
    def runs(self) -> str:
        """The local folder that holds the runs' folders."""
        return "runs" if "://" in self.to else self.to

    def url_of(self, run_folder: str) -> str:
        """Where a run's checkpoints lie.

        Args:
            run_folder: the run's own folder, whose last part is its id.
        """
        if "://" not in self.to:
            return f"{run_folder}/checkpoints"
        return f"{self.to.rstrip('/')}/{run_folder.rstrip('/').rpartition('/')[2]}/checkpoints"


class WandbSpec(Section):
    """Weights & Biases; the API key is read from the environment (`WANDB_API_KEY`) and nowhere else."""

    project: str = Field("forge", min_length=1)
    """The W&B project."""

    entity: str | None = None
    """The W&B team or user; the key's own by default."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """`offline`: recorded under the run's folder, uploaded later by `wandb sync`; `online`: streamed, and
    recorded offline if the network is away."""


class TrackingSpec(Section):
    """Where metrics go besides `metrics.jsonl`."""

    wandb: WandbSpec = WandbSpec()
    """One W&B run for the whole job."""

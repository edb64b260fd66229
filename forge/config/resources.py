"""`resources:`, `checkpoint:` and `tracking:` what the run needs, and what it saves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from forge.config.section import DeadlineTime, FieldError, IntervalOrAuto, Section, WholeOrAuto, WholeRange
from forge.units import Every, Range


class ResourcesSpec(Section):
    """What the run needs of the cluster, and what it may cost."""

    workers: WholeRange = Range(low=1, high=1)
    """Number of workers, `4` or a range `1..4`, of which the run uses as many as fit on the cluster; each has one
    GPU (or one CPU). It need not divide the batch. Ray Train's `num_workers`."""

    gpu: str = Field("auto", min_length=1)
    """`auto`: GPUs if the cluster has any, otherwise CPUs; `none`: CPUs; or the name of a GPU such as `A100-80GB`,
    whose memory and peak FLOP/s the plan then uses."""

    engine: Literal["elastic", "ray-train"] = "elastic"
    """What recovers the run when workers are lost. `elastic`: forge's supervisor, which continues on the remaining
    machines from snapshots in memory; `ray-train`: Ray Train, which restarts from the newest checkpoint."""

    max_usd: float | None = Field(None, gt=0)
    """Total cost limit of the run in USD, over all resumes; when it is reached, the run writes a checkpoint and
    stops. The price of every machine must be known: from the cloud, or `usd_per_hour` in the cluster file."""

    max_hours: float | None = Field(None, gt=0)
    """Longest time that the run should take, in hours, over all resumes and without the time between them: `forge
    plan` names the cheapest machines that keep to it. It stops nothing; with `engine: elastic` the run says whether
    it will keep to it, when that is first known and when it changes (docs/cost.md)."""

    deadline: DeadlineTime | None = None
    """When the run must be done: `48h` after its start, over all resumes, or a date `2026-12-01T18:00Z`. On a
    cluster that rents spot and on-demand machines the run asks for as few on-demand ones as meet it; elsewhere it
    warns. A run that misses it goes on (docs/cost.md)."""

    move_regions: bool = False
    """With `deadline`, on a rented cluster whose file allows several `regions`: move the run to another region when
    spot machines stay away, while `forge train` or `forge runs watch` follows it. It stops with a checkpoint, and
    the whole cluster moves; other runs on it prevent that. `false`, because nothing trains meanwhile (about a
    quarter of an hour): the run only says when a move would pay, for `forge cluster move` (docs/cost.md)."""

    max_usd_per_hour: float | None = Field(None, gt=0)
    """Limit in USD per hour for all machines of the run together; above it the run stops, with a checkpoint."""

    replace_stragglers: bool = False
    """Leave a node, as after a preemption notice, whose own work (its forward passes) takes at least 1.5 times the
    median of the other ranks in three windows of 20 steps: when another node can take its place, or when the run is
    faster without it. Once per node, at most a quarter of the nodes (docs/stragglers.md). `false`: such a node is
    only named in an event, since a machine that is shared with others may be slow for a while."""

    @model_validator(mode="after")
    def _limits_are_watched(self) -> ResourcesSpec:
        for key in ("max_usd", "max_usd_per_hour", "deadline"):
            if getattr(self, key) is not None and self.engine != "elastic":
                raise FieldError(key, "requires engine: elastic, whose supervisor enforces it")
        if self.move_regions and self.deadline is None:
            raise FieldError("move_regions", "requires resources.deadline, for which a run moves")
        if self.replace_stragglers and self.engine != "elastic":
            raise FieldError("replace_stragglers", "requires engine: elastic, whose supervisor replaces nodes")
        return self


class CheckpointSpec(Section):
    """Durable checkpoints of the training state, and snapshots of it in memory."""

    every: IntervalOrAuto = Every(seconds=600.0)
    """Interval between checkpoints, `10m` or `50 steps`; one is always written at the end and on Ctrl-C. `auto`:
    Young's and Daly's optimum between 1 minute and 2 hours, from the measured waiting for a checkpoint and the time
    between losses of the state in memory (docs/cost.md)."""

    keep: int = Field(3, ge=1)
    """How many of the newest checkpoints are kept; older ones are deleted."""

    keep_best: int | None = Field(None, ge=0, le=1000)
    """How many of the best checkpoints are kept beside the newest, by the metric of `training.early_stopping`, else
    by `eval/loss`. Each step whose evaluation is among the best is saved at once; the best one is named `best`, as
    in `forge checkpoints export RUN --step best`. By default 1 with `training.early_stopping`, else 0."""

    snapshot_every: WholeOrAuto = "auto"
    """Steps between snapshots of the state to the memory of two machines; losing a machine repeats at most this
    many steps. `auto`: every step if a snapshot costs at most 1 % of a step, otherwise every n-th."""

    to: str = Field("runs", min_length=1)
    """The folder in which each run gets its own folder `<run_id>/`. Or an fsspec URL such as `s3://bucket/runs`,
    `gs://...` or `abfs://...`: checkpoints then go to `<to>/<run_id>/checkpoints/`, and everything else to
    `runs/<run_id>/`. Credentials are read from the environment, as the object store's client expects them."""

    @field_validator("snapshot_every")
    @classmethod
    def _is_positive(cls, value: int | Literal["auto"]) -> int | Literal["auto"]:
        if value != "auto" and value < 1:
            raise ValueError("must be 'auto' or at least 1 step")
        return value

    @field_validator("to")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        scheme, separator, place = value.partition("://")
        if separator and scheme in ("file", "local"):
            raise ValueError("must be a plain path if it is local, without file://")
        if separator and (not scheme.isalnum() or not place.strip("/")):
            raise ValueError("must be a folder, or a URL with a bucket such as s3://bucket/runs")
        return value

    @property
    def runs(self) -> str:
        """The local folder that contains the run folders."""
        return "runs" if "://" in self.to else self.to

    def url_of(self, run_folder: str) -> str:
        """Return the folder or URL of a run's checkpoints.

        Args:
            run_folder: the run's folder, named by its id.
        """
        if "://" not in self.to:
            return f"{run_folder}/checkpoints"
        return f"{self.to.rstrip('/')}/{run_folder.rstrip('/').rpartition('/')[2]}/checkpoints"


class WandbSpec(Section):
    """Weights & Biases. The API key is read from the environment variable `WANDB_API_KEY` only."""

    project: str = Field("forge", min_length=1)
    """The W&B project."""

    entity: str | None = None
    """The W&B team or user; by default the one of the API key."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    """`offline`: record in the run's folder, for a later `wandb sync`; `online`: stream, and record offline while
    the network is unavailable; `disabled`: no W&B."""

    @field_validator("project")
    @classmethod
    def _is_a_project(cls, value: str) -> str:
        # W&B refuses these when the run starts.
        if len(value) > 128 or any(character in value for character in "/\\#?%:"):
            hint = "; write the team as tracking.wandb.entity" if "/" in value else ""
            raise ValueError(f"must be a W&B project: at most 128 characters, none of / \\ # ? % :{hint}")
        return value


class MlflowSpec(Section):
    """MLflow; requires `pip install 'forge-train[mlflow]'`. Credentials of a tracking server are read from the
    environment only: `MLFLOW_TRACKING_TOKEN`, or `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, and are
    sent only to the server that `MLFLOW_TRACKING_URI` in the environment names."""

    uri: str | None = None
    """The tracking server, such as `https://mlflow.example.com` or `${env:MLFLOW_TRACKING_URI}`, or a database
    `sqlite:////data/mlflow.db` by its absolute path; by default `mlflow.db` in the run's folder."""

    experiment: str = Field("forge", min_length=1, max_length=250)
    """The MLflow experiment; it is created if it does not exist."""

    @field_validator("uri")
    @classmethod
    def _is_a_tracking_uri(cls, value: str | None) -> str | None:
        if value is None:
            return None
        scheme, separator, place = value.partition("://")
        is_known = scheme in ("http", "https") or (scheme == "sqlite" and place.startswith("//"))
        if not separator or not is_known or not place.strip("/") or not value.isprintable():
            raise ValueError("must be https://HOST, http://HOST:PORT, or sqlite://// and an absolute path")
        return value


class TrackingSpec(Section):
    """Experiment trackers besides `metrics.jsonl`, any number of them. Each has every step once, however often the
    run is resumed; steps that a tracker could not take are sent when the run is resumed. See docs/tracking.md."""

    wandb: WandbSpec = WandbSpec()
    """One W&B run for the whole job, however often it is resumed."""

    mlflow: MlflowSpec | None = None
    """One MLflow run for the whole job: `mlflow: {}`, or with the keys below."""

    tensorboard: bool = False
    """Write TensorBoard's event files to `tensorboard/` in the run's folder; requires
    `pip install 'forge-train[tensorboard]'`."""

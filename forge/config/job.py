"""The job: what is wanted. The sections follow the way of a job, from model to tracking."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from forge.config.data import DataSpec
from forge.config.model import ModelSpec
from forge.config.resources import CheckpointSpec, ResourcesSpec, TrackingSpec
from forge.config.search import SearchSpec
from forge.config.section import FieldError, Section
from forge.config.training import TrainingSpec

_NAME = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"


class JobSpec(Section):
    """What is trained, on which text, for how long, and where it runs."""

    name: str = Field(max_length=48, json_schema_extra={"pattern": _NAME})
    """Lower-case letters, digits and dashes; the first part of every run's id."""

    model: ModelSpec
    """Which network is trained."""

    data: DataSpec
    """Which text, which tokens, in which order."""

    training: TrainingSpec
    """What is minimised, for how long, and how."""

    checkpoint: CheckpointSpec = CheckpointSpec()
    """Durable copies of the training state."""

    resources: ResourcesSpec = ResourcesSpec()
    """What the run asks of the cluster."""

    tracking: TrackingSpec = TrackingSpec()
    """Where metrics go besides `metrics.jsonl`."""

    search: SearchSpec | None = None
    """Many trials in the place of one run: `forge tune`."""

    @model_validator(mode="after")
    def _search_is_elastic(self) -> JobSpec:
        if self.search is not None and self.resources.engine != "elastic":
            raise FieldError("resources.engine", "carries no search: it needs engine: elastic", nearest="elastic")
        return self

    @field_validator("name")
    @classmethod
    def _is_plain(cls, value: str) -> str:
        if not re.fullmatch(_NAME[1:-1], value):
            raise ValueError("must be lower-case letters, digits and dashes, such as 'pretrain-stdlib'")
        return value

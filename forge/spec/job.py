"""The job: what is wanted. The sections follow the way of a job, from model to tracking."""

from __future__ import annotations

from pydantic import Field

from forge.spec.data import DataSpec
from forge.spec.model import ModelSpec
from forge.spec.resources import CheckpointSpec, ResourcesSpec, TrackingSpec
from forge.spec.section import Section
from forge.spec.training import TrainingSpec


class JobSpec(Section):
    """One job file, typed, frozen and strict."""

    name: str = Field(min_length=1, max_length=48, pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
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

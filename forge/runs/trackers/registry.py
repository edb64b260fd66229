"""The trackers that a job can name under `tracking:`, and the packages that they need.

A new tracker is one file in this folder, a key of `TrackingSpec`, and one entry in each function here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from forge.config.load import LoadedJob
from forge.config.resources import TrackingSpec
from forge.runs.trackers.base import TrackedRun, Tracker
from forge.runs.trackers.mlflow_tracker import MlflowTracker, credentials_problem
from forge.runs.trackers.tensorboard_tracker import TensorboardTracker
from forge.runs.trackers.wandb_tracker import WandbTracker


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackerPackage:
    """A package that a tracker needs and forge's own dependencies do not include."""

    key: str
    """Of the job file."""
    package: str
    extra: str
    """Of forge-train, which installs it."""

    @property
    def version(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f"pip install 'forge-train[{self.extra}]'"


PACKAGES = (
    TrackerPackage(key="tracking.mlflow", package="mlflow-skinny", extra="mlflow"),
    TrackerPackage(key="tracking.tensorboard", package="tensorboard", extra="tensorboard"),
)


def build_trackers(spec: TrackingSpec, run: TrackedRun) -> list[Tracker]:
    """Build the trackers that a job names; none is started."""
    trackers: list[Tracker] = []
    if spec.wandb.mode != "disabled":
        trackers.append(WandbTracker(spec.wandb, run))
    if spec.mlflow is not None:
        trackers.append(MlflowTracker(spec.mlflow, run))
    if spec.tensorboard:
        trackers.append(TensorboardTracker(run))
    return trackers


def require_credentials(loaded: LoadedJob) -> None:
    """Check that the credentials of the environment are for the servers that a job names. Raises: JobFileError."""
    if problem := _credentials_problem(loaded.job.tracking):
        raise loaded.source.error("tracking.mlflow.uri", problem, show_value=False)


def require_packages(loaded: LoadedJob) -> None:
    """Check that a job's trackers can run on this machine.

    Raises: JobFileError with the line of a tracker whose package is missing, and the command that installs it.
    """
    for missing in _missing(loaded.job.tracking):
        raise loaded.source.error(missing.key, f"requires {missing.package}: {missing.remedy}", show_value=False)


def package_warnings(spec: TrackingSpec) -> tuple[str, ...]:
    """Return one sentence for each package that a job's trackers need and this machine lacks."""
    return tuple(
        f"{missing.key} requires {missing.package}, which is not installed on this machine: {missing.remedy}"
        for missing in _missing(spec)
    )


def tracking_problem(spec: TrackingSpec) -> str | None:
    """Return why a job's trackers cannot be used on this machine; None if they can."""
    return next(iter(package_warnings(spec)), None) or _credentials_problem(spec)


def _credentials_problem(spec: TrackingSpec) -> str | None:
    return credentials_problem(spec.mlflow) if spec.mlflow is not None else None


def _missing(spec: TrackingSpec) -> list[TrackerPackage]:
    wanted = {"tracking.mlflow": spec.mlflow is not None, "tracking.tensorboard": spec.tensorboard}
    return [package for package in PACKAGES if wanted[package.key] and package.version is None]

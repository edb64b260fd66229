"""Load a job file or cluster file: from a path and `--set` overrides to a typed, validated object.

All problems of the file and of `--set` are reported in one JobFileError, each with its line. A job comes with a map
of its lines, so that later checks, which know more than its types, can also name the line.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from forge.code_archive import PackedCode
from forge.config.alerts import AlertsSpec, webhook_in_file_problem, webhook_problem
from forge.config.cluster import SECTIONS, ClusterSpec
from forge.config.data import DataSpec
from forge.config.errors import field_errors
from forge.config.evaluate import EvaluateSpec
from forge.config.job import JobSpec
from forge.config.locations import SourceMap, combined, map_source, parent_key
from forge.config.model import ModelSpec
from forge.config.paths import with_home_folders
from forge.config.resources import CheckpointSpec, ResourcesSpec, TrackingSpec
from forge.config.search import SearchSpec
from forge.config.secret import SECRET_PROBLEM, is_secret
from forge.config.section import Section
from forge.config.task import TaskSpec
from forge.config.templates import templates_of
from forge.config.training import TrainingSpec
from forge.config.yaml_reader import YamlNode, compose, join_key, read_text
from forge.errors import JobFileError

_MAX_NAMES = 16
_MAX_ROUNDS = 6
_MAPPINGS = ("search.space", "search.proxy")
_S = TypeVar("_S", bound=Section)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedJob:
    """A job, and the location of each key in its file; its sections read `loaded.training.total_steps`."""

    job: JobSpec
    source: SourceMap
    code: PackedCode | None = None
    """What to use instead of the folder of `code:`; given for a resumed run, which keeps its own code."""
    data_folder: str | None = None
    """The folder that relative paths of `data:` refer to; None is the current one. Given for a resumed run."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Texts in which `${env:NAME}` was replaced, by the JSON pointer of their key; written files keep them."""

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def model(self) -> ModelSpec:
        return self.job.model

    @property
    def data(self) -> DataSpec:
        return self.job.data

    @property
    def training(self) -> TrainingSpec:
        return self.job.training

    @property
    def checkpoint(self) -> CheckpointSpec:
        return self.job.checkpoint

    @property
    def resources(self) -> ResourcesSpec:
        return self.job.resources

    @property
    def evaluate(self) -> EvaluateSpec | None:
        return self.job.evaluate

    @property
    def tracking(self) -> TrackingSpec:
        return self.job.tracking

    @property
    def alerts(self) -> AlertsSpec | None:
        return self.job.alerts

    @property
    def search(self) -> SearchSpec | None:
        return self.job.search


def load_job(path: str | Path, *, overrides: Sequence[str] = ()) -> LoadedJob:
    """Read a job file.

    Args:
        path: a YAML file.
        overrides: as for `--set`, such as `training.optimizer.lr=1e-3`; the value is YAML, the last one wins.

    Raises: JobFileError with all problems, in the order of the file.
    """
    return load_job_text(read_text(Path(path)), path=str(path), overrides=overrides)


def load_job_text(text: str, *, path: str, overrides: Sequence[str] = ()) -> LoadedJob:
    """As `load_job`, of the text of a file.

    Args:
        path: what errors call it.
    """
    errors: list[JobFileError] = []
    parts = "a job needs at least a name, a model, data and training"
    root = _parsed(text, path=path, errors=errors, parts=parts, keys="model")
    for override in overrides:
        root = _with_override(root, override, errors=errors)
    source = map_source(root, path=path)
    job = _validated(root, JobSpec, source=source, errors=errors)
    unread = {"data": job.data.unread_sections(), "training": job.training.unread_sections()}
    if problems := [source.error(f"{key}.{one.key}", str(one)) for key, found in unread.items() for one in found]:
        raise combined(problems)
    job = with_home_folders(job, fail=source.error)
    templates = templates_of(root)
    if job.alerts is not None and job.alerts.webhook is not None:
        check = webhook_problem if "/alerts/webhook" in templates else webhook_in_file_problem
        if problem := check(job.alerts.webhook):
            raise source.error("alerts.webhook", problem, show_value=False)
    return LoadedJob(job=job, source=source, templates=templates)


def load_cluster(path: str | Path) -> ClusterSpec:
    """Read a cluster file.

    Raises: JobFileError with all problems, in the order of the file.
    """
    errors: list[JobFileError] = []
    parts = "a cluster needs at least a name and a provider"
    root = _parsed(read_text(Path(path)), path=str(path), errors=errors, parts=parts, keys="provider")
    source = map_source(root, path=str(path))
    provider = root.value["provider"].value if "provider" in root.value else None
    section = SECTIONS.get(provider) if isinstance(provider, str) else None
    if section is None:
        known = ", ".join(SECTIONS)
        near = difflib.get_close_matches(str(provider).lower(), SECTIONS, n=1)
        problem = f"must be one of {known}" if provider is not None else f"is missing; give one of {known}"
        raise source.error("provider", problem, nearest=near[0] if near else None)
    return _validated(root, section, source=source, errors=errors)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedTask:
    """A task of `forge eval`, and the location of each key in its file."""

    task: TaskSpec
    source: SourceMap


def load_task(path: str | Path) -> LoadedTask:
    """Read a task file.

    Raises: JobFileError with all problems, in the order of the file.
    """
    return load_task_text(read_text(Path(path)), path=str(path))


def load_task_text(text: str, *, path: str) -> LoadedTask:
    """As `load_task`, of the text of a file.

    Args:
        path: what errors call it.
    """
    errors: list[JobFileError] = []
    parts = "a task needs at least a name, a kind, data, a target and metrics"
    root = _parsed(text, path=path, errors=errors, parts=parts, keys="kind")
    source = map_source(root, path=path)
    task = _validated(root, TaskSpec, source=source, errors=errors)
    return LoadedTask(task=task, source=source)


def _parsed(text: str, *, path: str, errors: list[JobFileError], parts: str, keys: str) -> YamlNode:
    """Return the nodes of a file, whose top level is a mapping."""
    root = compose(text, path=path, errors=errors)
    if root.value is None:
        raise JobFileError(f"is empty; {parts}", path=path)
    if not isinstance(root.value, dict):
        raise JobFileError(f"must contain keys such as 'name:' and '{keys}:'", path=path, line=root.line)
    return root


def _validated(root: YamlNode, section: type[_S], *, source: SourceMap, errors: list[JobFileError]) -> _S:
    """Validate a whole file.

    A section with an invalid key is not checked as a whole, nor are sections against each other. So invalid keys
    are left out, one round after the other, until nothing new is found.

    Raises: JobFileError with all problems.
    """
    body = root.plain()
    removed: set[str] = set()
    for _ in range(_MAX_ROUNDS):
        try:
            found = section.model_validate(body)
            break
        except ValidationError as error:
            more = field_errors(error, root=section, source=source, reported=errors, removed=removed)
        errors += more
        invalid = [error for error in more if error.key and _remove(body, error.key)]
        if not invalid:
            break
        for found_error in invalid:
            removed |= {found_error.key or "", *_meant_by(found_error)}
    if errors:
        raise combined(errors)
    return found


def _meant_by(error: JobFileError) -> set[str]:
    """The keys that an unknown key may stand for."""
    return {join_key(parent_key(error.key or ""), error.nearest), error.nearest} if error.nearest else set()


def _remove(body: Any, key: str) -> bool:
    """Remove a dotted key from nested mappings; whole lists are removed. Returns: whether it was there."""
    *sections, name = key.partition("[")[0].split(".")
    for section in sections:
        body = body.get(section) if isinstance(body, dict) else None
    return isinstance(body, dict) and body.pop(name, body) is not body


def _with_override(root: YamlNode, override: str, *, errors: list[JobFileError]) -> YamlNode:
    """Return the job with one `--set` applied, or unchanged, with the error collected, if it is not valid."""
    key, equals, text = override.partition("=")
    key = key.strip()
    names = _names_of(key)
    if any(is_secret(name.strip()) for name in names):
        errors.append(JobFileError(SECRET_PROBLEM, path="--set", key=key))
    elif not equals or not all(names) or len(names) > _MAX_NAMES:
        errors.append(
            JobFileError(
                "write a dotted key and a value, such as training.optimizer.lr=1e-3", path="--set", value=override
            )
        )
    else:
        try:
            return _placed(root, names, compose(text, path="--set", key=key, errors=errors), parent="")
        except JobFileError as error:
            errors.append(error)
    return root


def _names_of(key: str) -> list[str]:
    """Split a dotted key; below a mapping whose keys are dotted keys of the job, the rest is one name."""
    for mapping in _MAPPINGS:
        if key.startswith(f"{mapping}."):
            return [*mapping.split("."), key[len(mapping) + 1 :]]
    return key.split(".")


def _placed(section: YamlNode, names: Sequence[str], value: YamlNode, *, parent: str) -> YamlNode:
    """Return the section with `value` set at the path `names`, creating missing sections on the way."""
    name, *rest = names
    children = {} if section.value is None else section.value
    if not isinstance(children, dict):
        problem = f"'{parent}' is a value and has no keys below it"
        raise JobFileError(problem, path="--set", key=join_key(parent, ".".join(names)))
    if rest:
        empty = YamlNode(value={}, line=None, text="{...}")
        value = _placed(children.get(name, empty), rest, value, parent=join_key(parent, name))
    return replace(section, value={**children, name: value}, text="{...}")

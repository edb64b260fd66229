"""From a job to a run: resolve the plan, make the run's folder, start the process that carries it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from forge.checkpoint.storage import open_storage
from forge.cluster.local.ray_cluster import find_local
from forge.cluster.local.ray_process import session_members
from forge.config.data import TokenizerSpec
from forge.config.dump import dump_job
from forge.config.job import JobSpec
from forge.config.load import LoadedJob
from forge.config.overrides import check_space, trial_job, usual_values
from forge.data.prepare import PrepareProgress, default_cache_dir, prepare
from forge.data.tokenizer import load_tokenizer
from forge.errors import ArgumentError
from forge.plan.inputs import CorpusInfo, HardwareInfo
from forge.plan.plan import Plan, config_digest, make_plan, plan_from_json, plan_to_json
from forge.plan.search import changed_keys, plan_search
from forge.runs.reader import driver_pid, is_alive
from forge.runtime.probe import hardware, model_facts, places_here

_POLL_S = 0.05
_PROBE_PATIENCE_S = 5.0


class RunHandle(Protocol):
    """A run in progress, wherever it is carried; its records come to its folder here."""

    @property
    def folder(self) -> Path:
        """The run's, on this machine."""

    def is_alive(self) -> bool:
        """Whether records may still come."""

    def request_stop(self) -> None:
        """Ask the run to checkpoint and stop; the second time, to stop at once. Returns at once."""

    def end(self) -> None:
        """Return once nobody carries the run any more, and nothing of it is left."""

    def news(self) -> list[str]:
        """What there is to say since the last time of how the run is reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRun:
    """A run that a process of this machine carries."""

    folder: Path
    pid: int
    """Of that process."""

    def is_alive(self) -> bool:
        """Whether it runs."""
        return is_alive(self.pid)

    def request_stop(self) -> None:
        """By a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)

    def end(self) -> None:
        """Wait for it, and end what it has left if it was killed.

        Its ranks end by themselves; Ray's agents would try for a minute to tell someone that the others died.
        """
        wait_until_free(self.folder)
        if not is_alive(self.pid):
            for process in session_members(self.pid):
                with contextlib.suppress(psutil.Error):
                    process.kill()

    def news(self) -> list[str]:
        """It is reached as long as this machine is."""
        return []


def resolve(
    loaded: LoadedJob,
    *,
    is_dry_run: bool,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    find_hardware: Callable[[JobSpec], HardwareInfo] = hardware,
    count_slots: Callable[[HardwareInfo, JobSpec], int] = places_here,
) -> Plan:
    """Make the plan of a job: prepare its corpus, count its model, look at the hardware.

    A dry run prepares no corpus, unless the length of the training depends on it. Of a search it is the plan of a
    trial with the job's own values, after all of them were tried on the job's types.

    Args:
        find_hardware: what a worker of the job gets, where it will run.
        count_slots: how many workers there is room for there.

    Raises: JobFileError, DataError, PlanError.
    """
    if loaded.job.search is not None:
        check_space(loaded)
        plan = resolve(
            replace(loaded, job=trial_job(loaded.job, usual_values(loaded.job))),
            is_dry_run=is_dry_run,
            on_progress=on_progress,
            find_hardware=find_hardware,
        )
        _require_judges(plan, loaded)
        places = count_slots(plan.hardware, loaded.job)
        return replace(plan, job=loaded.job, search=plan_search(loaded.job, loaded.job.search, num_places=places))
    job = loaded.job
    corpus: CorpusInfo | None = None
    if not is_dry_run or job.training.epochs is not None:
        corpus = prepare(job.data, cache_dir=default_cache_dir(), on_progress=on_progress)
        vocab_size, eot_id = corpus.vocab_size, corpus.eot_id
    else:
        vocab_size, eot_id = _announced_vocabulary(job.data.tokenizer)
    model = model_facts(loaded, vocab_size=vocab_size, eot_id=eot_id)
    return make_plan(job, model=model, corpus=corpus, hardware=find_hardware(job))


def _require_judges(plan: Plan, loaded: LoadedJob) -> None:
    """Raises: JobFileError if a corpus is too small for anything to be held out, which trials are judged on."""
    assert loaded.job.search is not None, "only a search has trials"
    metric, corpus = loaded.job.search.metric, plan.corpus
    if metric.startswith("eval/") and corpus is not None and not corpus.num_held_out_sequences:
        raise loaded.source.error(
            "data.held_out",
            f"leaves no sequence of {corpus.seq_len} tokens to measure {metric} on, by which trials are judged",
        )


def create_run(plan: Plan, *, root: str | None = None) -> Path:
    """Make the folder of a new run: `job.yaml`, `plan.json`, the tokenizer.

    Args:
        root: the folder for it; by default that of the job.

    Raises: ArgumentError if it cannot be written, or its checkpoints could not be.
    """
    assert plan.corpus is not None, "a run is created from a full plan"
    run_id = f"{plan.job.name}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    folder = Path(root or plan.job.checkpoint.runs) / run_id
    _require_writable(plan.job.checkpoint.url_of(str(folder)))
    make_folder(folder, plan)
    return folder


def make_folder(folder: Path, plan: Plan) -> None:
    """Fill a new run's folder, or that of a trial that goes on with other values.

    Raises: ArgumentError if it cannot be written; there is none then.
    """
    assert plan.corpus is not None, "a run is created from a full plan"
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        shutil.copytree(Path(plan.corpus.folder) / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        (folder / "job.yaml").write_text(dump_job(plan.job))
        (folder / "plan.json").write_text(plan_to_json(plan))
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArgumentError(
            f"the run's folder {folder} cannot be written: {error.strerror or error}; "
            "set checkpoint.to to a folder you own"
        ) from error


def reopen_run(folder: Path, plan: Plan) -> None:
    """Give a run that ended early a fresh plan, to be carried on from its newest checkpoint.

    Raises: ArgumentError if the plan would change the loss curve, or what a search's trials are judged by.
    """
    before = plan_from_json((folder / "plan.json").read_text())
    if config_digest(before.job) != config_digest(plan.job):
        raise ArgumentError(
            f"{folder.name} cannot be resumed with another model, data or training section: its loss curve would "
            "no longer be one curve; start a new run instead"
        )
    changed = changed_keys(before.job.search, plan.job.search)
    if changed:
        raise ArgumentError(
            f"{folder.name} cannot be resumed with another {changed[0]}: its trials until now and those to come "
            "would not belong together; start a new search instead (search.max_trials, max_hours, max_usd and "
            "trials_at_once may change)"
        )
    _require_writable(plan.job.checkpoint.url_of(str(folder)))
    draft = folder / "plan.json.draft"
    draft.write_text(plan_to_json(plan))
    draft.replace(folder / "plan.json")


def start_driver(folder: Path) -> LocalRun:
    """Start the process that carries a run, apart from this one; return once it has taken the run over.

    On the cluster that is up on this machine, else on one of its own that ends with it. A process that
    ends before it takes the run over has said why in `logs/run.log`.
    """
    cluster = find_local()
    command = [sys.executable, "-P", "-m", "forge.runtime.driver", str(folder)]
    if cluster is not None:
        command += ["--address", cluster.address]
    with (folder / "logs" / "run.log").open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        while driver_pid(folder) != process.pid and process.poll() is None:
            time.sleep(_POLL_S)
    except BaseException:  # Ctrl-C: nobody would know of it
        process.terminate()
        raise
    return LocalRun(folder=folder, pid=process.pid)


def wait_until_free(folder: Path) -> None:
    """Return once no process carries the run any more."""
    while driver_pid(folder) is not None:
        time.sleep(_POLL_S)


def _require_writable(url: str) -> None:
    """Try an object store with a small object before machines are paid for.

    Raises: ArgumentError, CheckpointError.
    """
    if "://" not in url:
        return
    storage = open_storage(url, patience_s=_PROBE_PATIENCE_S)
    try:
        storage.write(".probe/empty", lambda: [b""])
        storage.drop(".probe", ["empty"])
    except OSError as error:
        raise ArgumentError(f"checkpoint.to: nothing can be written to {url}: {error}") from error


def _announced_vocabulary(spec: TokenizerSpec) -> tuple[int, int]:
    """Vocabulary size and end-of-text id before the corpus is prepared; a trained one keeps id 0 for it."""
    if spec.from_pretrained is None:
        return spec.vocab_size, 0
    tokenizer = load_tokenizer(spec.from_pretrained)
    return tokenizer.vocab_size, tokenizer.eot_id

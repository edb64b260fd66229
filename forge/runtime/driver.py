"""The driver process of one run: `python -m forge.runtime.driver RUN_FOLDER [--address ADDRESS]`.

It is independent of the client that started it. It connects to a Ray cluster, or starts one that ends with it;
starts the recorder actor; runs the plan's engine or search; generates a sample of text; and records how the run
ended.
SIGTERM once: checkpoint, then stop. Twice: stop at once.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

from forge.checkpoint.manifest import step_name
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import stored_steps
from forge.code_archive import restore_code
from forge.environment import adopt_environment
from forge.errors import CheckpointError, ForgeError, RunError
from forge.events import (
    CheckpointSaved,
    Event,
    KilledForMemory,
    RunFailed,
    RunFinished,
    RunStopped,
    SampleFailed,
    SampleGenerated,
    event_to_record,
)
from forge.plan.plan import Plan, plan_from_json, plan_to_json
from forge.process import first_line
from forge.redact import redact_output
from forge.runs.alerts.run_alerts import start_alerts
from forge.runs.lock import LOCK
from forge.runs.reader import error_named, read_run
from forge.runs.recorder import append_event, last_recorded_step
from forge.runs.secrets import credentials
from forge.runtime.actor_names import HEAD, NAMESPACE, RECORDER
from forge.runtime.driver_lock import acquire_lock
from forge.runtime.driver_watch import watch_run
from forge.runtime.ray_connection import connect, prepare_connection
from forge.runtime.start_events import start_events

_STOP_REPEAT_S = 1.0
_STORAGE_PATIENCE_S = 5.0
_END_S = 15.0
"""How long the actors of a run may take to end before this process ends without them."""
_CLOSE_TIMEOUT_S = 120.0
"""Longer than the recorder waits for the trackers at the end."""


def main() -> None:
    """Drive the run whose folder is the command line's argument."""
    parser = argparse.ArgumentParser(prog="python -m forge.runtime.driver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    redact_output()
    adopt_environment()
    driver = Driver(folder, address=arguments.address)
    signal.signal(signal.SIGTERM, driver.on_signal)
    lock = acquire_lock(folder / LOCK)
    exit_code = driver.run()
    lock.close()  # everything is written; clients need not wait until Ray has shut down
    driver.disconnect()
    driver.write_report()
    sys.exit(exit_code)


class Driver:
    """One run, from connecting to the cluster to the last event."""

    _plan: Plan

    def __init__(self, folder: Path, *, address: str | None) -> None:
        self._began = time.monotonic()
        self._folder = folder
        self._address = address
        self._recorder: Any = None
        self._stop_reason = ""
        self._search_stop_reason: str | None = ""
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._kills: list[KilledForMemory] = []
        self._ending = threading.RLock()
        """Taken by the thread that records how the run ends, and never released."""

    def run(self) -> int:
        """Drive the run to its end. Returns: its exit code."""
        try:
            self._plan = plan_from_json((self._folder / "plan.json").read_text())
            if self._plan.code is not None:
                restore_code(self._plan.code.digest, run_folder=self._folder)
            self._connect()
            self._start_recorder()
            watch = {"is_over": self._is_over, "record": self._record_kill, "end": self._end_at_once}
            threading.Thread(target=watch_run, args=(self._folder,), kwargs=watch, daemon=True).start()
            self._train()
            self._ending.acquire()
            self._end()
            self._close(exit_code=0)
            return 0
        except SystemExit:  # SIGTERM arrived during ray.init, whose signal handler had replaced ours
            append_event(self._folder, RunStopped(step=last_recorded_step(self._folder)))
            return 0
        except ForgeError as error:
            self._ending.acquire()
            self._fail(error)
            return error.exit_code
        except Exception as error:
            traceback.print_exc()
            self._ending.acquire()
            self._fail(RunError(f"{type(error).__name__}: {first_line(error)}"))
            return RunError.exit_code

    def on_signal(self, number: int, frame: object) -> None:
        """Request a checkpoint and a stop; the second time, exit at once. Ray's processes end with this one."""
        if self._stop.is_set():
            os._exit(128 + number)
        self._stop.set()

    def disconnect(self) -> None:
        """Disconnect from the cluster; one that was started for this run ends."""
        import ray

        self._is_over.set()
        ray.shutdown()

    def write_report(self) -> None:
        """Write report.html of a run, at its very end: nothing waits for it, and it changes no exit code."""
        from forge.report.run_report import write_end_report

        problem = write_end_report(self._folder)
        if problem is not None:
            sys.stderr.write(f"{problem}\n")

    def _connect(self) -> None:
        prepare_connection(self._address)
        if self._plan.job.resources.engine == "ray-train":
            threading.Thread(target=_import_train, daemon=True).start()
        if self._plan.search is not None:
            threading.Thread(target=_import_search, daemon=True).start()
        # If Ray gets no answer, it ends this process without an exception: the log says what it was doing.
        where = self._address or "a new cluster on this machine"
        _log(f"connecting to Ray ({where}); Ray ends this process if it gets no answer")
        # The minimum of workers always has slots, if need be several ranks per core.
        connect(self._address, min_cpus=self._plan.job.resources.workers.low)
        _log("connected to Ray")
        signal.signal(signal.SIGTERM, self.on_signal)  # ray.init has replaced it

    def _start_recorder(self) -> None:
        import ray

        from forge.runtime.local_cluster import is_local_cluster
        from forge.runtime.recorder_actor import RecorderActor

        run_id = self._folder.name
        name = f"{RECORDER}{run_id}"
        is_new = not any(actor["name"] == name for actor in ray.util.list_named_actors(all_namespaces=True))
        self._recorder = RecorderActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace=NAMESPACE,
            # A search ends with its driver; a training run continues without one.
            lifetime=None if self._plan.search else "detached",
            get_if_exists=True,
            resources=HEAD,
        ).remote(
            str(self._folder),
            run_id,
            plan_to_json(self._plan),
            credentials(os.environ, with_files=is_local_cluster()),
        )
        if is_new:  # otherwise this driver replaces one that was killed
            step = last_recorded_step(self._folder)
            began_s = time.monotonic() - self._began
            for event in start_events(self._plan, folder=self._folder, step=step, startup_s=began_s):
                self._record(event)
            if step:
                self._record_stored()
        threading.Thread(target=self._forward_stop, daemon=True).start()

    def _train(self) -> None:
        import ray

        if self._stop.is_set():
            return
        if self._plan.search is not None:
            from forge.search.coordinator import run_search

            self._search_stop_reason = run_search(
                self._plan, folder=self._folder, recorder=self._recorder, stop=self._stop
            )
            return
        if self._plan.job.resources.engine == "elastic":
            from forge.runtime.elastic_engine import train_elastically

            self._stop_reason = train_elastically(
                self._plan,
                run_folder=self._folder,
                recorder=self._recorder,
                address=self._address,
                stop=self._stop,
            )
            return
        from forge.runtime.ray_train import train_on_ray

        try:
            train_on_ray(self._plan, run_folder=self._folder, run_id=self._folder.name, recorder=self._recorder)
        except ForgeError:
            raise
        except Exception as error:
            failure: RunFailed | None = ray.get(self._recorder.failure.remote())
            if failure is None:
                raise RunError(f"{first_line(error)}; the ranks' logs are in {self._folder / 'logs'}") from error
            raise error_named(failure.error, message=failure.message) from error

    def _add_sample(self, step: int) -> None:
        """Record a sample of generated text or, since the run itself has finished, why there is none."""
        began = time.monotonic()
        from forge.inference.sample import sample

        try:
            made = sample(self._plan, run_folder=self._folder)
        except Exception as error:
            traceback.print_exc()
            reason = str(error) if isinstance(error, ForgeError) else f"{type(error).__name__}: {first_line(error)}"
            self._record(SampleFailed(step=step, reason=reason, seconds=time.monotonic() - began))
            return
        seconds = time.monotonic() - began
        self._record(SampleGenerated(step=made.step, prompt=made.prompt, text=made.text, seconds=seconds))

    def _record_stored(self) -> None:
        """Record the checkpoints that no rank has reported, because a writer process outlived it."""
        if self._plan.search is not None:
            return
        url = self._plan.job.checkpoint.url_of(str(self._folder))
        try:
            stored = stored_steps(open_storage(url, patience_s=_STORAGE_PATIENCE_S))
        except CheckpointError:
            traceback.print_exc()  # the run itself does not depend on it
            return
        for step, size_bytes in stored.items():
            folder = f"{url}/{step_name(step)}"
            self._record(
                CheckpointSaved(step=step, folder=folder, size_bytes=size_bytes, seconds=math.nan, stall_s=math.nan)
            )

    def _record(self, event: Event) -> None:
        self._recorder.event.remote(event)

    def _end_at_once(self, error: ForgeError) -> None:
        """End the run and this process, whatever its main thread waits for; return if that is ending the run."""
        if not self._ending.acquire(blocking=False):
            return
        sys.stderr.write(f"{error}\n")
        self._is_over.set()
        if (self._folder / LOCK).exists():
            self._fail(error, timeout_s=_END_S)
        ending = threading.Thread(target=self._end_actors, daemon=True)
        ending.start()
        ending.join(_END_S)
        os._exit(error.exit_code)

    def _end_actors(self) -> None:
        """End all actors of the run, and the cluster if it was started for this run."""
        import ray

        ray.kill(self._recorder)
        if self._plan.job.resources.engine == "elastic" and self._plan.search is None:
            from forge.runtime.elastic_engine import clear_run

            clear_run(self._folder.name)
        ray.shutdown()

    def _fail(self, error: ForgeError, *, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        failed = RunFailed(error=type(error).__name__, message=str(error))
        try:
            self._record_stored()
            self._record(failed)  # an actor keeps the order of calls, so this is written before it closes
            self._close(exit_code=error.exit_code, timeout_s=timeout_s)
        except Exception:  # without a recorder this process is the only writer
            self._end_recorder()
            written = [event.items() for event in read_run(self._folder).events]
            missing: tuple[Event, ...] = (*self._kills, failed)
            for event in missing:
                if not any(event_to_record(event).items() <= items for items in written):
                    append_event(self._folder, event)
            if hasattr(self, "_plan"):
                record = partial(append_event, self._folder)
                alerts = start_alerts(self._plan, folder=self._folder, record=record)
                if alerts is not None:
                    alerts.close()

    def _record_kill(self, kill: KilledForMemory) -> None:
        self._kills.append(kill)
        self._record(kill)

    def _end_recorder(self) -> None:
        """End the recorder, so that this process can write: it may be alive, but restarted all the time."""
        import ray

        if self._recorder is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._recorder)

    def _end(self) -> None:
        """Record that the run has finished or was stopped."""
        if self._plan.search is not None:
            self._end_search()
            return
        self._record_stored()
        step = last_recorded_step(self._folder)
        if step < self._plan.total_steps and not read_run(self._folder).is_stopped_early:
            self._record(RunStopped(step=step, reason=self._stop_reason))
            return
        self._add_sample(step)
        self._score_tasks(step)
        self._record(RunFinished(step=step))

    def _score_tasks(self, step: int) -> None:
        """Score the run in the tasks of its job, on the slots that its workers have left."""
        if not self._plan.tasks or self._stop.is_set():
            return
        import ray

        from forge.runtime.score_tasks import score_tasks

        if self._plan.job.resources.engine == "elastic":
            from forge.runtime.elastic_engine import clear_run

            clear_run(self._folder.name)
        address = ray.get_runtime_context().gcs_address
        score_tasks(self._plan, folder=self._folder, step=step, address=address, record=self._record)

    def _end_search(self) -> None:
        """Record that every trial is over, or that the search was stopped."""
        if self._search_stop_reason is None:
            self._record(RunFinished(step=0))
        else:
            self._record(RunStopped(step=0, reason=self._search_stop_reason))

    def _close(self, *, exit_code: int, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        import ray

        ray.get(self._recorder.close.remote(exit_code), timeout=timeout_s)
        if self._plan.job.resources.engine == "elastic" and self._plan.search is None:
            from forge.runtime.elastic_engine import clear_run

            clear_run(self._folder.name)
        ray.kill(self._recorder)

    def _forward_stop(self) -> None:
        """Forward a stop request to the recorder, repeatedly, because a restarted recorder forgets it."""
        self._stop.wait()
        while not self._is_over.is_set():
            self._recorder.request_stop.remote()
            self._is_over.wait(_STOP_REPEAT_S)


def _log(text: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
    sys.stderr.flush()


def _import_train() -> None:
    """Import Ray Train (torch, pandas) while Ray's own processes start."""
    import forge.runtime.ray_train  # noqa: F401


def _import_search() -> None:
    """Import Ray Tune and Optuna while Ray's own processes start."""
    import forge.search.coordinator  # noqa: F401


if __name__ == "__main__":
    main()

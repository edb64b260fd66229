"""The process that carries one run: `python -m forge.runtime.driver RUN_FOLDER [--address ADDRESS]`.

It lives apart from whoever asked for the run, which may go away. It connects to the cluster that is
up, or starts one inside itself that ends with it; starts the recorder; hands the plan to the engine;
adds a sample of text; and says how it ended. SIGTERM once: checkpoint, then stop; twice: stop now.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from forge.cluster.local.ray_cluster import require_private_token
from forge.errors import ClusterError, ForgeError, RunError
from forge.events import Event, RunFailed, RunFinished, RunStarted, RunStopped, SampleGenerated
from forge.plan.plan import Plan, plan_from_json
from forge.runs.reader import error_named
from forge.runs.recorder import append_event, last_recorded_step
from forge.runs.secrets import credentials

_STOP_REPEAT_S = 1.0
_LOCK_PATIENCE_S = 1.0
_SAMPLE_PROMPTS = {"python-stdlib": "def "}
_SAMPLE_TOKENS = 64


def main() -> None:
    """Carry the run of the folder that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m forge.runtime.driver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    carrier = Driver(folder, address=arguments.address)
    signal.signal(signal.SIGTERM, carrier.on_signal)
    lock = _take(folder / ".lock")
    exit_code = carrier.carry()
    lock.close()  # all is written: whoever waits for the run need not wait for Ray to shut down
    carrier.disconnect()
    sys.exit(exit_code)


class Driver:
    """One run, from connecting to the last event."""

    _plan: Plan

    def __init__(self, folder: Path, *, address: str | None) -> None:
        self._folder = folder
        self._address = address
        self._recorder: Any = None
        self._stop_reason = ""
        self._halt_reason: str | None = ""
        self._stop = threading.Event()
        self._is_over = threading.Event()

    def carry(self) -> int:
        """Returns: the exit code of the run."""
        try:
            self._plan = plan_from_json((self._folder / "plan.json").read_text())
            self._connect()
            self._start_recorder()
            self._train()
            self._end()
            self._close(exit_code=0)
            return 0
        except SystemExit:  # asked to stop while Ray started, with Ray's own handler in ours' place
            append_event(self._folder, RunStopped(step=last_recorded_step(self._folder)))
            return 0
        except ForgeError as error:
            self._fail(error)
            return error.exit_code
        except Exception as error:
            traceback.print_exc()
            self._fail(RunError(f"{type(error).__name__}: {_first_line(error)}"))
            return RunError.exit_code

    def on_signal(self, number: int, frame: object) -> None:
        """Checkpoint and stop; the second time, stop now. Ray's processes end with this one."""
        if self._stop.is_set():
            os._exit(128 + number)
        self._stop.set()

    def disconnect(self) -> None:
        """Leave the cluster; one that was started for this run ends here."""
        import ray

        self._is_over.set()
        ray.shutdown()

    def _connect(self) -> None:
        require_private_token()
        if self._plan.job.resources.engine == "ray-train":
            threading.Thread(target=_import_train, daemon=True).start()
        if self._plan.search is not None:
            threading.Thread(target=_import_search, daemon=True).start()
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
        if self._address is None:
            # Ranks sharing cores is slow but right; the smallest world the job allows always has a place.
            cpus = max(os.cpu_count() or 1, self._plan.job.resources.workers.low)
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
            options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": 128 * 2**20}
        try:
            ray.init(self._address or "local", namespace="forge", **options)
        except Exception as error:  # Ray raises many unrelated classes here
            raise ClusterError(f"Ray at {self._address or 'this machine'}: {_first_line(error)}") from error
        signal.signal(signal.SIGTERM, self.on_signal)  # in the place of Ray's

    def _start_recorder(self) -> None:
        import ray

        from forge.runtime.recorder_actor import HEAD, RecorderActor

        run_id = self._folder.name
        name = f"recorder-{run_id}"
        is_new = not any(actor["name"] == name for actor in ray.util.list_named_actors(all_namespaces=True))
        self._recorder = RecorderActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace="forge",
            # A search is carried by this process alone, and ends with it; a run goes on.
            lifetime=None if self._plan.search else "detached",
            get_if_exists=True,
            resources=HEAD,
        ).remote(str(self._folder), run_id, self._plan.job.model_dump_json(), credentials(os.environ))
        if is_new:  # otherwise the run goes on, and it is only its carrier that has died
            step = last_recorded_step(self._folder)
            self._tell(RunStarted(run_id=run_id, total_steps=self._plan.total_steps, resumed_from_step=step))
        threading.Thread(target=self._pass_on_stop, daemon=True).start()

    def _train(self) -> None:
        import ray

        if self._stop.is_set():
            return
        if self._plan.search is not None:
            from forge.search.coordinator import run_search

            self._halt_reason = run_search(
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
                raise RunError(
                    f"{_first_line(error)}; the logs of the ranks are in {self._folder / 'logs'}"
                ) from error
            raise error_named(failure.error, message=failure.message) from error

    def _add_sample(self) -> None:
        """A few lines of text for whoever watches; not worth failing a run that has finished."""
        from forge.serve.generate import GenerateRequest, generate

        prompt = _SAMPLE_PROMPTS.get(self._plan.job.data.source or "", "")
        try:
            made = generate(self._folder, GenerateRequest(prompt=prompt, max_tokens=_SAMPLE_TOKENS))
        except Exception:
            traceback.print_exc()
            return
        self._tell(SampleGenerated(step=made.step, prompt=made.prompt, text=made.text))

    def _tell(self, event: Event) -> None:
        self._recorder.event.remote(event)

    def _fail(self, error: ForgeError) -> None:
        failed = RunFailed(error=type(error).__name__, message=str(error))
        try:
            self._tell(failed)  # answered before the close that follows, as an actor keeps the order
            self._close(exit_code=error.exit_code)
        except Exception:  # no recorder, or no Ray: this process is then the only writer
            append_event(self._folder, failed)

    def _end(self) -> None:
        """Say that the run reached its last step, with a sample of its text, or that it was stopped."""
        if self._plan.search is not None:
            self._end_search()
            return
        step = last_recorded_step(self._folder)
        if step < self._plan.total_steps:
            self._tell(RunStopped(step=step, reason=self._stop_reason))
            return
        self._add_sample()
        self._tell(RunFinished(step=step))

    def _end_search(self) -> None:
        """Say that every trial is over, or that the search was stopped."""
        if self._halt_reason is None:
            self._tell(RunFinished(step=0))
        else:
            self._tell(RunStopped(step=0, reason=self._halt_reason))

    def _close(self, *, exit_code: int) -> None:
        import ray

        ray.get(self._recorder.close.remote(exit_code))
        if self._plan.job.resources.engine == "elastic" and self._plan.search is None:
            from forge.runtime.elastic_engine import clear_run

            clear_run(self._folder.name)
        ray.kill(self._recorder)

    def _pass_on_stop(self) -> None:
        """Once asked to stop, keep saying so: the recorder may be restarted and forget."""
        self._stop.wait()
        while not self._is_over.is_set():
            self._recorder.request_stop.remote()
            self._is_over.wait(_STOP_REPEAT_S)


def _take(path: Path) -> TextIO:
    """The run's lock, with this process's id in it. Whoever asks for the id holds it for an instant."""
    lock = path.open("a+")
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                sys.exit(f"{path.parent} is being carried by another process")
            time.sleep(0.02)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _import_train() -> None:
    """Import Ray Train (torch, pandas) while Ray's own processes start."""
    import forge.runtime.ray_train  # noqa: F401


def _import_search() -> None:
    """And Ray Tune, Optuna."""
    import forge.search.coordinator  # noqa: F401


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


if __name__ == "__main__":
    main()

"""Plain Ray Tune over learning rates: a TorchTrainer for each trial, or a function that trains by itself.

    python -m benchmarks.peers.ray_tune REQUEST

REQUEST is JSON: model, vocab_size, seq_len, corpus (a folder of forge's token shards), data_seed, first_weights (a
file), learning_rates, total_steps, global_batch_size, evaluate_every, warmup_steps, final_fraction, weight_decay,
betas, eps, grad_clip, trials_at_once, folder, and how: `trainer` or `function`, is_tuned, has_dashboard. The last
line on stdout is each trial's last held-out loss, `{"<learning rate>": ...}`; `trials.jsonl` in the folder has a
line when a trial is suggested, one when it has made its first step, and one when all are over.

`trainer` is the way of Ray's user guide ("Hyperparameter Tuning with Ray Tune"): Tune runs a driver function for
each trial, which fits a TorchTrainer of one worker and passes its reports on by TuneReportCallback. Driver and
worker share a core: two drivers of one core each would leave no core of two to their workers, which would wait
forever. `function` trains in the trial's own process, which reuse_actors hands on with all that it has imported.

All without loggers, with reused actors and one thread a trial. Tuned, each because it shortens a trial:

    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.1   the controller sees reports, and the end, more often than every 2 s
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER=0   an actor less
    RAY_TRAIN_METRICS_ENABLED=0             no gauges for a dashboard
    ..._STRUCTURED_LOGGING=0                no log files of Ray Train's own

Without a dashboard, Ray Train's placement group cleaner may delay the end of a run: it queries the missing
dashboard for the controller, and no setting switches it off. With one (has_dashboard), Ray has more to do.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

_ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
_TUNED_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
}
_DRIVER_CPUS = 0.1
_OBJECT_STORE_BYTES = 128 * 2**20


class TimedGrid(BasicVariantGenerator):  # type: ignore[misc]
    """Tune's own grid, which notes when it suggests a trial."""

    def __init__(self, request: dict[str, Any]) -> None:
        super().__init__(max_concurrent=request["trials_at_once"])
        self._request = request

    def next_trial(self) -> Any:
        trial = super().next_trial()
        if trial is not None:
            record(self._request, suggested=trial.config["lr"])
        return trial


def main() -> None:
    request = json.loads(sys.argv[1])
    os.environ.update(_ENVIRONMENT | (_TUNED_ENVIRONMENT if request["is_tuned"] else {}))
    ray.init(
        "local",
        num_cpus=request["trials_at_once"],
        include_dashboard=request["has_dashboard"],
        object_store_memory=_OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    if request["how"] == "trainer":
        trainable = tune.with_resources(fit_trainer, {"cpu": _DRIVER_CPUS})
    else:
        trainable = tune.with_resources(train_here, {"cpu": 1})
    results = tune.Tuner(
        trainable,
        param_space={"lr": tune.grid_search(request["learning_rates"]), "request": request},
        tune_config=tune.TuneConfig(search_alg=TimedGrid(request), reuse_actors=True),
        run_config=tune.RunConfig(storage_path=f"{request['folder']}/tune", name="tune", verbose=0),
    ).fit()
    record(request, ended=time.time())
    if results.errors:
        raise results.errors[0]
    losses = {
        # Tune may end a trial before Ray Train's last report has come to it.
        result.config["lr"]: result.metrics["held_out_loss"] if _is_last(result, request) else None
        for result in results
    }
    print(json.dumps(losses), flush=True)


def _is_last(result: Any, request: dict[str, Any]) -> bool:
    return bool(result.metrics.get("step") == request["total_steps"])


def fit_trainer(config: dict[str, Any]) -> None:
    """One trial: a run of Ray Train, in an actor of its own."""
    from ray.train import RunConfig, ScalingConfig  # here, as the process that tunes needs no torch
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    TorchTrainer(
        train_worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 1 - _DRIVER_CPUS}),
        run_config=RunConfig(
            name=tune.get_context().get_trial_id(),
            storage_path=f"{config['request']['folder']}/train",
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def train_worker(config: dict[str, Any]) -> None:
    """The only rank of a trial."""
    import ray.train

    from benchmarks.peers.tune_trial import train

    train(config["request"], lr=config["lr"], report=ray.train.report)


def train_here(config: dict[str, Any]) -> None:
    """One trial, in the process that Tune has given it."""
    from benchmarks.peers.tune_trial import train

    train(config["request"], lr=config["lr"], report=tune.report)


def record(request: dict[str, Any], **what: float) -> None:
    """Append a line with the time to `trials.jsonl`."""
    with (Path(request["folder"]) / "trials.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time(), **what}) + "\n")


if __name__ == "__main__":
    main()

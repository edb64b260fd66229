"""forge trains large models on machines that can be preempted.

    run = forge.train_job("jobs/pretrain.yaml")      # prints progress; on_record=forge.quiet does not
    run.metrics()["train/loss"]          # an array with one entry per step
    run.history()                        # the same as one dict per step
    run.best_checkpoint()                # its url is where the weights are
    run.generate("import ")              # the text after the prompt
    run.export("my-model")               # a Hugging Face folder

The functions of `forge.api` are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.api import (
        attach_run,
        inspect_data,
        load_job,
        load_run,
        plan_job,
        prepare_data,
        price_job,
        quiet,
        resume_run,
        start,
        train_job,
        tune_job,
    )

__all__ = [
    "attach_run",
    "inspect_data",
    "load_job",
    "load_run",
    "plan_job",
    "prepare_data",
    "price_job",
    "quiet",
    "resume_run",
    "start",
    "train_job",
    "tune_job",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'forge' has no attribute {name!r}")
    from forge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""forge trains large models on machines that can vanish.

    run = forge.train_job("jobs/pretrain.yaml")
    print(run.newest("Evaluated")["perplexity"])

`load_job`, `plan_job`, `train_job` and `tune_job` are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forge.api import load_job, plan_job, train_job, tune_job

__all__ = ["load_job", "plan_job", "train_job", "tune_job"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'forge' has no attribute {name!r}")
    from forge import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]

"""Inspect a model in a subprocess, because the planner must not import torch.

    python -m forge.model.inspect < request.json > answer.json

The request contains the job's `model:` section and the shape of the data; the answer contains ModelInfo, or an
error and its key. The model is built on torch's meta device, with exact shapes and no memory, so inspecting a 70B
model takes seconds.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys

from forge.config.model import ModelSpec
from forge.errors import ModelError, PlanError
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.process import take_stdout
from forge.user_code import use_code

MAX_CPU_S = 900
"""A model of 250,000 modules takes a minute."""


def main() -> None:
    """Answer one request: `{"facts": {...}}`, or `{"complaint": {...}}`.

    Whatever the user's modules or transformers print goes to stderr, so that stdout holds the answer alone.
    """
    stdout = take_stdout()
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    request = json.load(sys.stdin)
    use_code(request.pop("code"))
    spec = ModelSpec.model_validate_json(json.dumps(request.pop("model")))
    request["label_names"] = tuple(request.get("label_names", ()))
    try:
        info = family_of(spec).inspect(spec, DataShape(**request))
        answer = {"facts": dataclasses.asdict(info)}
    except ModelError as error:
        fields = ("problem", "key", "more_keys", "suspects", "choices")
        answer = {"complaint": {name: getattr(error, name) for name in fields}}
    except PlanError as error:
        answer = {"complaint": {"problem": str(error), "key": None}}
    with stdout:
        json.dump(answer, stdout)


if __name__ == "__main__":
    main()

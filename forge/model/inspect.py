"""Facts about a model, for a planner that must not import torch.

    python -m forge.model.inspect < request.json > answer.json

The request holds the job's `model:` section and what the data determine; the answer holds ModelInfo, or what is
wrong and with which key. The model is built on torch's meta device: exact shapes, no memory, so a 70B model is
counted in seconds.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from forge.config.model import ModelSpec
from forge.errors import ModelError
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.user_code import use_code


def main() -> None:
    """Answer one request: `{"facts": {...}}`, or `{"complaint": {"problem", "key", "choices"}}`."""
    request = json.load(sys.stdin)
    use_code(request.pop("code"))
    spec = ModelSpec.model_validate_json(json.dumps(request.pop("model")))
    try:
        info = family_of(spec).inspect(spec, DataShape(**request))
        answer = {"facts": dataclasses.asdict(info)}
    except ModelError as error:
        answer = {"complaint": {"problem": error.problem, "key": error.key, "choices": list(error.choices)}}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

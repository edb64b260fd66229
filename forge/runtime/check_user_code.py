"""Import classes of the user's and check that they have the methods forge calls.

    python -P -m forge.runtime.check_user_code < request.json > answer.json

The request holds the digest of the unpacked code and, for each `module:Class`, what it is used as: `objective`,
`format` or `model`. The answer, all that is on stdout, holds `problems`, what is wrong with each class that is
wrong, and the `metric_directions` of each objective. It runs in a process of its own: user code may import torch,
print, or end the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from forge.errors import UserCodeError
from forge.objective.registry import Direction
from forge.process import take_stdout
from forge.user_code import load_class, use_code


def main() -> None:
    answer = take_stdout()  # what user code prints, now or at exit, must not be read as the answer
    request = json.load(sys.stdin)
    problems: dict[str, str] = {}
    directions: dict[str, Mapping[str, Direction]] = {}
    use_code(request["digest"])
    for reference, kind in request["kinds"].items():
        try:
            load_class(reference, base=_base(kind))
            if kind == "objective":
                directions[reference] = _directions(reference)
        except UserCodeError as error:
            problems[reference] = str(error)
    with answer:
        json.dump({"problems": problems, "metric_directions": directions}, answer)


def _directions(reference: str) -> Mapping[str, Direction]:
    """Build an objective, as every worker does, and return its metrics. Raises: UserCodeError."""
    from forge.objective.build import build_objective, require_directions

    return require_directions(reference, build_objective(reference))


def _base(kind: str) -> type:
    """What the class of each extension point must have or be."""
    if kind == "objective":
        from forge.objective.base import Objective

        return Objective
    if kind == "format":
        from forge.data.formats.base import ExampleFormat

        return ExampleFormat
    if kind == "model":
        from torch import nn

        return nn.Module
    raise AssertionError(f"no extension point is called {kind}")


if __name__ == "__main__":
    main()

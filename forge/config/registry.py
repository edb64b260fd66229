"""The built-in classes of the extension points, by the name that a job file gives them.

A new format is one file and one line here. Everything that must know the names (validation, the JSON schema, the
reference of the job file) reads this table; the classes are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, WithJsonSchema

from forge.errors import UserCodeError
from forge.user_code import is_reference, split_reference

FORMATS = {"text": "forge.data.formats.text:TextFormat"}
"""`data.format`: what a record becomes."""

OBJECTIVES = {"causal-lm": "forge.objective.causal_lm:CausalLm"}
"""`training.objective`: what is minimised."""

Direction = Literal["min", "max"]
"""Whether smaller or larger values of a metric are better."""

OBJECTIVE_METRICS: Mapping[str, Mapping[str, Direction]] = {"causal-lm": {"perplexity": "min"}}
"""What each built-in objective reports besides the loss; of a class of the user's own, its `metric_directions`."""


def _check(value: str, *, known: Mapping[str, str]) -> str:
    if is_reference(value):
        try:
            split_reference(value)
        except UserCodeError as error:
            raise ValueError(str(error)) from error
    elif value not in known:
        names = ", ".join(known)
        raise ValueError(f"must be {names}, or a class of your own such as my_code:MyClass (see `code`)")
    return value


def _name_in(known: Mapping[str, str], *, example: str) -> Any:
    own = {"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", "examples": [example]}
    return (
        AfterValidator(lambda value: _check(value, known=known)),
        WithJsonSchema({"anyOf": [{"enum": list(known)}, own]}),
    )


FormatName = Annotated[str, *_name_in(FORMATS, example="my_data:Reviews")]
ObjectiveName = Annotated[str, *_name_in(OBJECTIVES, example="my_losses:Ranking")]

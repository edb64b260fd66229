"""Types of the keys that name a class: a built-in one by its name in a registry, or one of the user's code.

Validation, the JSON schema and the reference of the job file all read the registries, so a new built-in class needs
no edit here.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator, WithJsonSchema

from forge.config.section import FieldError
from forge.data.formats.registry import FORMATS
from forge.data.sources.registry import SOURCES
from forge.errors import UserCodeError
from forge.objective.registry import OBJECTIVES
from forge.user_code import is_reference, split_reference


def _check_registered(registry: Mapping[str, object], *, ending: str = "") -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in registry:
            nearest = difflib.get_close_matches(value.lower(), registry, n=1)
            names = " or ".join(f"'{name}'" for name in registry)
            raise FieldError("", f"must be {names}{ending}", nearest=nearest[0] if nearest else None)
        return value

    return check


def _check_registered_or_own(registry: Mapping[str, object]) -> Callable[[str], str]:
    check_registered = _check_registered(
        registry, ending=", or a class of your own such as my_code:MyClass (see `code`)"
    )

    def check(value: str) -> str:
        if not is_reference(value):
            return check_registered(value)
        try:
            split_reference(value)
        except UserCodeError as error:
            raise ValueError(str(error)) from error
        return value

    return check


def _schema_of_own(example: str) -> dict[str, object]:
    pattern = "^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
    return {"type": "string", "pattern": pattern, "examples": [example]}


SourceName = Annotated[
    str,
    AfterValidator(_check_registered(SOURCES)),
    WithJsonSchema({"type": "string", "enum": list(SOURCES)}),
]
FormatName = Annotated[
    str,
    AfterValidator(_check_registered_or_own(FORMATS)),
    WithJsonSchema({"anyOf": [{"enum": list(FORMATS)}, _schema_of_own("my_data:Reviews")]}),
]
ObjectiveName = Annotated[
    str,
    AfterValidator(_check_registered_or_own(OBJECTIVES)),
    WithJsonSchema({"anyOf": [{"enum": list(OBJECTIVES)}, _schema_of_own("my_losses:Ranking")]}),
]

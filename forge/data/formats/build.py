"""Build the format of a job: a built-in one by its name, or the user's."""

from __future__ import annotations

from typing import cast

from forge.data.formats.base import ExampleFormat, FormatContext
from forge.data.formats.registry import FORMATS
from forge.data.tokenizer_backend import tokenizer_errors
from forge.user_code import is_reference, load_builtin_class, load_class, user_code_errors


def build_format(name: str, *, context: FormatContext) -> ExampleFormat:
    """Build a format.

    Args:
        name: of the registry, or `module:Class` in the code folder in use.

    Raises: UserCodeError if the user's class cannot be imported or built, or lacks a method; DataError if a
        built-in one cannot use the tokenizer.
    """
    if is_reference(name):
        with user_code_errors(name):
            return cast(ExampleFormat, load_class(name, base=ExampleFormat)(context))
    with tokenizer_errors():
        return cast(ExampleFormat, load_builtin_class(FORMATS[name])(context))

"""The class of `data.format`: a built-in one by its name, or the user's."""

from __future__ import annotations

import importlib
from typing import cast

from forge.config.registry import FORMATS
from forge.data.formats.base import ExampleFormat, FormatContext
from forge.user_code import is_reference, load_class, split_reference


def build_format(name: str, *, context: FormatContext) -> ExampleFormat:
    """Build a format.

    Args:
        name: of the registry, or `module:Class` in the code folder in use.

    Raises: UserCodeError if the user's class cannot be imported or lacks a method.
    """
    if is_reference(name):
        return cast(ExampleFormat, load_class(name, base=ExampleFormat)(context))
    module, cls = split_reference(FORMATS[name])
    return cast(ExampleFormat, getattr(importlib.import_module(module), cls)(context))

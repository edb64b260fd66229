"""Do the same with every part of a mixture, and name the part in what goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from forge.config.data import DataSpec
from forge.errors import DataError

T = TypeVar("T")


def each_part(spec: DataSpec, do: Callable[[str, DataSpec], T]) -> Iterator[T]:
    """Call a function with the name and the section of each part, and yield what it returns.

    Raises: DataError of the function, which begins with the key of the part.
    """
    for number, (part, section) in enumerate(zip(spec.mixture, spec.parts, strict=True)):
        try:
            found = do(part.name, section)
        except DataError as error:
            raise DataError(f"data.mixture[{number}]: part {part.name}: {error}") from error
        yield found

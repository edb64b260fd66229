"""Prompts and targets: Jinja templates over the fields of a record, or a field as it is.

Templates run in the sandbox that transformers uses for chat templates, with a limit of time and memory. Nothing of
them is computed when they are compiled, where Jinja would have no limit, and nothing in them is random. A field
that is missing, null, NaN or infinite is an error: a prompt with `None` in it would be scored like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forge.config.task import is_template
from forge.data.chat_template import MAX_RENDER_S, TemplateTooSlowError, limited
from forge.data.pairs import field_of
from forge.data.sources.base import Record
from forge.errors import ArgumentError, DataError

Expression = Callable[[Record], Any]

MAX_PROMPT_CHARS = 1 << 22
_MAX_INTEGER_BITS = 1 << 14
"""Of a product or power: one operation on huge integers takes minutes, and no alarm ends it."""


def build_expression(text: str, *, key: str) -> Expression:
    """Return the function that gives the text of a template, or the value of a field, of a record.

    It raises DataError if the record lacks a field.

    Args:
        key: what errors call it: `prompt`, `target`, `choices[0]`.

    Raises: ArgumentError for a template that cannot be parsed.
    """
    if not is_template(text):
        return lambda record: field_of(record, key=text, of=key)
    try:
        template = _ENVIRONMENT.from_string(text)
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise ArgumentError(f"is not a Jinja template: {error}") from None

    def rendered(record: Record) -> str:
        try:
            with limited():
                found = template.render({"record": record.fields, **record.fields})
        except (TemplateTooSlowError, MemoryError):
            problem = f"takes more than {MAX_RENDER_S:.0f} s or 1 GB"
        except Exception as error:  # a template can raise anything, such as ZeroDivisionError
            problem = f"fails: {error or type(error).__name__}"
        else:
            if len(found) <= MAX_PROMPT_CHARS:
                return found
            problem = f"gives {len(found):,} characters, more than {MAX_PROMPT_CHARS:,}"
        raise DataError(f"{record.location}: the template of '{key}' {problem}")

    return rendered


@pass_context  # without the context, Jinja would call it, and compute its argument, when it compiles a template
def _text_or_number(context: Context, value: Any) -> Any:
    if value is None:
        raise ValueError("a field is null; use `{{ field or '' }}` if it may be")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number is {value}")
    return value


class PromptEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of templates in task files, in which equal records give equal texts."""

    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(undefined=StrictUndefined, finalize=_text_or_number, optimized=False)
        del self.globals["lipsum"], self.filters["random"]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or power. Raises: SecurityError for an integer that would be too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length()
            if operator == "**":
                bits = left.bit_length() * max(0, right)
            if bits > _MAX_INTEGER_BITS:
                raise SecurityError(f"the result of {operator} has more than {_MAX_INTEGER_BITS:,} bits")
        return super().call_binop(context, operator, left, right)


_ENVIRONMENT = PromptEnvironment()

"""Prompts and targets: Jinja templates over the fields of a record, or a field as it is.

Templates run in the sandbox that transformers uses for chat templates, with a limit of time and memory. A field
that is missing or null is an error: a prompt with `None` in it would be scored like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import StrictUndefined
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from forge.config.task import is_template
from forge.data.chat_template import MAX_RENDER_S, TemplateTooSlowError, limited
from forge.data.pairs import field_of
from forge.data.sources.base import Record
from forge.errors import ArgumentError, DataError

Expression = Callable[[Record], Any]

MAX_PROMPT_CHARS = 1 << 22


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


def _no_null(value: Any) -> Any:
    if value is None:
        raise ValueError("a field is null; use `{{ field or '' }}` if it may be")
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_no_null)

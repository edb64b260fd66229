"""Expand `~` in the paths of a job, in one place and for every key.

Relative paths stay as they are written: relative to the folder where the command runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forge.config.job import JobSpec
from forge.environment import expand_home
from forge.errors import ArgumentError


def with_home_folders(job: JobSpec, *, fail: Callable[[str, str], Exception]) -> JobSpec:
    """Return a job with `~` and `~user` replaced by home folders; URLs and ids of the Hub stay.

    Args:
        fail: returns the exception to raise, given the key and the problem of a path whose home folder is unknown.
    """

    def resolved(key: str, value: Any) -> Any:
        try:
            return _path(value) if isinstance(value, str) else value
        except (ArgumentError, OSError) as error:
            raise fail(key, str(error)) from error

    changes: dict[str, Any] = {
        "code": resolved("code", job.code),
        "model": _with(
            job.model,
            from_pretrained=resolved("model.from_pretrained", job.model.from_pretrained),
            init_from=resolved("model.init_from", job.model.init_from),
            lora=job.model.lora
            and _with(job.model.lora, init_from=resolved("model.lora.init_from", job.model.lora.init_from)),
        ),
        "checkpoint": _with(job.checkpoint, to=resolved("checkpoint.to", job.checkpoint.to)),
        "data": _with(
            job.data,
            chat=_with(job.data.chat, template=resolved("data.chat.template", job.data.chat.template)),
            dataset=resolved("data.dataset", job.data.dataset),
            files=job.data.files and tuple(resolved("data.files", pattern) for pattern in job.data.files),
            mixture=tuple(
                _with(
                    part,
                    dataset=resolved(f"data.mixture[{number}].dataset", part.dataset),
                    files=part.files
                    and tuple(resolved(f"data.mixture[{number}].files", pattern) for pattern in part.files),
                )
                for number, part in enumerate(job.data.mixture)
            ),
            tokenizer=_with(
                job.data.tokenizer,
                from_pretrained=resolved("data.tokenizer.from_pretrained", job.data.tokenizer.from_pretrained),
            ),
        ),
    }
    result: JobSpec = _with(job, **changes)
    return result


def _with(section: Any, **changes: Any) -> Any:
    """Return a section with some values changed; it stays itself if none is, and knows the same keys as written."""
    changed = {name: value for name, value in changes.items() if getattr(section, name) != value}
    if not changed:
        return section
    copy = section.model_copy(update=changed)
    copy.__pydantic_fields_set__.clear()
    copy.__pydantic_fields_set__.update(section.model_fields_set)
    return copy


def _path(text: str) -> str:
    return text if "://" in text or "::" in text else expand_home(text)

"""Turn pydantic's validation errors into messages for authors of job and cluster files.

Input: pydantic's error records, which are about types. Output: JobFileErrors, which name the key, its line and
what to write instead. Each key is reported once.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from forge.config.fields import Loc, known_keys, literal_values, section_at
from forge.config.locations import SourceMap, parent_key
from forge.config.section import FieldError, FieldErrors, Section
from forge.config.yaml_reader import join_key
from forge.errors import JobFileError, printable

_OTHER_WORDS = {
    "learning_rate": "training.optimizer.lr",
    "max_steps": "training.total_steps",
    "num_train_epochs": "training.epochs",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_clipping": "training.optimizer.grad_clip",
    "max_grad_norm": "training.optimizer.grad_clip",
    "lr_scheduler": "training.schedule",
    "eval_steps": "training.evaluate_every",
    "save_steps": "checkpoint.every",
    "sequence_length": "data.seq_len",
    "block_size": "data.seq_len",
    "num_gpus": "resources.workers",
    "num_workers": "resources.workers",
}
"""Names of the same keys in transformers, DeepSpeed and Ray."""

_MISSING = "is missing and has no default"

_SENTENCES = {
    "missing": _MISSING,
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be text or a list of texts",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "value_error": "{error}",
}
"""Messages by pydantic's error type."""


def field_errors(
    error: ValidationError,
    *,
    root: type[Section],
    source: SourceMap,
    reported: Iterable[JobFileError],
    removed: Collection[str] = (),
) -> list[JobFileError]:
    """Return pydantic's errors as JobFileErrors.

    Args:
        root: type of the whole file.
        reported: errors found before; pydantic's errors about the same keys are only consequences and are dropped.
        removed: invalid keys that were left out for this validation; what may follow from that is dropped too.
    """
    keys = {other.key for other in reported}
    found: list[JobFileError] = []
    for record in error.errors(include_url=False):
        for error_found in _translated(record, root=root, source=source, removed=removed):
            if keys.isdisjoint(_with_parents(error_found.key or "")):
                keys.add(error_found.key)
                found.append(error_found)
    # `nam:` is an unknown key and also leaves `name` missing: report this one mistake once.
    meant = {join_key(parent_key(other.key or ""), other.nearest or "") for other in found}
    return [other for other in found if other.problem != _MISSING or other.key not in meant]


def invalid_value(error: Exception) -> str | None:
    """Return on one line which key of a stored job this version does not accept; None for other errors."""
    if not isinstance(error, ValidationError):
        return None
    first = error.errors(include_url=False, include_context=False)[0]
    value = printable(repr(first["input"]), limit=60)
    return (
        f"this version of forge does not accept {_dotted(first['loc'])} of its job: {first['msg']} (got {value}); "
        "use the version that wrote it"
    )


def _translated(
    record: Mapping[str, Any], *, root: type[Section], source: SourceMap, removed: Collection[str]
) -> Iterator[JobFileError]:
    """Yield the problems of one of pydantic's records, without those that may follow from what was removed."""
    if removed and record["type"] == "missing":  # known from the validation before anything was removed
        return
    key = _dotted(record["loc"])
    cause = record.get("ctx", {}).get("error")
    for one in cause.errors if isinstance(cause, FieldErrors) else (cause,):
        if not isinstance(one, FieldError):
            if not any(other.startswith(f"{key}." if key else "") for other in removed):
                yield _of_type(record, root=root, source=source)
            continue
        deciding = [join_key(key, name) if name else key for name in (one.key, *one.depends_on)]
        if not any(_overlap(name, other) for name in deciding for other in removed):
            yield source.error(deciding[0], str(one), nearest=one.nearest)


def _overlap(one: str, other: str) -> bool:
    """Whether two keys are the same, or one is below the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _of_type(record: Mapping[str, Any], *, root: type[Section], source: SourceMap) -> JobFileError:
    kind, given, loc = record["type"], record["input"], record["loc"]
    key = _dotted(loc)
    if kind == "extra_forbidden":
        return _unknown_key(loc, root=root, source=source)
    if kind == "model_type":
        return source.error(key, _not_a_section(loc, root=root, is_empty=given is None))
    if given is None and kind != "missing":
        return source.error(key, "has no value")
    if kind == "literal_error":
        values = literal_values(loc, root=root)
        texts = [value for value in values if isinstance(value, str)]
        nearest = difflib.get_close_matches(str(given).lower(), texts, n=1)
        return source.error(key, f"must be {_listed(values)}", nearest=nearest[0] if nearest else None)
    if kind == "string_type" and isinstance(given, (bool, int, float)):
        return source.error(key, "must be text; put it in quotes")
    if kind not in _SENTENCES:
        return source.error(key, "is not valid: " + record["msg"].removeprefix("Input should be "))
    return source.error(key, _SENTENCES[kind].format(**record.get("ctx", {})))


def _unknown_key(loc: Loc, *, root: type[Section], source: SourceMap) -> JobFileError:
    name, section_key, section = str(loc[-1]), _dotted(loc[:-1]), section_at(loc[:-1], root=root)
    fields = list(section.model_fields) if section else []
    elsewhere = [key for key in known_keys(root) if key.rpartition(".")[2] == name]
    near = difflib.get_close_matches(name.lower(), fields, n=1)
    nearest: str | None = None
    if elsewhere:
        # If several sections have it, prefer one below the section where it was written.
        nearest = max(elsewhere, key=lambda key: key.startswith(f"{section_key}."))
        problem = f"unknown key here; it belongs to {_named(parent_key(nearest))}"
    elif _OTHER_WORDS.get(name, "") in set(known_keys(root)):
        problem, nearest = "unknown key; forge has another name for it", _OTHER_WORDS[name]
    elif near:
        problem, nearest = "unknown key", near[0]
    elif not fields:
        problem = f"unknown key; {_named(section_key)} has no keys"
    else:
        problem = f"unknown key; the keys of {_named(section_key)} are {', '.join(fields)}"
    return source.error(_dotted(loc), problem, nearest=nearest, show_value=False)


def _named(section_key: str) -> str:
    return f"'{section_key}'" if section_key else "the top level"


def _not_a_section(loc: Loc, *, root: type[Section], is_empty: bool) -> str:
    section, parent = section_at(loc, root=root), section_at(loc[:-1], root=root)
    example = next(iter(section.model_fields)) if section else "key"
    if not is_empty:
        return f"must be a section with keys such as '{example}:'"
    is_required = parent is not None and parent.model_fields[str(loc[-1])].is_required()
    return f"is empty; give it keys such as '{example}:'" + ("" if is_required else ", or leave it out")


def _listed(values: Sequence[str | int]) -> str:
    """`'a'`; `'a' or 'b'`; `0, 1 or 2`."""
    words = [repr(value) for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _dotted(loc: Loc) -> str:
    key = ""
    for name in loc:
        key = f"{key}[{name}]" if isinstance(name, int) else join_key(key, name)
    return key


def _with_parents(key: str) -> Iterator[str]:
    """`a.b[0]` → `a.b[0]`, `a.b`, `a`; for the whole file only its own empty key."""
    yield key
    while key := parent_key(key):
        yield key

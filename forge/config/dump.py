"""A job as the YAML that gives the same job, what was not written left out; and plain values as YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from forge.config.job import JobSpec
from forge.config.scalar import resolve


def dump_job(job: JobSpec) -> str:
    """YAML text; `load_job` of it gives an equal job."""
    body = job.model_dump(mode="json", exclude_unset=True)
    return yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_documents(documents: Sequence[Mapping[str, Any]]) -> str:
    """YAML text, a document for each; whatever reads YAML, of 1.1 or 1.2, reads the same values from it."""
    return yaml.dump_all(
        documents, Dumper=_Unaliased, sort_keys=False, allow_unicode=True, explicit_start=True, width=1000
    )


def dump_plain(values: Mapping[str, Any]) -> str:
    """YAML text of plain values, for programs that read YAML 1.1: Ray's launcher, kubectl."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=110)


def load_plain(text: str) -> Any:
    """Parse YAML 1.1 text that forge itself wrote; job and cluster files go through `forge.config.load`."""
    return yaml.safe_load(text)


class _Dumper(yaml.SafeDumper):
    """Quotes what `forge.config.scalar` would not read as text; PyYAML, of YAML 1.1, leaves `1e3` bare."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_text = isinstance(resolve(text), str)
    except ValueError:
        is_text = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_text else "'")


_Dumper.add_representer(str, _text_node)


class _Unaliased(_Dumper):
    """Writes what stands twice twice: people read it."""

    def ignore_aliases(self, data: object) -> bool:
        """Of anything."""
        return True

"""What a run was trained on, and the command that repeats it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from forge.report.text import number
from forge.runs.reader import RunSummary
from forge.runs.remote_ref import read_remote_ref
from forge.units import format_bytes, format_count

_VARIABLE = re.compile(r"\$\{env:([^}]*)\}")
_MAX_HOSTS = 8


def environment_facts(run: RunSummary) -> list[tuple[str, str]]:
    """Describe hardware, nodes, versions and the content of the corpus, as far as recorded."""
    hardware, corpus = run.plan.hardware, run.plan.corpus
    memory = f", {format_bytes(hardware.memory_bytes)} a worker" if hardware.memory_bytes else ""
    facts = [("planned for", f"{'GPU' if hardware.device == 'cuda' else 'CPU'} {hardware.name}{memory}")]
    started = run.newest("GenerationStarted")
    if started is not None:
        peak = started["peak_flops"]
        measured = f", peak {format_count(peak)}FLOP/s ({started['peak_source']})" if peak else ""
        facts.append(("trained on", f"{started['world_size']:,} × {started['device'].split(':')[0]}{measured}"))
    joined = [event for event in run.events if event["event"] == "NodeJoined"]
    if joined:
        hosts = list(dict.fromkeys(event["host"] for event in joined))
        more = f" and {len(hosts) - _MAX_HOSTS:,} more" if len(hosts) > _MAX_HOSTS else ""
        facts.append(("nodes", f"{len(joined):,} joined, on {', '.join(hosts[:_MAX_HOSTS])}{more}"))
    ref = read_remote_ref(run.folder)
    if ref is not None:
        facts.append(("cluster", f"{ref.cluster}, its folder there {ref.folder}"))
    recorded = run.newest("EnvironmentRecorded")
    if recorded is not None:
        facts += [("python", recorded["python"]), ("platform", recorded["platform"])]
        facts.append(("packages", ", ".join(f"{name} {version}" for name, version in recorded["packages"].items())))
    facts.append(("corpus", f"digest {corpus.digest}"))
    facts.append(("seed", f"{run.plan.job.training.seed}"))
    if run.plan.code is not None:
        facts.append(("code", f"digest {run.plan.code.digest}"))
    peak_gib = run.last.get("memory/peak_gib")
    return [*facts, ("memory", f"peak {number(peak_gib, '.2f')} GiB of a worker")] if peak_gib else facts


def repeat_lines(run: RunSummary) -> Iterator[str]:
    """The lines to type in a shell: working folder, variables that the job reads, and the command.

    `job.yaml` in the run's folder has every value that was given on the command line.
    """
    names = {name for text in run.plan.templates.values() for name in _VARIABLE.findall(text)}
    yield from (f": ${{{name}:?the job reads this variable}}" for name in sorted(names) if name.isidentifier())
    if run.plan.files is not None and run.plan.files.folder:
        yield f"cd {shlex.quote(run.plan.files.folder)}"
    ref = read_remote_ref(run.folder)
    cluster = f" --cluster {ref.cluster}" if ref is not None else ""
    job = shlex.quote(str((run.folder / "job.yaml").absolute()))
    yield f"forge {'train' if run.plan.search is None else 'tune'} {job}{cluster}"

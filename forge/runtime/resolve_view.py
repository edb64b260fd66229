"""Add to a plan what training will see of the data: of the prepared corpus, or of a sample of its records."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from forge.config.data import DataSpec
from forge.config.job import JobSpec
from forge.data.formats.registry import PART_NAMES
from forge.data.mixture import sample_corpus
from forge.data.mixture_view import view_data
from forge.data.rows import Arrays
from forge.data.sources.build import SampleSize
from forge.data.view import ObjectiveView, Selection
from forge.errors import DataError
from forge.objective.registry import OBJECTIVES
from forge.plan.data_view import DataView
from forge.plan.inputs import CorpusInfo
from forge.plan.plan import Plan
from forge.plan.warnings import view_warnings

_SAMPLE_RECORDS = 400
_SAMPLE_PARTS = 16
_SAMPLE_CHARS = 1 << 20
_MAX_SAMPLE_CHARS = 1 << 24
_CHARS_PER_TOKEN = 8
"""More than text has, so that the sample fills a sequence of concatenated documents."""


def with_view(plan: Plan) -> Plan:
    """Return the plan of a job with a prepared corpus, with the view of it. Raises: DataError."""
    job = plan.job
    view = view_data(
        plan.corpus,
        data=job.data,
        objective=objective_view(job, corpus=plan.corpus),
        num_positions=plan.total_steps * job.training.global_batch_size,
    )
    return replace(plan, view=view, warnings=plan.warnings + view_warnings(view, seq_len=job.data.seq_len))


def view_sample(
    job: JobSpec,
    *,
    data: DataSpec,
    code_digest: str | None,
    selection: Selection | None = None,
) -> DataView | None:
    """Describe a sample of a corpus, which is prepared in a folder that is deleted afterwards.

    Args:
        data: the section with the paths to read.
        code_digest: of the unpacked code of the job.

    Returns: None if the sample does not fill a sequence.
    Raises: DataError for a record that cannot be used; UserCodeError.
    """
    num_chars = min(max(_SAMPLE_CHARS, _CHARS_PER_TOKEN * data.seq_len), _MAX_SAMPLE_CHARS)
    size = SampleSize(num_records=_SAMPLE_RECORDS, num_chars=num_chars, num_parts=_SAMPLE_PARTS)
    with _folder() as folder:
        facts = sample_corpus(data, size=size, folder=folder, code_digest=code_digest)
        if facts is None:
            return None
        objective = objective_view(job, corpus=facts)
        return view_data(facts, data=data, objective=objective, selection=selection, is_sample=True)


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder that is deleted afterwards. Raises: DataError if it cannot be written."""
    try:
        with tempfile.TemporaryDirectory(prefix="forge-sample-") as folder:
            yield Path(folder)
    except OSError as error:
        place = tempfile.gettempdir()
        raise DataError(
            f"a sample of the corpus cannot be prepared in {place}: {error.strerror or error}; set TMPDIR"
        ) from error


def objective_view(job: JobSpec, *, corpus: CorpusInfo) -> ObjectiveView:
    """How the objective of a job sees the examples; of one of the user's own, as they are stored."""
    known = OBJECTIVES.get(job.training.objective)
    names = PART_NAMES.get(job.data.format, {})
    if known is None or known.show is None:
        predicts_tokens = known.predicts_tokens if known is not None else None
        return ObjectiveView(predicts_tokens=predicts_tokens, part_names=names)
    module, _, name = known.show.partition(":")
    function = getattr(import_module(module), name)
    tokenizer = Path(corpus.folder) / "tokenizer"

    def show(arrays: Arrays, number: int) -> Arrays:
        shown: Arrays = function(arrays, seed=number, training=job.training, tokenizer=tokenizer)
        return shown

    return ObjectiveView(predicts_tokens=known.predicts_tokens, part_names=names, show=show)

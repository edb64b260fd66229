"""Compute what a model says about prepared data once, and store it with them: the log-probabilities of a reference
model, or the most probable tokens of a teacher.

    python -P -m forge.train.stored_outputs < request.json

The model is that of `from_pretrained` without adapters, in the precision of the job. One process computes example
after example on this machine's GPU, else on all its cores; what it has computed survives it. The answer is the
corpus with the columns; it is at once there if the same was computed before.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from forge.config.model import ModelSpec
from forge.data.further_columns import FurtherColumns, Values, add_columns, find_columns
from forge.errors import CheckpointError, ForgeError
from forge.foreign import from_record
from forge.fs import default_cache_dir
from forge.limits import usable_cpus
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.model.pretrained import PretrainedWeights
from forge.model.transformers_config import build_config
from forge.model.weight_files import content_digests
from forge.plan.inputs import CorpusInfo
from forge.process import die_with_parent, take_stdout
from forge.train.frozen_model import build_frozen
from forge.train.output_readers import (
    BATCH_LOGITS,
    BATCH_TOKENS,
    OutputReader,
    PairReader,
    StoredExamples,
    TeacherReader,
    columns_of,
    stored_examples,
    values_of_examples,
)

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VERSION = 1
"""Must change whenever the same weights and data give other values."""
_PART_S = 15.0
"""Between two parts: the most work that a kill costs."""
_PROGRESS_S = 0.2
_CHANGING_KEYS = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputsRequest:
    """What is computed."""

    parent: int
    """The process to end with."""
    model: dict[str, Any]
    """A `model:` section."""
    corpus: dict[str, Any]
    """CorpusInfo of the prepared data."""
    precision: str
    seed: int
    """Of weights that the folder lacks."""
    uses_gpu: bool
    has_linear_head: bool
    keeps_examples_apart: bool
    only_if_computed: bool = False
    """Compute nothing: answer with the corpus if it was computed before, else with None."""
    top_k: int | None = None
    """Of a teacher: how many tokens are stored at each target; None for the reference model of pairs."""
    temperature: float = 1.0
    """Of a teacher."""


def corpus_with_outputs(
    request: OutputsRequest, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CorpusInfo | None:
    """Return the corpus with the outputs of the model; None as `only_if_computed` says.

    Args:
        on_progress: called with the examples that are done and those in all; (0, 0) while another process computes
            the same.

    Raises: DataError, CheckpointError, ModelError, PlanError.
    """
    spec = ModelSpec.model_validate_json(json.dumps(request.model))
    corpus = from_record(CorpusInfo, request.corpus, nan_for_null=True)
    data = DataShape(vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, eot_id=corpus.eot_id)
    weights = family_of(spec).open_pretrained(spec, data)
    further = FurtherColumns(
        columns=columns_of(top_k=request.top_k, vocab_size=corpus.vocab_size),
        digest=_digest(request, config=build_config(spec, data).to_dict(), corpus=corpus, weights=weights),
        corpus=corpus,
    )
    if request.only_if_computed:
        return find_columns(further)
    examples = stored_examples(corpus)

    def compute(first: int) -> Iterator[Values]:
        on_progress(first, examples.num_stored)
        found = _values(request, spec=spec, data=data, examples=examples, first=first)
        for number, values in enumerate(found, start=first + 1):
            yield values
            on_progress(number, examples.num_stored)

    clock = _Clock()
    return add_columns(further, compute=compute, part_is_due=clock.is_due, on_wait=lambda: on_progress(0, 0))


def _values(
    request: OutputsRequest, *, spec: ModelSpec, data: DataShape, examples: StoredExamples, first: int
) -> Iterator[Values]:
    """Build and load the model, and run it on the examples from `first` on."""
    kind = "cuda" if request.uses_gpu and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(max(1, usable_cpus()))
    dtype = _DTYPES[request.precision]
    model = build_frozen(spec, data, dtype=dtype, device=torch.device(kind), seed=request.seed)
    apart, num_tokens = request.keeps_examples_apart, BATCH_TOKENS[kind]
    reader: OutputReader
    if request.top_k is None:
        reader = PairReader(model, keeps_examples_apart=apart, has_linear_head=request.has_linear_head)
    else:
        num_tokens = min(num_tokens, BATCH_LOGITS[kind] // data.vocab_size)
        reader = TeacherReader(
            model, top_k=request.top_k, temperature=request.temperature, vocab_size=data.vocab_size
        )
    return values_of_examples(
        reader,
        examples,
        first=first,
        seq_len=data.seq_len,
        num_rows=max(1, num_tokens // data.seq_len),
        is_packed=apart or request.top_k is None,
    )


class _Clock:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        """Whether a part is due; it begins the next one then."""
        now = time.monotonic()
        if now - self._last < _PART_S:
            return False
        self._last = now
        return True


def _digest(
    request: OutputsRequest, *, config: dict[str, Any], corpus: CorpusInfo, weights: PretrainedWeights
) -> str:
    try:
        digests = content_digests(weights.files, cache=default_cache_dir() / "digests")
    except OSError as error:
        raise CheckpointError(f"pretrained weights cannot be read: {error}") from error
    settings = {
        "version": _VERSION,
        "corpus": corpus.digest,
        "weights": digests,
        "config": {key: value for key, value in config.items() if key not in _CHANGING_KEYS},
        "precision": request.precision,
        "seed": request.seed if weights.absent else None,
    }
    if request.top_k is not None:
        settings |= {"top_k": request.top_k, "temperature": request.temperature, "seq_len": corpus.seq_len}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def main() -> None:
    """Answer one request, after lines of `{"progress": [examples done, examples in all]}`."""
    stdout, shown_at = take_stdout(), 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown_at
        if done in (0, total) or time.monotonic() - shown_at > _PROGRESS_S:
            shown_at = time.monotonic()
            stdout.write(json.dumps({"progress": [done, total]}) + "\n")
            stdout.flush()

    request = OutputsRequest(**json.load(sys.stdin))
    die_with_parent(request.parent)
    try:
        found = corpus_with_outputs(request, on_progress=show)
        answer: dict[str, Any] = {"answer": {"corpus": None if found is None else _record(found)}}
    except ForgeError as error:
        answer = {"error": {"class": type(error).__name__, "message": str(error)}}
    with stdout:
        json.dump(answer, stdout)


def _record(corpus: CorpusInfo) -> dict[str, str]:
    """What differs from the corpus of the request."""
    return {"folder": corpus.folder, "digest": corpus.digest}


if __name__ == "__main__":
    main()

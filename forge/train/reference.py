"""Compute the log-probabilities of a reference model once, and store them with the prepared data.

    python -P -m forge.train.reference < request.json

The reference is what training begins with: the weights of `from_pretrained` without adapters, in the precision of
the job. One process computes example after example on this machine's GPU, else on all its cores; what it has
computed survives it. The answer is the corpus with the column; it is at once there if the same was computed before.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from forge.config.model import ModelSpec
from forge.data.cache_index import read_index
from forge.data.example_store import ExampleRows
from forge.data.further_column import FurtherColumn, Values, add_column, find_column
from forge.data.rows import IGNORED, Arrays
from forge.errors import CheckpointError, DataError, ForgeError
from forge.foreign import from_record
from forge.fs import default_cache_dir
from forge.limits import usable_cpus
from forge.model.families.base import DataShape
from forge.model.families.registry import family_of
from forge.model.pretrained import PretrainedWeights
from forge.model.transformers_config import build_config
from forge.model.weight_files import content_digests
from forge.objective.pairs import REFERENCE_LOG_PROBS, PairRows
from forge.objective.preference import PairLogProbs
from forge.plan.inputs import CorpusInfo
from forge.process import die_with_parent, take_stdout
from forge.train.frozen_model import build_frozen

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_VERSION = 1
"""Must change whenever the same weights and data give other values."""
_PART_S = 15.0
"""Between two parts: the most work that a kill costs."""
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
_PROGRESS_S = 0.2
_CHANGING_KEYS = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRequest:
    """What is computed."""

    parent: int
    """The process to end with."""
    model: dict[str, Any]
    """The `model:` section."""
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


def reference_corpus(
    request: ReferenceRequest, *, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CorpusInfo | None:
    """Return the corpus with the reference's log-probabilities; None as `only_if_computed` says.

    Args:
        on_progress: called with the examples that are done and those in all; (0, 0) while another process computes
            the same.

    Raises: DataError, CheckpointError, ModelError, PlanError.
    """
    model = ModelSpec.model_validate_json(json.dumps(request.model))
    model = model.model_copy(update={"lora": None, "freeze": ()})
    corpus = from_record(CorpusInfo, request.corpus, nan_for_null=True)
    data = DataShape(vocab_size=corpus.vocab_size, seq_len=corpus.seq_len, eot_id=corpus.eot_id)
    weights = family_of(model).open_pretrained(model, data)
    column = FurtherColumn(
        name=REFERENCE_LOG_PROBS,
        digest=_digest(request, config=build_config(model, data).to_dict(), corpus=corpus, weights=weights),
        corpus=corpus,
    )
    if request.only_if_computed:
        return find_column(column)
    rows = ExampleRows(folder=Path(corpus.folder), index=read_index(Path(corpus.folder)), split="train")

    def compute(first: int) -> Iterator[Values]:
        on_progress(first, rows.num_stored)
        reader = _Reader(request, model=model, data=data, weights=weights)
        for number, values in enumerate(reader.values(rows, first=first), start=first + 1):
            yield values
            on_progress(number, rows.num_stored)

    clock = _Clock()
    return add_column(column, compute=compute, part_is_due=clock.is_due, on_wait=lambda: on_progress(0, 0))


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


class _Reader:
    """The reference model."""

    def __init__(
        self, request: ReferenceRequest, *, model: ModelSpec, data: DataShape, weights: PretrainedWeights
    ) -> None:
        """Build and load it. Raises: CheckpointError if the weights cannot be read."""
        kind = "cuda" if request.uses_gpu and torch.cuda.is_available() else "cpu"
        torch.set_num_threads(max(1, usable_cpus()))
        self._device = torch.device(kind)
        self._model = build_frozen(
            model, data, dtype=_DTYPES[request.precision], device=self._device, seed=request.seed
        )
        self._log_probs = PairLogProbs(keeps_examples_apart=request.keeps_examples_apart)
        if request.has_linear_head:
            self._log_probs.use_chunks(self._model)
        self._seq_len = data.seq_len
        self._rows_per_batch = max(1, _BATCH_TOKENS[kind] // data.seq_len)

    def values(self, rows: ExampleRows, *, first: int) -> Iterator[Values]:
        """Values of one example after the other, 0 where nothing is predicted.

        Raises: DataError for a value that is not finite.
        """
        for number, batch in _batches(rows, first=first, seq_len=self._seq_len, count=self._rows_per_batch):
            arrays = _as_rows(batch, seq_len=self._seq_len)
            pairs = PairRows.of(arrays)
            inputs = {name: values.to(self._device) for name, values in self._log_probs.batch(pairs).items()}
            with torch.no_grad():
                found = self._log_probs.tokens(self._model, inputs).float().cpu().numpy()
            if not np.isfinite(found).all():
                raise DataError(
                    f"the reference model gives a target of the examples from {number} on a log-probability that "
                    "is not finite; its weights cannot be used"
                )
            flat = np.zeros(arrays["tokens"].size, dtype=np.float32)
            flat[pairs.where] = found
            for row, examples in zip(flat.reshape(arrays["tokens"].shape), batch, strict=True):
                at = 0
                for example in examples:
                    length = len(example["tokens"])
                    yield row[at : at + length]
                    at += length


def _batches(
    rows: ExampleRows, *, first: int, seq_len: int, count: int
) -> Iterable[tuple[int, list[list[Arrays]]]]:
    """Yield batches of up to `count` rows of neighbouring examples, with the number of the first one."""
    begin = first
    batch: list[list[Arrays]] = [[]]
    room = seq_len
    for number in range(first, rows.num_stored):
        example = rows.example(number)
        length = len(example["tokens"])
        if length > room:
            if len(batch) == count:
                yield begin, batch
                begin, batch = number, []
            batch.append([])
            room = seq_len
        batch[-1].append(example)
        room -= length
    if batch[-1]:
        yield begin, batch


def _as_rows(batch: list[list[Arrays]], *, seq_len: int) -> dict[str, np.ndarray[Any, Any]]:
    shape = len(batch), seq_len
    rows = {name: np.zeros(shape, dtype=np.int64) for name in ("tokens", "part", "segment_ids")}
    rows["targets"] = np.full(shape, IGNORED, dtype=np.int64)
    for i, examples in enumerate(batch):
        at = 0
        for number, example in enumerate(examples, start=1):
            stop = at + len(example["tokens"])
            for name in ("tokens", "targets", "part"):
                rows[name][i, at:stop] = example[name]
            rows["segment_ids"][i, at:stop] = number
            at = stop
    return rows


def _digest(
    request: ReferenceRequest, *, config: dict[str, Any], corpus: CorpusInfo, weights: PretrainedWeights
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

    request = ReferenceRequest(**json.load(sys.stdin))
    die_with_parent(request.parent)
    try:
        found = reference_corpus(request, on_progress=show)
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

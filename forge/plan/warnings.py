"""What a plan warns of: it can be run, but something that was asked for cannot be had. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from forge.config.job import JobSpec
from forge.errors import printable
from forge.plan.data_view import DataView
from forge.plan.inputs import CorpusFiles, CorpusInfo, LabelsInfo
from forge.plan.mixture import epoch_sequences, part_shares

_CUT = re.compile(r"\bcut\b")
"""In what formats call examples that lose their end."""
_DROPPED = re.compile(r"\bdropped\b")
_MAX_CUT = 0.1
_MAX_PADDING = 0.5
_MIN_LOSS = 0.01
_MAX_NAMES, _MAX_NAME_CHARS = 5, 60
MAX_PASSES = 4.0
"""Passes over a part of a mixture that are worth nearly as much as new text.

Source: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023, figure 5."""
_MIN_PAIRS = 4
_TOLERANCE = 1.05
"""Passes over the corpus, as a multiple of `training.epochs`, that rounding up to whole steps may give unsaid."""


def corpus_warnings(
    job: JobSpec, *, files: CorpusFiles | None, corpus: CorpusInfo | None, total_steps: int
) -> tuple[str, ...]:
    """Return one sentence for each thing that the corpus does not allow, with what to do.

    Args:
        files: the files that were looked at; None if there was no look.
        corpus: None if it is not prepared.
    """
    warnings = [_special_tokens(job, files), _held_out(job, corpus), _passes(job, corpus), _in_batch(job, corpus)]
    if corpus is not None:
        num_positions = total_steps * job.training.global_batch_size
        warnings += [*_unevaluated_parts(job, corpus), *_repeated_parts(job, corpus, num_positions=num_positions)]
    warnings += _labels(corpus.labels) if corpus is not None and corpus.labels is not None else []
    return tuple(warning for warning in warnings if warning)


def view_warnings(view: DataView, *, seq_len: int) -> tuple[str, ...]:
    """Return one sentence for each thing in the examples that is rarely meant.

    Args:
        seq_len: `data.seq_len`.
    """
    warnings = [_cut(view, seq_len=seq_len), _dropped(view), _padding(view), _loss(view)]
    return tuple(warning for warning in warnings if warning)


def _cut(view: DataView, *, seq_len: int) -> str | None:
    reason, count = max(
        ((reason, count) for reason, count in view.notes.items() if _CUT.search(reason)),
        key=lambda item: item[1],
        default=("", 0),
    )
    if count <= _MAX_CUT * max(view.num_examples, view.lengths.count if view.lengths is not None else 0):
        return None
    return f"{count:,} {reason}: what lies beyond {seq_len:,} tokens is not learnt; raise data.seq_len"


def _dropped(view: DataView) -> str | None:
    found = {reason: count for reason, count in view.notes.items() if _DROPPED.search(reason)}
    reason, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    if count <= _MAX_CUT * (view.num_examples + sum(found.values())):
        return None
    return f"{count:,} {reason}; {view.num_examples:,} examples are left"


def _labels(labels: LabelsInfo) -> list[str | None]:
    """Labels that are never learnt, and those that are likely to be one."""
    never = [name for name, count in zip(labels.names, labels.train_counts, strict=True) if not count]
    similar: dict[str, list[str]] = {}
    for name in labels.names:
        similar.setdefault(" ".join(name.split()).casefold(), []).append(name)
    doubled = [repr(name) for names in similar.values() if len(names) > 1 for name in names]
    return [
        f"{len(never):,} labels have no training example: {_some(never)}" if never else None,
        f"labels that differ by white space or case alone: {_some(doubled)}; if they are one, correct the data"
        if doubled
        else None,
    ]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES:,} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(printable(name, limit=_MAX_NAME_CHARS) for name in names[:_MAX_NAMES]) + more


def _padding(view: DataView) -> str | None:
    if view.padding <= _MAX_PADDING:
        return None
    return f"{view.padding:.0%} of the sequences is padding; set data.packing: examples, or lower data.seq_len"


def _loss(view: DataView) -> str | None:
    if view.has_labels or not view.num_tokens or view.num_targets >= _MIN_LOSS * view.num_tokens:
        return None
    return (
        f"only {view.num_targets / view.num_tokens:.2%} of the tokens carry loss; see the examples whether that is "
        "what should be learnt"
    )


def _special_tokens(job: JobSpec, files: CorpusFiles | None) -> str | None:
    if files is None or not files.special_tokens or job.data.special_tokens == "parse":
        return None
    names = [f"{name} ({count:,}x)" for name, count in files.special_tokens.items()]
    return (
        f"the text spells special tokens of the tokenizer: {_some(names)} in the sample; "
        "they are ordinary characters (data.special_tokens: text). If the text is yours and they mark its "
        "structure, set data.special_tokens: parse"
    )


def _held_out(job: JobSpec, corpus: CorpusInfo | None) -> str | None:
    if corpus is None or not job.data.held_out or corpus.num_held_out_sequences:
        return None
    return (
        f"nothing is evaluated: data.held_out: {job.data.held_out:g} leaves {corpus.num_held_out_tokens:,} "
        f"held-out tokens, fewer than one sequence of {corpus.seq_len:,}; raise data.held_out, lower data.seq_len, "
        "or set data.held_out: 0"
    )


def _repeated_parts(job: JobSpec, corpus: CorpusInfo, *, num_positions: int) -> list[str]:
    return [
        f"part {one.name} of the mixture is read {one.passes(num_positions):.1f} times by this run: little is "
        f"learnt from text that is repeated more than {MAX_PASSES:g} times; lower its share from {one.got:.2%} to "
        f"{one.got * MAX_PASSES / one.passes(num_positions):.2%}, or add text to it"
        for one in part_shares(job.data, corpus)
        if one.passes(num_positions) > MAX_PASSES
    ]


def _unevaluated_parts(job: JobSpec, corpus: CorpusInfo) -> list[str]:
    if not job.data.held_out or not corpus.num_held_out_sequences:
        return []
    return [
        f"part {part.name} of the mixture is not evaluated: data.held_out: {job.data.held_out:g} leaves it "
        f"{part.corpus.num_held_out_tokens:,} held-out tokens, fewer than one sequence of {corpus.seq_len:,}"
        for part in corpus.parts
        if not part.corpus.num_held_out_sequences
    ]


def _passes(job: JobSpec, corpus: CorpusInfo | None) -> str | None:
    if corpus is None:
        return None
    size, num_sequences = job.training.global_batch_size, epoch_sequences(job.data, corpus)
    if size > num_sequences:
        return (
            f"the corpus has {num_sequences:,} training sequences, fewer than one batch of {size:,}: every step "
            f"sees each of them {size / num_sequences:.1f} times{_as_epochs(job, num_sequences)}; lower "
            f"training.global_batch_size to {num_sequences:,} or less, or add text"
        )
    passes = _actual_epochs(job, num_sequences)
    if passes is None or job.training.epochs is None or passes <= _TOLERANCE * job.training.epochs:
        return None
    return (
        f"training.epochs: {job.training.epochs:g} becomes {passes:.2f} passes over the corpus, since "
        f"{num_sequences:,} sequences do not fill whole batches of {size:,}"
    )


def _in_batch(job: JobSpec, corpus: CorpusInfo | None) -> str | None:
    """Say if a step has hardly any texts besides its own to compare a query with."""
    if corpus is None or job.training.objective != "contrastive":
        return None
    num_rows = corpus.num_train_sequences + corpus.num_held_out_sequences
    pairs = job.training.global_batch_size * corpus.num_examples / max(1, num_rows)
    if pairs >= _MIN_PAIRS:
        return None
    return (
        f"a step has {pairs:.1f} pairs on average, and a query is compared with the texts of its step alone: there "
        "is little or nothing to learn; raise training.global_batch_size"
    )


def _actual_epochs(job: JobSpec, num_sequences: int) -> float | None:
    """The passes over the corpus of a length in epochs, in whole steps."""
    if job.training.epochs is None:
        return None
    size = job.training.global_batch_size
    return math.ceil(job.training.epochs * num_sequences / size) * size / num_sequences


def _as_epochs(job: JobSpec, num_sequences: int) -> str:
    passes = _actual_epochs(job, num_sequences)
    return "" if passes is None else f", so training.epochs: {job.training.epochs:g} is {passes:.1f} passes"

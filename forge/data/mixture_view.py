"""What training will see of a corpus that may be a mixture: of the whole, and of each part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from forge.config.data import DataSpec
from forge.data.prepare import parts_of
from forge.data.view import ObjectiveView, Selection, view_corpus
from forge.errors import ArgumentError
from forge.plan.data_view import DataView, PartView
from forge.plan.inputs import CorpusInfo
from forge.plan.mixture import epoch_sequences, part_shares


def view_data(
    facts: CorpusInfo,
    *,
    data: DataSpec,
    objective: ObjectiveView,
    selection: Selection | None = None,
    is_sample: bool = False,
    num_positions: int | None = None,
) -> DataView:
    """Describe a prepared corpus, or a sample of one.

    Args:
        data: of the job.
        objective: how it sees the examples.
        selection: the examples that are shown; by default three, of a mixture at least one of each part.
        num_positions: sequences that the run reads, if there is a run.

    Raises: DataError if the cache cannot be read; ArgumentError for an example or a part that does not exist;
        PlanError for a part that gets no sequence.
    """
    view = partial(view_corpus, seed=data.seed, objective=objective)
    passes = None if num_positions is None else num_positions / epoch_sequences(data, facts)
    if not facts.parts:
        if selection is not None and selection.part is not None:
            raise ArgumentError(f"there is no part {selection.part!r}: the job has no data.mixture")
        return view(facts, selection=selection, num_sampled_records=_sampled(facts, is_sample), passes=passes)
    # The shares of passes follow from the sizes of the parts, which a sample does not have.
    has_shares = not is_sample or any(part.weight is not None for part in data.mixture)
    shares = dict(zip(_names(facts), part_shares(data, facts), strict=True)) if has_shares else {}
    parts: list[PartView] = []
    for one, own, chosen in zip(facts.parts, parts_of(facts), _selections(facts, selection), strict=True):
        share = shares.get(one.name)
        seen = view(
            own,
            selection=chosen or Selection(),
            num_sampled_records=_sampled(own, is_sample),
            passes=None if share is None or num_positions is None else share.passes(num_positions),
        )
        examples = tuple(replace(example, of_part=one.name) for example in seen.examples) if chosen else ()
        parts.append(
            PartView(
                name=one.name,
                num_documents=own.num_documents,
                num_held_out_sequences=own.num_held_out_sequences,
                asked=None if share is None else share.asked,
                got=None if share is None else share.got,
                view=replace(seen, examples=examples),
            )
        )
    return _joined(parts, facts=facts, passes=passes)


def _joined(parts: Sequence[PartView], *, facts: CorpusInfo, passes: float | None) -> DataView:
    """Return the view of the whole, with the parts below it."""
    views = [part.view for part in parts]
    notes: Counter[str] = Counter()
    for view in views:
        notes.update(view.notes)
    sampled = [view.num_sampled_records for view in views if view.num_sampled_records is not None]
    return replace(
        views[0],
        num_sampled_records=sum(sampled) if sampled else None,
        num_examples=sum(view.num_examples for view in views),
        num_sequences=sum(view.num_sequences for view in views),
        num_tokens=sum(view.num_tokens for view in views),
        num_targets=sum(view.num_targets for view in views),
        padding=facts.padding,
        passes=passes,
        lengths=None,
        notes=dict(notes),
        noted_records=facts.noted_records,
        num_skipped_records=facts.num_skipped_records,
        examples=tuple(example for view in views for example in view.examples),
        parts=tuple(replace(part, view=replace(part.view, examples=())) for part in parts),
    )


def _selections(facts: CorpusInfo, selection: Selection | None) -> list[Selection | None]:
    """What is shown of each part; None: nothing.

    Raises: ArgumentError for a part that does not exist, or an index without a part.
    """
    names = _names(facts)
    if selection is None:
        return [Selection(count=1)] * len(names)
    if selection.part is not None:
        if selection.part not in names:
            raise ArgumentError(f"there is no part {selection.part!r}; the parts are {', '.join(names)}")
        return [selection if name == selection.part else None for name in names]
    if selection.index is not None:
        raise ArgumentError(f"examples are numbered within each part; give one with --part: {', '.join(names)}")
    counts = [len(range(number, selection.count, len(names))) for number in range(len(names))]
    return [replace(selection, count=count) if count else None for count in counts]


def _names(facts: CorpusInfo) -> list[str]:
    return [part.name for part in facts.parts]


def _sampled(facts: CorpusInfo, is_sample: bool) -> int | None:
    return facts.num_documents + facts.num_skipped_records if is_sample else None

"""Describe what training sees of the data, as (name, text) pairs and as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from forge.errors import printable
from forge.plan.data_view import DataView, Lengths, PartView, ShownExample, Span
from forge.plan.inputs import CorpusInfo, LabelsInfo
from forge.units import counted, format_count

_NEWLINE = "↵"
_TAB = "⇥"
_MAX_SWITCHES = 20
"""Beginnings and ends of loss that each get a line of their own."""
_MAX_LINES_INLINE = 10
_MAX_LABELS, _MAX_LABEL_CHARS = 6, 40
"""Names of labels that are shown."""
_MAX_SKIPPED = 6
"""Records that cannot be used and are named."""
_MAX_LINES_OF_SPAN = 6
"""In a plan; of a longer span the first and the last lines are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleLine:
    """One line of an example."""

    has_loss: bool
    is_inline: bool
    """Whether only some pieces of the line may carry loss; elsewhere all or none do."""
    part: str | None
    pieces: tuple[Span, ...]
    """Without newlines; their other control characters are as in the data."""


def corpus_facts(corpus: CorpusInfo, *, passes: float | None = None) -> list[tuple[str, str]]:
    """Describe a prepared corpus: its size, its sequences, and records that were left out.

    Args:
        passes: of a run over the training sequences.
    """
    epochs = "" if passes is None else f" ({passes:.2f} epochs)"
    tokens = "training tokens" if corpus.packing == "concatenate" else "training tokens with loss"
    size = (
        f"{corpus.num_documents:,} documents, {format_count(corpus.num_train_tokens)} {tokens}{epochs}, "
        f"{format_count(corpus.num_held_out_tokens)} held out "
        f"({counted(corpus.num_held_out_sequences, 'sequence')}), vocabulary {corpus.vocab_size:,}"
    )
    facts = [("corpus", size)]
    facts += [("sequences", _packed(corpus))] if corpus.packing != "concatenate" else []
    facts += [("labels", _labels(corpus.labels))] if corpus.labels is not None and corpus.labels.names else []
    return facts + ([("left out", _skipped_records(corpus))] if corpus.num_skipped_records else [])


def view_facts(view: DataView) -> list[tuple[str, str]]:
    """Describe the numbers of a view; of a whole corpus, `plan_facts` has those of `CorpusInfo`."""
    is_sample = view.num_sampled_records is not None
    facts = [("sample", _sample(view))] if is_sample else []
    if view.lengths is not None:
        facts.append(("lengths", _lengths(view.lengths)))
    elif not view.parts:
        cure = "delete its folder in $FORGE_CACHE/data, and it is prepared again"
        facts.append(("lengths", f"not recorded by the version of forge that prepared this corpus; {cure}"))
    share = view.num_targets / max(1, view.num_tokens)
    if view.has_labels:
        loss = f"at {view.num_targets:,} of {view.num_tokens:,} tokens, where a label or a number is learnt"
    elif view.is_estimate:
        loss = f"about {share:.1%} of {view.num_tokens:,} tokens carry loss, others in every step"
    else:
        loss = f"{view.num_targets:,} of {view.num_tokens:,} tokens carry loss ({share:.1%})"
    return [*facts, ("loss", loss), *_parts(view), *_noted(view)]


def _parts(view: DataView) -> list[tuple[str, str]]:
    """Describe the parts of a mixture, one row for each."""
    with_shares = [part for part in view.parts if part.got is not None]
    tokens = {
        part.name: (part.got or 0) * part.view.num_tokens / max(1, part.view.num_sequences) for part in with_shares
    }
    total = sum(tokens.values())
    return [(f"part {part.name}", _part(part, tokens.get(part.name, 0) / max(1, total))) for part in view.parts]


def _part(part: PartView, token_share: float) -> str:
    """Describe a part: what of the run it is, how often it is read, and what is in it."""
    view, words = part.view, []
    if part.got is not None and part.asked is not None:
        asked = "" if f"{part.asked:.2%}" == f"{part.got:.2%}" else f" (asked {part.asked:.3%})"
        words.append(f"{part.got:.2%} of the sequences{asked}, {token_share:.1%} of the tokens")
    if view.passes is not None:
        words.append(f"{view.passes:.2f} passes")
    held_out = f"{part.num_held_out_sequences:,} held out"
    words.append(
        f"{part.num_documents:,} records, {format_count(view.num_tokens)} tokens in {view.num_sequences:,} "
        f"sequences ({view.padding:.1%} padding), {held_out}"
    )
    words += [f"{count:,} {reason}" for reason, count in view.notes.items()]
    if view.num_skipped_records:
        words.append(f"{view.num_skipped_records:,} records that cannot be used")
    if view.lengths is not None:
        words.append(_lengths(view.lengths))
    return "; ".join(words)


def _labels(labels: LabelsInfo) -> str:
    """Their number, their names, and the accuracy of a constant answer."""
    names = [printable(name, limit=_MAX_LABEL_CHARS) for name in labels.names[:_MAX_LABELS]]
    more = f" and {len(labels.names) - _MAX_LABELS:,} more" if len(labels.names) > _MAX_LABELS else ""
    most = max(range(len(labels.names)), key=labels.train_counts.__getitem__)
    name = printable(labels.names[most], limit=_MAX_LABEL_CHARS)
    frequent = f"; most frequent: {name}, {labels.train_counts[most] / max(1, sum(labels.train_counts)):.1%}"
    if not math.isnan(labels.baseline):
        frequent += f" ({labels.baseline:.1%} of the held-out labels)"
    return f"{len(labels.names):,}: {', '.join(names)}{more}{frequent}"


def example_facts(view: DataView) -> list[tuple[str, str]]:
    """Describe examples, sequences, padding, and what was cut, dropped or left out."""
    return [("examples", ", ".join(_counts(view)))]


def example_title(example: ShownExample) -> str:
    """Describe an example in a few words."""
    of_part = "" if example.of_part is None else f" of part {example.of_part}"
    return (
        f"example {example.index:,}{of_part} ({example.split.replace('_', ' ')}): {example.num_tokens:,} tokens, "
        f"{example.num_targets:,} with loss"
    )


def example_lines(example: ShownExample, *, is_whole: bool = False) -> Iterator[ExampleLine]:
    """The text of an example, line by line.

    A line ends where the loss begins or ends. Where that would be at every few tokens, as with masks, it does not,
    and what carries loss is marked within the line.

    Args:
        is_whole: keep every line; otherwise the middle of long texts is left out.
    """
    switches = sum(one.has_loss != other.has_loss for one, other in pairwise(example.spans))
    is_inline = switches > _MAX_SWITCHES or any(span.target for span in example.spans)
    most = _MAX_LINES_INLINE if is_inline else _MAX_LINES_OF_SPAN
    for (_, part), spans in groupby(example.spans, key=lambda span: (span.has_loss or is_inline, span.part)):
        lines = list(_lines(list(spans)))
        hidden = 0 if is_whole else len(lines) - most
        if hidden > 1:
            mark = Span(text=f"… {hidden:,} more lines …", has_loss=lines[0][0].has_loss, kind="omitted")
            lines = [*lines[: most // 2], [mark], *lines[-(most // 2) :]]
        for line in lines:
            has_loss = any(piece.has_loss and piece.kind != "omitted" for piece in line)
            has_loss = has_loss if is_inline else line[0].has_loss
            yield ExampleLine(has_loss=has_loss, is_inline=is_inline, part=part, pieces=tuple(line))


def visible(text: str) -> str:
    """Show newlines and tabs of a text on one line."""
    return text.replace("\n", _NEWLINE).replace("\t", _TAB)


def _lines(spans: list[Span]) -> Iterator[list[Span]]:
    line: list[Span] = []
    for span in spans:
        first, *rest = span.text.replace("\t", _TAB).split("\n")
        line.append(_with_text(span, first + _NEWLINE * bool(rest), is_last=not rest))
        for number, text in enumerate(rest, start=1):
            yield line
            is_last = number == len(rest)
            line = [_with_text(span, text + ("" if is_last else _NEWLINE), is_last=is_last)]
    if any(piece.text or piece.target for piece in line):
        yield line


def _with_text(span: Span, text: str, *, is_last: bool) -> Span:
    target = span.target if is_last else ""
    return Span(text=text, has_loss=span.has_loss, kind=span.kind, target=target, part=span.part)


def _sample(view: DataView) -> str:
    origin = f"the corpus is not prepared; this is of {view.num_sampled_records:,} records"
    return ", ".join([origin, *_counts(view)])


def _counts(view: DataView) -> list[str]:
    parts = [
        f"{view.num_examples:,} examples in {view.num_sequences:,} sequences",
        f"{view.padding:.1%} padding",
        *(f"{count:,} {reason}" for reason, count in view.notes.items()),
    ]
    if view.num_skipped_records:
        parts.append(f"{view.num_skipped_records:,} records that cannot be used")
    return parts


def _lengths(lengths: Lengths) -> str:
    if lengths.shortest == lengths.longest:
        return f"{lengths.longest:,} tokens each ({lengths.count:,} counted)"
    return (
        f"{lengths.shortest:,} to {lengths.longest:,} tokens, mean {lengths.mean:,.0f}, median {lengths.median:,}, "
        f"90% at most {lengths.p90:,}, 99% at most {lengths.p99:,}"
    )


def _noted(view: DataView) -> list[tuple[str, str]]:
    """List the first records that were cut, dropped or split, one row for each reason."""
    return [
        ("records", f"{reason}: {', '.join(places[:_MAX_SKIPPED])}{', …' if len(places) > _MAX_SKIPPED else ''}")
        for reason, places in view.noted_records.items()
    ]


def _skipped_records(corpus: CorpusInfo) -> str:
    """Describe the records that cannot be used: how many, and the first of them."""
    shown = "; ".join(corpus.skipped_records[:_MAX_SKIPPED])
    more = "; …" if corpus.num_skipped_records > _MAX_SKIPPED else ""
    return f"{counted(corpus.num_skipped_records, 'record')} that cannot be used: {shown}{more}"


def _packed(corpus: CorpusInfo) -> str:
    """Describe packing: numbers of examples and sequences, padding, and what was split or dropped."""
    num_rows = corpus.num_train_sequences + corpus.num_held_out_sequences
    parts = [f"{corpus.num_examples:,} examples in {num_rows:,} sequences", f"{corpus.padding:.1%} padding"]
    parts += [f"{count:,} {reason}" for reason, count in corpus.notes.items()]
    return ", ".join(parts)

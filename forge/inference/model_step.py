"""One forward pass of a model over the running sequences.

`PackedModel` computes all sequences at once, in a packed batch (`forge.inference.packed_rows`). It needs a model of
transformers whose attention can be replaced, and compares its first results with those of the unchanged model; a
model that does not pass is run by `SeparateModel`, one sequence after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forge.inference.lanes import Lane, divide
from forge.inference.packed_rows import (
    ATTENTION,
    PromptPiece,
    Rows,
    RowsFrom,
    StepLayout,
    UnsupportedAttention,
    aligned,
    using,
)
from forge.inference.running import RunningSequence
from forge.inference.schedule import PlannedStep
from forge.inference.traced_step import HeldWeight, TracedStep
from forge.process import one_line

_PAD = 4
"""Matrix products of this many tokens, and of multiples, have the same bits for the same token."""
_TWO_LANES = (2, 3)
"""Numbers of threads with which two threads compute a part of a step each. With more it was not measured."""
_PROBE_TOKENS = 40
_PROBE_STOPS = (1, 20, 38, 39, 40)
_PROBE_ROWS = (1, 3, 5)
_PROBE_TOLERANCE = 0.05
"""Of the largest logit. Wrong attention differs by more, and bf16's rounding by less."""
_REPEATABLE: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class StepModel(Protocol):
    """A model and the keys and values of its running sequences."""

    rows: Any

    def logits(self, step: PlannedStep) -> Tensor:
        """Compute a step: float32[N, V], of each decoding sequence, then of each prompt that it completes."""


class TokenAdapters(Protocol):
    """Adapters over a model, chosen for each token of a batch."""

    def using(self, tokens: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use an adapter for each token of the batches that this thread computes; None: the model alone."""


class PackedModel:
    """A transformers model whose attention reads rows.

    Raises: UnsupportedAttention if the model's attention cannot be replaced, or gives other logits when it is.
    """

    def __init__(self, model: PreTrainedModel, *, adapters: TokenAdapters | None = None) -> None:
        self.rows = Rows()
        self._model = model
        self._adapters = adapters
        self._like = next(model.parameters())
        self._no_mask = self._like.new_zeros(1, 1, 1, 1)  # models pass a mask of four dimensions on as it is
        self._traced: TracedStep | None = None
        self._pool: ThreadPoolExecutor | None = None
        """Of one thread, if two parts of a step are computed at once, each with one thread."""
        self.can_draft = False
        """Whether several tokens of a text have the same bits in one step as one after another."""
        layers = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        if not layers <= _KNOWN_LAYERS:
            raise UnsupportedAttention(f"it has layers of {', '.join(sorted(layers - _KNOWN_LAYERS))}")
        before = model.config._attn_implementation
        if before == ATTENTION:  # its results were compared when it was set
            return
        expected = _whole_logits(model)
        try:
            model.set_attn_implementation(ATTENTION)
            _compare(self._probe, expected)
        except Exception:
            model.set_attn_implementation(before)
            raise
        self.rows = Rows()

    def logits(self, step: PlannedStep) -> Tensor:
        lanes = [Lane(step=step)]
        if self._pool is not None and self.rows.layers and self._adapters_of(step) == {None}:
            lanes = divide(step, pad=_PAD)
        if self._pool is None or len(lanes) == 1:
            return self._in_lane(lanes[0])
        # Rows of two lanes are different ones, and a lane's kernels run while the other one's Python code does.
        other = self._pool.submit(self._in_lane, lanes[1])
        try:
            own = self._in_lane(lanes[0])
            return torch.cat([own, other.result()])
        finally:
            wait([other])

    def _adapters_of(self, step: PlannedStep) -> set[str | None]:
        return {one.adapter for one in (*step.decoding, *(one for one, _ in step.prompts))}

    def _in_lane(self, lane: Lane) -> Tensor:
        if self._pool is not None:
            torch.set_num_threads(1)  # of this thread alone
        return self._part_logits(lane)

    def _part_logits(self, lane: Lane) -> Tensor:
        step, rows = lane.step, self.rows if lane.first == 0 else RowsFrom(self.rows, first=lane.first)
        positions = [one.num_computed for one in step.decoding]
        tokens = [one.tokens[one.num_computed] for one in step.decoding]
        tokens += step.draft
        positions += range(sum(positions) + 1, sum(positions) + 1 + len(step.draft))
        named = [one.adapter for one in step.decoding] * (1 + len(step.draft))
        keep = list(range(len(tokens)))
        at = list(positions)
        for sequence, piece in step.prompts:
            tokens += sequence.tokens[piece.start : piece.stop]
            named += [sequence.adapter] * (piece.stop - piece.start)
            at += range(piece.start, piece.stop)
            if piece.stop == sequence.num_prefill:
                keep.append(len(tokens) - 1)
        num_kept = len(keep)
        if any(one.is_repeatable for one in (*step.decoding, *(one for one, _ in step.prompts))):
            padding = -len(tokens) % _PAD
            tokens += [0] * padding
            at += [0] * padding
            keep += keep[-1:] * (-num_kept % _PAD)
        pieces = [piece for _, piece in step.prompts]
        layout = StepLayout(rows, positions=positions, pieces=pieces, like=self._like, is_one_text=bool(step.draft))
        if self._adapters is None or not any(named):
            return self._forward(tokens, at, layout, keep=keep, num_kept=num_kept)
        with self._adapters.using(named):
            return self._forward(tokens, at, layout, keep=keep, num_kept=num_kept, may_trace=False)

    def tune(self, held: Sequence[HeldWeight]) -> str | None:
        """Find out which faster ways of computing a step have the same bits, and use those.

        They are: a trace, for steps without prompts and adapters; two parts of a step at once, where there
        are two or three threads; several tokens of one text at once (`can_draft`).

        Args:
            held: weights that a trace cannot hold itself.

        Returns: why steps are not traced; None if they are.
        """
        if self._like.device.type != "cpu":
            return "the model is not on the CPU"
        if torch.get_num_threads() in _TWO_LANES:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="lane")
        with self._threads_of_steps():
            problem = self._trace(held)
        if problem is not None:
            self._pool = None  # two lanes of Python code would wait for each other
        with self._threads_of_steps():
            self.can_draft = torch.equal(self._at_once(), self._alone_and_among(1)[1:])
        self.rows = Rows()
        return problem

    def _trace(self, held: Sequence[HeldWeight]) -> str | None:
        expected = [self._alone_and_among(count) for count in _PROBE_ROWS]
        problem = None
        try:
            self._traced = self._new_trace(held)
            found = [self._alone_and_among(count) for count in _PROBE_ROWS]
            if not all(map(torch.equal, found, expected)):
                problem = "a trace gives other logits"
        except Exception as error:  # of any kind, as tracing runs the model's code in an unusual way
            problem = one_line(error)
        if problem is not None:
            self._traced = None
        return problem

    @contextmanager
    def _threads_of_steps(self) -> Iterator[None]:
        """Compute with as many threads as steps do: products of one thread have other bits than those of two."""
        num_threads = torch.get_num_threads()
        try:
            if self._pool is not None:
                torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(num_threads)

    @torch.inference_mode()
    def _new_trace(self, held: Sequence[HeldWeight]) -> TracedStep:
        self.rows.resize(num_rows=2, length=aligned(1))
        layout = StepLayout(self.rows, positions=[1, 2], pieces=[], like=self._like)
        self._forward([1, 2, 0, 0], [1, 2, 0, 0], layout, keep=[0, 1, 1, 1])
        self._model.requires_grad_(False)  # weights become constants of the trace
        inputs = (torch.tensor([[1, 2, 0, 0]]), torch.tensor([[1, 2, 0, 0]]), torch.tensor([0, 1, 1, 1]))
        return TracedStep(self._compute, rows=self.rows, layout=layout, inputs=inputs, held=held)

    @torch.inference_mode()
    def _forward(
        self,
        tokens: list[int],
        at: list[int],
        layout: StepLayout,
        *,
        keep: list[int],
        num_kept: int = 1,
        may_trace: bool = True,
    ) -> Tensor:
        device = self._like.device
        inputs = (
            torch.tensor([tokens], device=device),
            torch.tensor([at], device=device),
            torch.tensor(keep, device=device, dtype=torch.int64),
        )
        if self._traced is not None and self.rows.layers and may_trace and not layout.pieces:
            found = self._traced(inputs, layout=layout)
        else:
            with using(layout):
                found = self._compute(*inputs)
        return found[0, :num_kept].float()

    def _compute(self, ids: Tensor, at: Tensor, keep: Tensor) -> Tensor:
        output = self._model(
            ids, attention_mask=self._no_mask, position_ids=at, use_cache=False, logits_to_keep=keep
        )
        logits: Tensor = output.logits
        return logits

    def is_repeatable(self) -> bool:
        """Whether a token has the same bits alone and in a batch with others, at the lengths of a short probe."""
        if self._model not in _REPEATABLE:
            with self._threads_of_steps():
                _REPEATABLE[self._model] = torch.equal(self._alone_and_among(1), self._alone_and_among(9))
            self.rows = Rows()
        return _REPEATABLE[self._model]

    def _alone_and_among(self, count: int) -> Tensor:
        """Logits of a text's last three tokens, in the last of `count` rows; the others hold longer texts.

        Shapes: result: float32[3, V].
        """
        vocabulary = self._model.config.get_text_config().vocab_size
        lengths = [_PROBE_TOKENS + 11 * row for row in range(1, count)] + [_PROBE_TOKENS]
        self.rows.resize(num_rows=count, length=aligned(max(lengths) + 3))
        pieces: list[PromptPiece] = []
        tokens: list[int] = []
        at: list[int] = []
        for row, length in enumerate(lengths):
            pieces.append(PromptPiece(row=row, start=0, stop=length, offset=len(tokens)))
            tokens += [(7 * one + row - count) % vocabulary for one in range(length)]
            at += range(length)
        found = []
        positions: list[int] = []
        for _ in range(3):
            padding, keep = -len(tokens) % _PAD, [len(tokens) - 1] * _PAD
            layout = StepLayout(self.rows, positions=positions, pieces=pieces, like=self._like)
            logits = self._forward([*tokens, *[0] * padding], [*at, *[0] * padding], layout, keep=keep)
            found.append(logits[0])
            positions, pieces = [length + len(found) - 1 for length in lengths], []
            tokens, at = [len(found)] * count, positions
        return torch.stack(found)

    def _at_once(self) -> Tensor:
        """The last two of `_alone_and_among(1)`, computed in one step. Shapes: result: float32[2, V]."""
        self._alone_and_among(1)
        at = [_PROBE_TOKENS, _PROBE_TOKENS + 1]
        layout = StepLayout(self.rows, positions=at, pieces=[], like=self._like, is_one_text=True)
        return self._forward([1, 2, 0, 0], [*at, 0, 0], layout, keep=[0, 1, 1, 1], num_kept=2)

    def _probe(self, tokens: list[int], start: int, stop: int) -> Tensor:
        self.rows.resize(num_rows=1, length=2 * _PROBE_TOKENS)
        pieces = [PromptPiece(row=0, start=start, stop=stop, offset=0)] if stop - start > 1 else []
        layout = StepLayout(self.rows, positions=[] if pieces else [start], pieces=pieces, like=self._like)
        return self._forward(tokens[start:stop], list(range(start, stop)), layout, keep=[stop - start - 1])[0]


class SeparateRows:
    """The state of each running sequence of a `SeparateModel`, by row."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.length = 0
        self.states: dict[int, Any] = {}

    def resize(self, *, num_rows: int, length: int) -> None:
        self.num_rows, self.length = num_rows, length

    def copy(self, *, source: int, to: int, length: int) -> None:
        self.states[to] = self.states.pop(source, None)


class SeparateModel:
    """Any causal language model, one sequence after another.

    If the model cannot continue from its cache, such as a model of the user's own, each token is computed from the
    whole text.
    """

    def __init__(self, model: nn.Module, *, adapters: TokenAdapters | None = None) -> None:
        self.rows = SeparateRows()
        self._model = model
        self._adapters = adapters
        self._device = next(model.parameters()).device
        self._has_cache = isinstance(model, PreTrainedModel)
        if isinstance(model, PreTrainedModel):
            try:
                _compare(lambda tokens, start, stop: self._compute(0, tokens, start, stop), _whole_logits(model))
            except (UnsupportedAttention, AttributeError, ValueError, RuntimeError, TypeError):
                self._has_cache = False
        self.rows.states.clear()

    @torch.inference_mode()
    def logits(self, step: PlannedStep) -> Tensor:
        found = []
        for row, sequence in enumerate(step.decoding):
            found.append(self._extend(row, sequence, sequence.num_computed, sequence.num_computed + 1))
        for sequence, piece in step.prompts:
            last = self._extend(piece.row, sequence, piece.start, piece.stop)
            if piece.stop == sequence.num_prefill:
                found.append(last)
        return torch.stack(found) if found else torch.empty(0)

    def _extend(self, row: int, sequence: RunningSequence, start: int, stop: int) -> Tensor:
        named = [sequence.adapter] * (stop - (start if self._has_cache else 0))
        with nullcontext() if self._adapters is None else self._adapters.using(named):
            return self._compute(row, sequence.tokens, start, stop)

    def _compute(self, row: int, tokens: list[int], start: int, stop: int) -> Tensor:
        first = start if self._has_cache else 0
        ids = torch.tensor([tokens[first:stop]], device=self._device)
        if not self._has_cache:
            output = (
                self._model(ids, use_cache=False) if isinstance(self._model, PreTrainedModel) else self._model(ids)
            )
        else:
            state = self.rows.states.get(row) if start else None
            output = self._model(ids, past_key_values=state, use_cache=True)
            self.rows.states[row] = output.past_key_values
        last: Tensor = getattr(output, "logits", output)[0, -1].float()
        return last


def _whole_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a short text at the ends of the pieces that `_compare` computes it in."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.tensor([[token % vocabulary for token in range(_PROBE_TOKENS)]], device=model.device)
    ends = [stop - 1 for stop in _PROBE_STOPS]
    with torch.inference_mode():
        logits: Tensor = model(ids, use_cache=False).logits[0, ends].float()
    return logits


def _compare(extend: Callable[[list[int], int, int], Tensor], expected: Tensor) -> None:
    """Compute the text of `_whole_logits` in pieces. Raises: UnsupportedAttention if the logits differ."""
    tokens = [token % expected.shape[1] for token in range(_PROBE_TOKENS)]
    with torch.inference_mode():
        found = torch.stack([extend(tokens, *border) for border in pairwise((0, *_PROBE_STOPS))])
    difference = float((found - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    if not difference <= _PROBE_TOLERANCE:
        raise UnsupportedAttention(f"its logits differ by {difference:.2g} of the largest one in pieces")

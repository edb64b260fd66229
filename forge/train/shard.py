"""One interval of one parameter on this rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shard:
    """One interval of one parameter, and its location on this rank.

    `owner` is the tensor that contains it, for a trained parameter the one that the optimizer updates. The interval
    starts at `offset` in it, and in every tensor of the same size (moments, average). `constant` is the only kind
    of a tensor that is not trained, or of a state with another layout than the weights.
    """

    name: str
    start: int
    stop: int
    owner: Tensor
    offset: int
    constant: str | None = None
    is_replicated: bool = False
    """Whether every rank has the whole tensor, with equal values."""

    def view(self, flat: Tensor) -> Tensor:
        """Return the interval in a tensor with the layout of `owner`, as a view."""
        return flat.detach().view(-1)[self.offset : self.offset + self.stop - self.start]

    def narrow(self, start: int, stop: int) -> Shard:
        """Return the part of the shard within `[start, stop)`."""
        start, stop = max(start, self.start), max(min(stop, self.stop), max(start, self.start))
        return replace(self, start=start, stop=stop, offset=self.offset + start - self.start)

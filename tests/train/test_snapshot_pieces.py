"""Which parts of the state the snapshots of all ranks have together."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from forge.checkpoint.intervals import Interval, pack
from forge.train.snapshot_pieces import SnapshotPiece, pieces_of
from forge.train.state import SavedPart

SHARD = 120
"""Elements that a rank holds."""


@dataclass
class Shards:
    """A state of one divided tensor and a buffer, with the interface of `TrainState`."""

    rank: int
    num_groups: int
    shard_group_size: int

    def part(self, number: int, *, of: int, has_buffers: bool) -> SavedPart:
        first = self.rank % self.shard_group_size * SHARD
        start, stop = first + number * SHARD // of, first + (number + 1) * SHARD // of
        found = [Interval(kind="master", name="w", start=start, stop=stop, dtype="F32")]
        return SavedPart(layout=pack(found + [BUFFER] * has_buffers), sources=())

    def buffers_part(self) -> SavedPart:
        return SavedPart(layout=pack([BUFFER]), sources=())


BUFFER = Interval(kind="buffer", name="flag", start=0, stop=1, dtype="U8")


def all_pieces(groups: int, size: int, parts: int) -> list[list[SnapshotPiece]]:
    """The pieces of each rank."""
    ranks = range(groups * size)
    states = [Shards(rank=rank, num_groups=groups, shard_group_size=size) for rank in ranks]
    return [list(pieces_of(state, parts_per_shard=parts)) for state in states]  # type: ignore[arg-type]


def elements(pieces: list[SnapshotPiece]) -> list[tuple[str, int]]:
    return sorted(
        (interval.name, at)
        for piece in pieces
        for interval in piece.part.layout.intervals
        for at in range(interval.start, interval.stop)
    )


@pytest.mark.parametrize(
    ("groups", "size", "parts"),
    [(1, 3, 0), (2, 2, 0), (3, 2, 0), (2, 2, 1), (3, 2, 1), (4, 2, 2), (5, 3, 2), (17, 1, 8)],
)
def test_pieces__all_ranks__every_element_saved_once_and_copied_alike(groups: int, size: int, parts: int) -> None:
    of_ranks = all_pieces(groups, size, parts)
    every = [piece for pieces in of_ranks for piece in pieces]
    whole = [("flag", 0), *(("w", at) for at in range(size * SHARD))]
    assert elements([piece for piece in every if piece.is_written]) == sorted(whole)
    by_number: dict[int, list[SnapshotPiece]] = {}
    for piece in every:
        by_number.setdefault(piece.number, []).append(piece)
    assert {piece.num_pieces for piece in every} == {len(by_number)}
    assert sorted(by_number) == list(range(len(by_number)))
    for same in by_number.values():
        assert {elements([piece]).__repr__() for piece in same} == {elements([same[0]]).__repr__()}
        # What is not sent is copied by two ranks at least.
        assert [piece.is_sent for piece in same] in ([True], [False] * len(same))
        assert same[0].is_sent or len(same) >= 2
        assert sum(piece.is_written for piece in same) == 1
    for rank, pieces in enumerate(of_ranks):
        assert not any(piece.is_sent or piece.is_written for piece in pieces[1:])
        assert (pieces[0].number == 0) == (rank == 0)


def test_pieces__in_the_order_of_their_numbers__are_in_the_order_of_the_elements() -> None:
    for groups, size, parts in ((3, 2, 0), (4, 3, 2)):
        found = {piece.number: piece for pieces in all_pieces(groups, size, parts) for piece in pieces}
        starts = [
            interval.start
            for number in sorted(found)
            for interval in found[number].part.layout.intervals
            if interval.name == "w"
        ]
        assert starts == sorted(starts)

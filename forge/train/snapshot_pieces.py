"""Which parts of the state the snapshots of a rank have.

A *piece* is what one snapshot buffer has. Where every rank holds something of its own there is one piece for each
rank, which its agent sends to another node:

    piece = number of the shard · groups + number of the group

With shard groups on several nodes no copy is sent: ranks with the same shard hold the same values, and the K groups
of a *set* have all of the state, each rank one of K parts of its shard. There are at least two sets, so that each
piece is on two nodes. What rank 0 alone has, buffers and metrics, is a piece of its own, which is sent:

    piece = 0 for that, else 1 + number of the shard · K + number of the group modulo K

A checkpoint is written from every piece once, by the ranks of the second set, since rank 0 commits it.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge.train.state import SavedPart, TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotPiece:
    """A piece that a rank copies at every snapshot."""

    number: int
    num_pieces: int
    part: SavedPart
    is_sent: bool
    """Whether its replica is sent to another node."""
    is_written: bool
    """Whether this rank writes it to a checkpoint."""


def pieces_of(state: TrainState, *, parts_per_shard: int) -> tuple[SnapshotPiece, ...]:
    """Return the pieces of this rank, at most one of which is sent, and at most one written: the first.

    Args:
        parts_per_shard: K; 0: a piece for each rank.
    """
    groups, size, parts = state.num_groups, state.shard_group_size, parts_per_shard
    group, shard = divmod(state.rank, size)
    if not parts:
        part = state.part(group, of=groups, has_buffers=state.rank == 0)
        number = shard * groups + group
        return (SnapshotPiece(number=number, num_pieces=size * groups, part=part, is_sent=True, is_written=True),)
    common = SnapshotPiece(
        number=1 + shard * parts + group % parts,
        num_pieces=1 + size * parts,
        part=state.part(group % parts, of=parts, has_buffers=False),
        is_sent=False,
        is_written=group // parts == 1,
    )
    if state.rank != 0:
        return (common,)
    own = SnapshotPiece(
        number=0, num_pieces=common.num_pieces, part=state.buffers_part(), is_sent=True, is_written=True
    )
    return (own, common)

"""Immutable maps and sets that are cheap to change, for a membership state with thousands of nodes.

A dict or frozenset is copied whole for every change: 10,000 reports that each change one node of 10,000 would copy
10^8 entries. Here the entries are divided among shards by a hash of their key, and a change copies one shard. Up to
`_MAX_SHARD` entries there is one shard, in the order of insertion; beyond that, the order is that of the shards,
equal in every process.
"""

from __future__ import annotations

import zlib
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Set, ValuesView
from itertools import chain
from typing import Any, Generic, TypeVar

V = TypeVar("V")
T = TypeVar("T", bound=str | int)

_MAX_SHARD = 256
# Entries per shard after a division: a change copies so many entries and one tuple of all shards.
_MEAN_SHARD = 64


class ShardedMap(Mapping[str, V], Generic[V]):
    """An immutable mapping by name; `set` and `without` return a changed one."""

    __slots__ = ("_count", "_shards")

    def __init__(self, items: Mapping[str, V]) -> None:
        self._count = len(items)
        self._shards = _divide(items)

    def __getitem__(self, key: str) -> V:
        return self._shards[_shard_of(key, len(self._shards))][key]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._shards)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self.items())!r})"

    def get(self, key: str, default: Any = None) -> Any:
        return self._shards[_shard_of(key, len(self._shards))].get(key, default)

    def values(self) -> ValuesView[V]:
        return _Values(self)

    def items(self) -> ItemsView[str, V]:
        return _Items(self)

    def set(self, key: str, value: V) -> ShardedMap[V]:
        """Return a mapping in which `key` has this value."""
        number = _shard_of(key, len(self._shards))
        shard = {**self._shards[number], key: value}
        if len(shard) > _MAX_SHARD:
            return ShardedMap({**dict(self.items()), key: value})
        return self._with_shard(number, shard)

    def without(self, key: str) -> ShardedMap[V]:
        """Return a mapping that does not have `key`."""
        number = _shard_of(key, len(self._shards))
        shard = self._shards[number].copy()
        shard.pop(key, None)
        return self._with_shard(number, shard)

    def _with_shard(self, number: int, shard: dict[str, V]) -> ShardedMap[V]:
        changed = object.__new__(ShardedMap)
        changed._count = self._count + len(shard) - len(self._shards[number])
        changed._shards = (*self._shards[:number], shard, *self._shards[number + 1 :])
        return changed


class _Values(ValuesView[V]):
    """Values without a search for each key, which takes ten times as long."""

    _mapping: ShardedMap[V]

    def __iter__(self) -> Iterator[V]:
        return chain.from_iterable(shard.values() for shard in self._mapping._shards)


class _Items(ItemsView[str, V]):
    _mapping: ShardedMap[V]

    def __iter__(self) -> Iterator[tuple[str, V]]:
        return chain.from_iterable(shard.items() for shard in self._mapping._shards)


class ShardedSet(Set[T], Generic[T]):
    """An immutable set of names or numbers; `with_one` and `without` return a changed one."""

    __slots__ = ("_count", "_shards")

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._shards: tuple[dict[T, None], ...] = _divide(dict.fromkeys(items))
        self._count = sum(map(len, self._shards))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, int)) and key in self._shards[_shard_of(key, len(self._shards))]

    def __iter__(self) -> Iterator[T]:
        return chain.from_iterable(self._shards)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self)!r})"

    def with_one(self, key: T) -> ShardedSet[T]:
        """Return a set that also has `key`."""
        number = _shard_of(key, len(self._shards))
        shard = {**self._shards[number], key: None}
        if len(shard) > _MAX_SHARD:
            return ShardedSet(chain(self, (key,)))
        return self._with_shard(number, shard)

    def without(self, key: T) -> ShardedSet[T]:
        """Return a set that does not have `key`."""
        number = _shard_of(key, len(self._shards))
        if key not in self._shards[number]:
            return self
        shard = self._shards[number].copy()
        del shard[key]
        return self._with_shard(number, shard)

    def _with_shard(self, number: int, shard: dict[T, None]) -> ShardedSet[T]:
        changed: ShardedSet[T] = object.__new__(ShardedSet)
        changed._count = self._count + len(shard) - len(self._shards[number])
        changed._shards = (*self._shards[:number], shard, *self._shards[number + 1 :])
        return changed


def _divide(items: Mapping[T, V]) -> tuple[dict[T, V], ...]:
    num_shards = 1 if len(items) <= _MAX_SHARD else len(items) // _MEAN_SHARD
    shards: tuple[dict[T, V], ...] = tuple({} for _ in range(num_shards))
    for key, value in items.items():
        shards[_shard_of(key, num_shards)][key] = value
    return shards


def _shard_of(key: str | int, num_shards: int) -> int:
    if num_shards == 1:
        return 0
    return key % num_shards if isinstance(key, int) else zlib.crc32(key.encode()) % num_shards

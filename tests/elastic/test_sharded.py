"""Maps and sets that copy one shard per change."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.elastic.sharded import ShardedMap, ShardedSet

CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 700)), max_size=60)


@settings(max_examples=20)
@given(size=st.sampled_from([0, 3, 256, 257, 600]), changes=CHANGES)
def test_map__any_changes__equals_a_dict_and_leaves_the_former_map_as_it_was(
    size: int, changes: list[tuple[bool, int]]
) -> None:
    expected = {f"n{number}": number for number in range(size)}
    found = ShardedMap(expected)
    for is_set, number in changes:
        before, former = dict(expected), found
        if is_set:
            expected[f"n{number}"] = -number
            found = found.set(f"n{number}", -number)
        else:
            expected.pop(f"n{number}", None)
            found = found.without(f"n{number}")
        assert former == before and len(former) == len(before)
    assert found == expected and len(found) == len(expected) == len(list(found))


@settings(max_examples=20)
@given(size=st.sampled_from([0, 3, 256, 257, 600]), changes=CHANGES)
def test_set__any_changes__equals_a_set(size: int, changes: list[tuple[bool, int]]) -> None:
    expected, found = set(range(size)), ShardedSet(range(size))
    for is_added, number in changes:
        expected = expected | {number} if is_added else expected - {number}
        found = found.with_one(number) if is_added else found.without(number)
    assert found == expected and len(found) == len(expected)
    assert all((number in found) == (number in expected) for number in range(701))


def test_map__key_that_is_missing__raises() -> None:
    with pytest.raises(KeyError):
        ShardedMap({"a": 1})["b"]


def test_map__up_to_256_entries__order_of_insertion() -> None:
    names = [f"n{number}" for number in range(255, -1, -1)]
    assert list(ShardedMap(dict.fromkeys(names))) == names

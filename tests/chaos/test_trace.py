"""Traces as files, as schedules, scaled: every replay here is done by hand, node by node."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.chaos.trace import NodeChange, Trace, faster, from_counts, poisson, read_trace, scale
from forge.errors import ArgumentError

RECORDED = Path(__file__).parents[3] / "shared" / "traces"

COUNTS = from_counts([(0, 2), (60, 3), (120, 1), (180, 1)])

NAMED = Trace(
    changes=(
        NodeChange(at_s=0.0, added=("a", "b"), removed=()),
        NodeChange(at_s=60.0, added=("c",), removed=("a",)),
        NodeChange(at_s=90.5, added=(), removed=("b", "c")),
    ),
    duration_s=90.5,
    most=2,
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def change(at_s: float, *, added: str = "", removed: str = "") -> NodeChange:
    return NodeChange(at_s=at_s, added=tuple(added.split()), removed=tuple(removed.split()))


def counts(trace: Trace) -> dict[float, int]:
    """How many nodes there are after each change, having replayed it; a replay that cannot be fails."""
    there: set[str] = set()
    found = {}
    for each in trace.changes:
        assert len(set(each.removed)) == len(each.removed) and set(each.removed) <= there
        there -= set(each.removed)
        assert len(set(each.added)) == len(each.added) and not there & set(each.added)
        there |= set(each.added)
        found[each.at_s] = len(there)
    return found


def lives(trace: Trace) -> Counter[tuple[float, float]]:
    """When each stay began and when it ended (never: infinite)."""
    since: dict[str, float] = {}
    found: Counter[tuple[float, float]] = Counter()
    for each in trace.changes:
        found.update((since.pop(node), each.at_s) for node in each.removed)
        since |= dict.fromkeys(each.added, each.at_s)
    found.update((began, math.inf) for began in since.values())
    return found


def churn(trace: Trace) -> int:
    return sum(min(len(each.added), len(each.removed)) for each in trace.changes)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Nodes of any fleet of up to 40, which may come back under their name, even at the instant they leave."""
    names = [f"m{i}" for i in range(draw(st.integers(1, 40)))]
    there = names[: draw(st.integers(1, len(names)))]
    changes, most, at_s = [NodeChange(at_s=0.0, added=tuple(there), removed=())], len(there), 0
    for _ in range(draw(st.integers(0, 12))):
        at_s += draw(st.integers(1, 100))
        removed = draw(st.permutations(there))[: draw(st.integers(0, len(there)))]
        stay = [name for name in there if name not in removed]
        away = [name for name in names if name not in stay]
        added = draw(st.permutations(away))[: draw(st.integers(0, len(away)))]
        if added or removed:
            there, most = stay + added, max(most, len(stay + added))
            changes.append(NodeChange(at_s=float(at_s), added=tuple(added), removed=tuple(removed)))
    return Trace(changes=tuple(changes), duration_s=at_s + 1.0, most=most)


def scaled_count(count: int, trace: Trace, num_nodes: int) -> int:
    return max(math.floor(Fraction(count * num_nodes, trace.most) + Fraction(1, 2)), 1 if count else 0)


# Files


@pytest.mark.parametrize(
    "text",
    [
        "0,add,a\n0,add,b\n60000,remove,a\n60000,add,c\n90500,remove,b\n90500,remove,c\n",
        '[0, "add", {"nodes": ["a", "b"]}]\n[60000, "remove", {"nodes": ["a"]}]\n'
        '[60000, "add", {"nodes": ["c"], "strategy": [2, 3]}]\n[90500, "remove", {"nodes": ["b", "c"]}]\n',
    ],
    ids=["csv", "json"],
)
def test_names_are_read_and_the_lines_of_one_instant_are_one_change(tmp_path: Path, text: str) -> None:
    assert read_trace(write(tmp_path, text)) == NAMED


COUNTED = {
    "seconds": "0,2\n60,3\n120,1\n180,1\n",
    "seconds with a heading": "time,count\n0.0,2.0\n60.0,3.0\n120.0,1.0\n180.0,1.0\n",
    "indexed": "0,0,2\n1,60,3\n2,120,1\n3,180,1\n",
    "indexed with a heading": ",seconds,nodes\n0,0,2\n1,60,3\n2,120,1\n3,180,1\n",
    "a time that does not begin at 0": "1.7e9,2\n1700000060,3\n1700000120,1\n1700000180,1\n",
    "dated, over midnight": "2023-02-28, 23:59:00, 2\n2023-03-01, 00:00:00, 3\n"
    "2023-03-01, 00:01:00, 1\n2023-03-01, 00:02:00, 1\n",
    "dated with a heading": "date,time,nodes\n2023-02-28,23:59:00,2\n2023-03-01,00:00:00,3\n"
    "2023-03-01,00:01:00,1\n2023-03-01,00:02:00,1\n",
    "comments and blank lines": "# ours\n\ntime,count\n  # more\n0,2\n\n60, 3\n\t120 ,1\n180,1",
    "from Windows": "\ufefftime,count\r\n0,2\r\n\r\n60,3\r\n120,1\r\n180,1\r\n",
}


@pytest.mark.parametrize("text", COUNTED.values(), ids=COUNTED.keys())
def test_counts_are_read_in_every_format(tmp_path: Path, text: str) -> None:
    assert read_trace(write(tmp_path, text)) == COUNTS


def test_a_trace_of_json_lasts_as_long_as_its_last_line_and_an_idle_line_changes_nothing(tmp_path: Path) -> None:
    idle = '[60000, "no-op", {"nodes": [], "duration": 30000}]\n'
    trace = read_trace(write(tmp_path, '[0, "add", {"nodes": ["a"], "duration": 60000}]\n' + idle))
    assert trace == Trace(changes=(change(0, added="a"),), duration_s=90, most=1)


def test_a_node_that_comes_and_goes_at_one_instant_was_not_there(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "0,add,a\n5,add,b\n5,remove,b\n9,add,b\n"))
    assert trace.changes == (change(0, added="a"), change(0.009, added="b"))


def test_a_node_that_leaves_and_comes_back_at_one_instant_was_preempted(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "0,add,a\n5,remove,a\n5,add,a\n"))
    assert trace.changes == (change(0, added="a"), change(0.005, added="a", removed="a"))


WRONG = {
    "no format": ("hello\n", 1, "expected `milliseconds,add|remove,node` or `[milliseconds"),
    "two headings": ("time,count\nseconds,nodes\n0,1\n", 2, "got 'seconds,nodes'"),
    "a heading below the first line": ("0,1\ntime,count\n", 2, "expected `seconds,count`; got 'time,count'"),
    "another format": ("0,1\n5,add,a\n", 2, "expected `seconds,count`; got '5,add,a'"),
    "another width": ("0,0,1\n5,3\n", 2, "expected `index,seconds,count`; got '5,3'"),
    "the line counted with comments": ("# a\n\n0,1\nx\n", 4, "expected `seconds,count`; got 'x'"),
    "an unknown verb": ("0,add,a\n5,stop,a\n", 2, "expected `milliseconds,add|remove,node`; got '5,stop,a'"),
    "no name": ("0,add,a\n5,add,\n", 2, "got '5,add,'"),
    "there already": ("0,add,a\n5,add,a\n", 2, "node 'a' is added but is there already"),
    "twice in a line": ('[0, "add", {"nodes": ["a", "a"]}]', 1, "node 'a' is added but is there already"),
    "not there": ("0,add,a\n5,remove,b\n", 2, "node 'b' is removed but is not there"),
    "backwards": ("0,1\n60,2\n59,3\n", 3, "the time goes backwards, from 60 s to 59 s after the first"),
    "backwards in date": ("2023-03-01,10:00:00,1\n2023-03-01,09:59:59,1\n", 2, "from 0 s to -1 s"),
    "no such day": ("2023-03-01,10:00:00,1\n2023-02-30,10:00:00,1\n", 2, "expected `YYYY-MM-DD, HH:MM:SS, count`"),
    "negative count": ("0,1\n5,-1\n", 2, "expected `seconds,count`; got '5,-1'"),
    "negative time": ("-5,1\n", 1, "got '-5,1'"),
    "half a node": ("0,1\n5,1.5\n", 2, "got '5,1.5'"),
    "not a number": ("0,1\n5,nan\n", 2, "got '5,nan'"),
    "not a number, at first": ("nan,nan\n0,1\n", 1, "got 'nan,nan'"),
    "a number only Python reads": ("0,1\n1_0,1\n", 2, "got '1_0,1'"),
    "a cloud's worth of nodes": ("0,1\n5,1000000000000000000\n", 2, "1,000,000,000,000,000,000 nodes at once"),
    "a number without end": (f"0,1\n5,{'9' * 5000}\n", 2, "expected `seconds,count`; got '5,999"),
    "a time beyond all": ("0,1\n1e30,1\n", 2, "1e+30 s; expected 0 or more, at most ten years after the first"),
    "json cut off": ('[0, "add", {"nodes": ["a"]}]\n[5, "add", {"nod', 2, "got '[5, \"add\", {\"nod'"),
    "json without end": ('[0, "add", {"nodes": ["a"]}]\n' + "[" * 100_000, 2, "got '[[["),
    "json with a number without end": (f'[{"9" * 5000}, "add", {{"nodes": ["a"]}}]', 1, "inf s; expected"),
    "json with nan": ('[NaN, "add", {"nodes": ["a"]}]', 1, "nan s; expected 0 or more"),
    "json with a negative time": ('[-5, "add", {"nodes": ["a"]}]', 1, "-0.005 s; expected 0 or more"),
    "json that lasts less than nothing": ('[0, "add", {"nodes": ["a"], "duration": -5}]', 1, "expected 0 or more"),
    "json with a bool": ('[true, "add", {"nodes": ["a"]}]', 1, "expected"),
    "json without nodes": ('[0, "add", {}]', 1, "expected"),
    "json with a number for a node": ('[0, "add", {"nodes": [7]}]', 1, "expected"),
    "a name that moves the cursor": ('[0, "add", {"nodes": ["\\u001b[2J"]}]', 1, "expected"),
    "a text that moves the cursor": ("0,1\n\x1b[2J\n", 2, "got '\\x1b[2J'"),
    "10 MB in a line": ("0,1\n" + "5" * 10_000_000, 2, "more than 1 MiB in a line"),
    "65 MB": (b"0,1\n" + b"#" * 1_000_000 + (b"\n#" + b"#" * 1_000_000) * 70, 69, "or 64 MiB in all"),
    "not text": (b"0,1\n\xff\xfe\n", 2, "expected text in UTF-8"),
    "crowds that come and go": (
        "".join(f"{i},{i % 2 * 10_000}\n" for i in range(300)), 202, "more than 1,000,000 nodes were added"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "expected"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_line_is_named_with_what_was_expected(
    tmp_path: Path, text: str | bytes, line: int, expected: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ArgumentError) as raised:
        read_trace(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:{line}: ") and expected in message
    assert message.isprintable() and len(message) < len(str(path)) + 400


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "time,count\n", "0,0\n60,0\n", "0,1\n0,0\n"])
def test_a_file_without_a_node_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ArgumentError, match=": no node at any time; expected lines of `") as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        read_trace(tmp_path / "gone")
    with pytest.raises(ArgumentError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


# Counts


def test_the_node_that_is_there_longest_leaves_first() -> None:
    assert from_counts([(0, 2), (60, 3), (120, 1)]).changes == (
        change(0, added="node-1 node-2"),
        change(60, added="node-3"),
        change(120, removed="node-1 node-2"),
    )


def test_a_trace_may_begin_without_nodes() -> None:
    assert from_counts([(0, 0), (60, 1)]).changes == (change(0), change(60, added="node-1"))


def test_a_count_that_falls_and_rises_at_one_instant_is_a_preemption() -> None:
    assert from_counts([(0, 2), (5, 1), (5, 2)]).changes[1] == change(5, added="node-3", removed="node-1")


@pytest.mark.parametrize(
    "wrong", [[], [(0, 0)], [(0, 1), (5, -1)], [(math.nan, 1)], [(math.inf, 1)], [(-1, 1)], [(0, 1), (math.nan, 1)]]
)
def test_counts_that_cannot_be_are_refused(wrong: list[tuple[float, int]]) -> None:
    with pytest.raises(ArgumentError):
        from_counts(wrong)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 30)), min_size=1))
def test_the_last_count_of_each_instant_holds_after_it(steps: list[tuple[int, int]]) -> None:
    readings, at_s = [(0, 1)], 1
    for gap_s, count in steps:
        at_s += gap_s
        readings.append((at_s, count))
    trace = from_counts(readings)
    found, known = counts(trace), 0
    for when, count in dict(readings).items():
        known = found.get(when, known)
        assert known == count
    assert (trace.most, trace.duration_s) == (max(found.values()), at_s)


# Scaling


@given(traces(), st.integers(1, 60))
def test_a_scaled_trace_can_be_replayed_and_has_the_count_of_the_rule_at_every_instant(
    trace: Trace, num_nodes: int
) -> None:
    scaled = scale(trace, num_nodes=num_nodes)
    assert (scaled.duration_s, scaled.most) == (trace.duration_s, num_nodes)
    found, known = counts(scaled), 0
    for at_s, count in counts(trace).items():
        known = found.pop(at_s, known)
        assert known == scaled_count(count, trace, num_nodes)
    assert not found  # nothing happens at other instants


@given(traces(), st.integers(1, 60))
def test_what_is_replaced_in_all_is_the_sum_of_the_shares_rounded(trace: Trace, num_nodes: int) -> None:
    shares, before = Fraction(0), 0
    for each, after in zip(trace.changes, counts(trace).values(), strict=True):
        replaced, least = min(len(each.added), len(each.removed)), min(before, after)
        shares += Fraction(replaced * scaled_count(least, trace, num_nodes), least) if replaced else 0
        before = after
    assert churn(scale(trace, num_nodes=num_nodes)) == math.floor(shares + Fraction(1, 2))


@given(traces(), st.integers(1, 60))
def test_nobody_leaves_for_nothing(trace: Trace, num_nodes: int) -> None:
    """Beyond what the count asks for, as many leave as join; and only where the original has both."""
    originals = {each.at_s: each for each in trace.changes}
    for each in scale(trace, num_nodes=num_nodes).changes:
        if each.added and each.removed:
            assert originals[each.at_s].added and originals[each.at_s].removed


@given(traces())
def test_at_its_own_size_every_node_comes_and_goes_as_the_one_it_stands_for(trace: Trace) -> None:
    assert lives(scale(trace, num_nodes=trace.most)) == lives(trace)


def test_with_twice_the_nodes_two_come_and_go_for_each() -> None:
    assert lives(scale(NAMED, num_nodes=4)) == Counter({life: 2 * times for life, times in lives(NAMED).items()})


def test_the_node_whose_original_leaves_is_the_one_that_leaves() -> None:
    eight = change(0, added="a b c d e f g h")  # node-1 to node-4 stand for a to d
    for original, simulated in {"b c": "node-2", "c d": "node-3", "d a": "node-1", "g h": "node-1"}.items():
        trace = Trace(changes=(eight, change(5, removed=original)), duration_s=9, most=8)
        assert scale(trace, num_nodes=4).changes[1] == change(5, removed=simulated)


def test_a_node_that_loses_its_original_and_stays_stands_for_another() -> None:
    changes = (change(0, added="a b c d"), change(5, removed="a"), change(7, removed="b d"))
    # a leaves and 2 stay 2: node-1 now stands for c, since b is node-2's; so node-2 leaves with b.
    scaled = scale(Trace(changes=changes, duration_s=9, most=4), num_nodes=2)
    assert scaled.changes == (change(0, added="node-1 node-2"), change(7, removed="node-2"))


def test_small_churn_adds_up() -> None:
    """One of 32 replaced each minute is one of 4 replaced every eighth."""
    changes = [NodeChange(at_s=0.0, added=tuple(f"m{i}" for i in range(32)), removed=())]
    changes += [change(60 * i, added=f"m{31 + i}", removed=f"m{i - 1}") for i in range(1, 25)]
    scaled = scale(Trace(changes=tuple(changes), duration_s=1500, most=32), num_nodes=4)
    assert [each.at_s / 60 for each in scaled.changes] == [0, 4, 12, 20]


def test_a_fleet_replaced_as_a_whole_is_replaced_as_a_whole() -> None:
    names = [" ".join(f"{letter}{i}" for i in range(11)) for letter in "xy"]
    more = change(9, added=" ".join(f"z{i}" for i in range(21)))
    changes = (change(0, added=names[0]), change(5, added=names[1], removed=names[0]), more)
    scaled = scale(Trace(changes=changes, duration_s=10, most=32), num_nodes=8)
    assert scaled.changes[1].removed == scaled.changes[0].added == ("node-1", "node-2", "node-3")


@pytest.mark.parametrize("num_nodes", [0, -1, 10**18])
def test_a_trace_is_not_scaled_to_an_impossible_fleet(num_nodes: int) -> None:
    with pytest.raises(ArgumentError, match=f"between 1 and 10,000 nodes, not to {num_nodes:,}"):
        scale(NAMED, num_nodes=num_nodes)


# Speed


def test_a_faster_trace_is_the_same_in_less_time() -> None:
    assert faster(NAMED, speed=2) == Trace(
        changes=(
            change(0, added="a b"),
            change(30, added="c", removed="a"),
            change(45.25, removed="b c"),
        ),
        duration_s=45.25,
        most=2,
    )


@pytest.mark.parametrize("speed", [0, -1, math.nan, math.inf])
def test_a_speed_is_above_zero(speed: float) -> None:
    with pytest.raises(ArgumentError, match="at a speed above 0"):
        faster(NAMED, speed=speed)


# Poisson


def stays(trace: Trace) -> dict[str, list[tuple[float, float]]]:
    """When each node came and failed, as often as it did."""
    since: dict[str, float] = {}
    found = defaultdict(list)
    for each in trace.changes:
        for node in each.removed:
            found[node].append((since[node], each.at_s))
        since |= dict.fromkeys(each.added, each.at_s)
    return found


def test_poisson_is_the_same_for_the_same_seed_alone() -> None:
    first, again, other = (
        poisson(num_nodes=4, mtbf_s=100, down_s=10, duration_s=1000, seed=seed) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_a_node_fails_when_it_fails_however_many_others_there_are() -> None:
    few, many = (poisson(num_nodes=n, mtbf_s=100, down_s=10, duration_s=1000, seed=7) for n in (2, 9))
    assert stays(few)["node-2"] == stays(many)["node-2"] != []


def test_poisson_nodes_live_exponentially_and_are_away_for_as_long_as_said() -> None:
    found = stays(poisson(num_nodes=200, mtbf_s=100, down_s=10, duration_s=10_000, seed=7)).values()
    lasted = [end - began for of_one in found for began, end in of_one]
    away = {round(after[0] - before[1], 6) for of_one in found for before, after in pairwise(of_one)}
    assert away == {10}
    assert len(lasted) == pytest.approx(200 * 10_000 / 110, rel=0.05)
    assert statistics.mean(lasted) == pytest.approx(100, rel=0.05)
    assert statistics.stdev(lasted) == pytest.approx(100, rel=0.05)


@given(st.integers(1, 8), st.floats(1, 1e4), st.floats(0, 1e3), st.floats(1, 1e3), st.integers())
def test_a_poisson_trace_can_be_replayed_and_begins_with_all(
    num_nodes: int, mtbf_s: float, down_s: float, duration_s: float, seed: int
) -> None:
    trace = poisson(num_nodes=num_nodes, mtbf_s=mtbf_s, down_s=down_s, duration_s=duration_s, seed=seed)
    assert counts(trace)[0.0] == trace.most == num_nodes
    assert trace.duration_s == duration_s and trace.changes[-1].at_s < duration_s


@pytest.mark.parametrize(
    "wrong",
    [
        *({"num_nodes": number} for number in (0, 10**18)),
        *({"mtbf_s": number} for number in (0, 1e-9, math.nan)),
        *({"down_s": number} for number in (-1, math.nan)),
        *({"duration_s": number} for number in (0, math.inf)),
    ],
)
def test_a_poisson_trace_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    fine = {"num_nodes": 4, "mtbf_s": 100, "down_s": 0, "duration_s": 1000}
    with pytest.raises(ArgumentError, match="expected 1 to 10,000 nodes, times above 0"):
        poisson(**(fine | wrong), seed=7)


# Recorded


def recorded(name: str) -> Trace:
    if not (RECORDED / name).exists():
        pytest.skip(f"no {name} beside this checkout")
    return read_trace(RECORDED / name)


def test_a_recorded_fleet_is_read_as_its_description_says() -> None:
    trace = recorded("bamboo-p3.csv")
    leaving = [each for each in trace.changes if each.removed]
    assert sum(len(each.added) for each in trace.changes) == 177
    assert (sum(len(each.removed) for each in leaving), len(leaving)) == (167, 79)
    assert trace.most == 32
    assert trace.duration_s == pytest.approx(11.37 * 3600, rel=1e-3)


@pytest.mark.parametrize("name", ["parcae-hh.jsonl", "parcae-lh.jsonl"])
def test_a_recorded_hour_is_read_as_its_description_says(name: str) -> None:
    assert recorded(name).duration_s == 60 * 60


@pytest.mark.parametrize("name", ["bamboo-p3.csv", "parcae-hh.jsonl", "parcae-lh.jsonl"])
def test_a_recorded_fleet_scaled_to_four_nodes_has_the_counts_of_the_rule(name: str) -> None:
    trace = recorded(name)
    found, known = counts(scale(trace, num_nodes=4)), 0
    for at_s, count in counts(trace).items():
        known = found.get(at_s, known)
        assert known == scaled_count(count, trace, 4)

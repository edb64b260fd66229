"""Spot traces: reading, writing, scaling, speeding up, Poisson failures."""

from __future__ import annotations

import gzip
import json
import math
import statistics
import tempfile
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.chaos.trace import NodeChange, Trace, faster, poisson
from forge.chaos.trace_file import read_trace
from forge.chaos.trace_scale import scale
from forge.errors import ArgumentError

RECORDED = Path(__file__).parents[3] / "shared" / "traces"

NAMED = Trace(
    changes=(
        NodeChange(at_s=0.0, added=("a", "b"), removed=()),
        NodeChange(at_s=60.0, added=("c",), removed=("a",)),
        NodeChange(at_s=90.5, added=(), removed=("b", "c")),
    ),
    duration_s=90.5,
    max_nodes=2,
)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def change(at_s: float, *, added: str = "", removed: str = "") -> NodeChange:
    return NodeChange(at_s=at_s, added=tuple(added.split()), removed=tuple(removed.split()))


def counts(trace: Trace) -> dict[float, int]:
    """Number of nodes after each change; fails if the trace is impossible."""
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
    return Trace(changes=tuple(changes), duration_s=at_s + 1.0, max_nodes=most)


def scaled_count(count: int, trace: Trace, num_nodes: int) -> int:
    return max(math.floor(Fraction(count * num_nodes, trace.max_nodes) + Fraction(1, 2)), 1 if count else 0)


@given(traces())
def test_to_jsonl__any_trace__is_read_back(trace: Trace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert read_trace(write(Path(folder), trace.to_jsonl())) == trace


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
def test_read_trace__lines_of_one_time__are_one_change(tmp_path: Path, text: str) -> None:
    assert read_trace(write(tmp_path, text)) == NAMED


@pytest.mark.parametrize(
    "text",
    [
        "1.7e12,add,a\n1700000005000,remove,a\n",
        '# ours\n\n0,add,a\n  # more\n\t5000 , remove,"a"',
        "\ufeff0,add,a\r\n\r\n5000,remove,a\r\n",
    ],
    ids=["a time that does not begin at 0", "comments, blanks, quotes", "from Windows"],
)
def test_read_trace__csv_variants__are_the_same_trace(tmp_path: Path, text: str) -> None:
    assert read_trace(write(tmp_path, text)).changes == (change(0, added="a"), change(5, removed="a"))


def test_read_trace__json_with_no_op__lasts_until_its_end(tmp_path: Path) -> None:
    idle = '[60000, "no-op", {"nodes": [], "duration": 30000}]\n'
    trace = read_trace(write(tmp_path, '[0, "add", {"nodes": ["a"], "duration": 60000}]\n' + idle))
    assert trace == Trace(changes=(change(0, added="a"),), duration_s=90, max_nodes=1)


def test_read_trace__node_joins_and_leaves_at_one_time__no_change(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "0,add,a\n5,add,b\n5,remove,b\n9,add,b\n"))
    assert trace.changes == (change(0, added="a"), change(0.009, added="b"))


def test_read_trace__node_leaves_and_joins_at_one_time__is_a_preemption(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "0,add,a\n5,remove,a\n5,add,a\n"))
    assert trace.changes == (change(0, added="a"), change(0.005, added="a", removed="a"))


A = "0,add,a\n"
CSV = "expected `milliseconds,add|remove,node`"
JSON = '[0, "add", {"nodes": ["a"]}]'
WRONG = {
    "no format": ("hello\n", 1, "expected `milliseconds,add|remove,node` or `[milliseconds"),
    "heading": (f"time,verb,node\n{A}", 1, "got 'time,verb,node'"),
    "other format": (f"{A}{JSON}\n", 2, f"{CSV}; got '[0, "),
    "other width": (f"{A}5,3\n", 2, f"{CSV}; got '5,3'"),
    "line after comments": (f"# a\n\n{A}x\n", 4, f"{CSV}; got 'x'"),
    "unknown verb": (f"{A}5,stop,a\n", 2, f"{CSV}; got '5,stop,a'"),
    "no name": (f"{A}5,add,\n", 2, "got '5,add,'"),
    "present already": (f"{A}5,add,a\n", 2, "node 'a' is added but is present already"),
    "twice in a line": ('[0, "add", {"nodes": ["a", "a"]}]', 1, "node 'a' is added but is present already"),
    "not present": (f"{A}5,remove,b\n", 2, "node 'b' is removed but is not present"),
    "backwards": (f"{A}60000,add,b\n59000,add,c\n", 3, "backwards, from 60 s to 59 s after the first"),
    "negative time": ("-5,add,a\n", 1, "got '-5,add,a'"),
    "not a number": ("nan,add,a\n", 1, "got 'nan,add,a'"),
    "number that only Python reads": (f"{A}1_0,add,b\n", 2, "got '1_0,add,b'"),
    "number without end": (f"{A}{'9' * 5000},add,b\n", 2, f"{CSV}; got '999"),
    "time beyond all": (f"{A}1e33,add,b\n", 2, "1e+30 s; expected 0 or more, at most ten years after the first"),
    "too many nodes": (json.dumps([0, "add", {"nodes": [*map(str, range(10_001))]}]), 1, "10,001 nodes at once"),
    "too many joins": (
        "".join(
            json.dumps([i, "remove" if i % 2 else "add", {"nodes": [f"m{j}" for j in range(10_000)]}]) + "\n"
            for i in range(203)
        ), 201, "a trace adds at most 1,000,000 nodes"
    ),
    "json cut off": (f'{JSON}\n[5, "add", {{"nod', 2, "got '[5, \"add\", {\"nod'"),
    "json without end": (f"{JSON}\n" + "[" * 100_000, 2, "got '[[["),
    "json, number without end": (f'[{"9" * 5000}, "add", {{"nodes": ["a"]}}]', 1, "inf s; expected"),
    "json, nan": ('[NaN, "add", {"nodes": ["a"]}]', 1, "nan s; expected 0 or more"),
    "json, negative time": ('[-5, "add", {"nodes": ["a"]}]', 1, "-0.005 s; expected 0 or more"),
    "json, negative duration": ('[0, "add", {"nodes": ["a"], "duration": -5}]', 1, "0 s for -0.005 s; expected"),
    "json, bool": ('[true, "add", {"nodes": ["a"]}]', 1, "expected"),
    "json, no nodes": ('[0, "add", {}]', 1, "expected"),
    "json, number as a node": ('[0, "add", {"nodes": [7]}]', 1, "expected"),
    "name that moves the cursor": ('[0, "add", {"nodes": ["\\u001b[2J"]}]', 1, "expected"),
    "text that moves the cursor": (f"{A}\x1b[2J\n", 2, "got '\\x1b[2J'"),
    "10 MB in a line": (A + "5" * 10_000_000, 2, "more than 1 MiB in a line"),
    "65 MB": (b"0,add,a\n" + b"#" * 1_000_000 + (b"\n#" + b"#" * 1_000_000) * 70, 69, "or 64 MiB in all"),
    "not text": (b"0,add,a\n\xff\xfe\n", 2, "expected text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "line", "expected"), WRONG.values(), ids=WRONG.keys())
def test_read_trace__wrong_line__names_it_and_what_was_expected(
    tmp_path: Path, text: str | bytes, line: int, expected: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ArgumentError) as raised:
        read_trace(path)
    message = str(raised.value)
    assert message.startswith(f"{path}:{line}: ") and expected in message
    assert message.isprintable() and len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", '[0, "no-op", {"nodes": []}]', "0,add,a\n0,remove,a\n"]
)
def test_read_trace__no_node__is_rejected(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ArgumentError, match=": no node at any time; expected lines of `") as raised:
        read_trace(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_read_trace__compressed__says_how_to_decompress(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is compressed; decompress it first: gzip -dc"):
        read_trace(write(tmp_path, gzip.compress(b"0,add,a\n")))


def test_read_trace__no_file__is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        read_trace(tmp_path / "gone")
    with pytest.raises(ArgumentError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


# Scaling


@given(traces(), st.integers(1, 60))
def test_scale__any_trace__has_the_count_of_the_rule_at_every_time(trace: Trace, num_nodes: int) -> None:
    scaled = scale(trace, num_nodes=num_nodes)
    assert (scaled.duration_s, scaled.max_nodes) == (trace.duration_s, num_nodes)
    found, known = counts(scaled), 0
    for at_s, count in counts(trace).items():
        known = found.pop(at_s, known)
        assert known == scaled_count(count, trace, num_nodes)
    assert not found  # nothing happens at other instants


@given(traces(), st.integers(1, 60))
def test_scale__any_trace__total_churn_is_the_rounded_sum_of_shares(trace: Trace, num_nodes: int) -> None:
    shares, before = Fraction(0), 0
    for each, after in zip(trace.changes, counts(trace).values(), strict=True):
        replaced, least = min(len(each.added), len(each.removed)), min(before, after)
        shares += Fraction(replaced * scaled_count(least, trace, num_nodes), least) if replaced else 0
        before = after
    assert churn(scale(trace, num_nodes=num_nodes)) == math.floor(shares + Fraction(1, 2))


@given(traces(), st.integers(1, 60))
def test_scale__any_trace__replaces_nodes_only_where_the_original_does(trace: Trace, num_nodes: int) -> None:
    """Beyond what the count asks for, as many leave as join; and only where the original has both."""
    originals = {each.at_s: each for each in trace.changes}
    for each in scale(trace, num_nodes=num_nodes).changes:
        if each.added and each.removed:
            assert originals[each.at_s].added and originals[each.at_s].removed


@given(traces())
def test_scale__to_its_own_size__keeps_every_stay(trace: Trace) -> None:
    assert lives(scale(trace, num_nodes=trace.max_nodes)) == lives(trace)


def test_scale__to_twice_its_size__doubles_every_stay() -> None:
    assert lives(scale(NAMED, num_nodes=4)) == Counter({life: 2 * times for life, times in lives(NAMED).items()})


def test_scale__original_leaves__its_simulated_node_leaves() -> None:
    eight = change(0, added="a b c d e f g h")  # node-1 to node-4 stand for a to d
    for original, simulated in {"b c": "node-2", "c d": "node-3", "d a": "node-1", "g h": "node-1"}.items():
        trace = Trace(changes=(eight, change(5, removed=original)), duration_s=9, max_nodes=8)
        assert scale(trace, num_nodes=4).changes[1] == change(5, removed=simulated)


def test_scale__node_stays_without_its_original__stands_for_another() -> None:
    changes = (change(0, added="a b c d"), change(5, removed="a"), change(7, removed="b d"))
    # a leaves and 2 stay 2: node-1 now stands for c, since b is node-2's; so node-2 leaves with b.
    scaled = scale(Trace(changes=changes, duration_s=9, max_nodes=4), num_nodes=2)
    assert scaled.changes == (change(0, added="node-1 node-2"), change(7, removed="node-2"))


def test_scale__small_churn__adds_up() -> None:
    """One of 32 replaced each minute is one of 4 replaced every eighth."""
    changes = [NodeChange(at_s=0.0, added=tuple(f"m{i}" for i in range(32)), removed=())]
    changes += [change(60 * i, added=f"m{31 + i}", removed=f"m{i - 1}") for i in range(1, 25)]
    scaled = scale(Trace(changes=tuple(changes), duration_s=1500, max_nodes=32), num_nodes=4)
    assert [each.at_s / 60 for each in scaled.changes] == [0, 4, 12, 20]


def test_scale__whole_fleet_replaced__is_replaced_as_a_whole() -> None:
    names = [" ".join(f"{letter}{i}" for i in range(11)) for letter in "xy"]
    more = change(9, added=" ".join(f"z{i}" for i in range(21)))
    changes = (change(0, added=names[0]), change(5, added=names[1], removed=names[0]), more)
    scaled = scale(Trace(changes=changes, duration_s=10, max_nodes=32), num_nodes=8)
    assert scaled.changes[1].removed == scaled.changes[0].added == ("node-1", "node-2", "node-3")


@pytest.mark.parametrize("num_nodes", [0, -1, 10**18])
def test_scale__impossible_size__is_rejected(num_nodes: int) -> None:
    with pytest.raises(ArgumentError, match=f"between 1 and 10,000 nodes, not to {num_nodes:,}"):
        scale(NAMED, num_nodes=num_nodes)


# Speed


def test_faster__twice__halves_all_times() -> None:
    assert faster(NAMED, speed=2) == Trace(
        changes=(
            change(0, added="a b"),
            change(30, added="c", removed="a"),
            change(45.25, removed="b c"),
        ),
        duration_s=45.25,
        max_nodes=2,
    )


@pytest.mark.parametrize("speed", [0, -1, math.nan, math.inf])
def test_faster__speed_not_above_zero__is_rejected(speed: float) -> None:
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


def test_poisson__same_seed__same_trace() -> None:
    first, again, other = (
        poisson(num_nodes=4, mtbf_s=100, down_s=10, duration_s=1000, seed=seed) for seed in (7, 7, 8)
    )
    assert first == again != other


def test_poisson__more_nodes__same_failures_of_each() -> None:
    few, many = (poisson(num_nodes=n, mtbf_s=100, down_s=10, duration_s=1000, seed=7) for n in (2, 9))
    assert stays(few)["node-2"] == stays(many)["node-2"] != []


def test_poisson__stays__are_exponential_and_absences_constant() -> None:
    found = stays(poisson(num_nodes=200, mtbf_s=100, down_s=10, duration_s=10_000, seed=7)).values()
    lasted = [end - began for of_one in found for began, end in of_one]
    away = {round(after[0] - before[1], 6) for of_one in found for before, after in pairwise(of_one)}
    assert away == {10}
    assert len(lasted) == pytest.approx(200 * 10_000 / 110, rel=0.05)
    assert statistics.mean(lasted) == pytest.approx(100, rel=0.05)
    assert statistics.stdev(lasted) == pytest.approx(100, rel=0.05)


@given(st.integers(1, 8), st.floats(1, 1e4), st.floats(0, 1e3), st.floats(1, 1e3), st.integers())
def test_poisson__any_parameters__starts_with_all_nodes(
    num_nodes: int, mtbf_s: float, down_s: float, duration_s: float, seed: int
) -> None:
    trace = poisson(num_nodes=num_nodes, mtbf_s=mtbf_s, down_s=down_s, duration_s=duration_s, seed=seed)
    assert counts(trace)[0.0] == trace.max_nodes == num_nodes
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
def test_poisson__impossible_parameters__are_rejected(wrong: dict[str, Any]) -> None:
    fine = {"num_nodes": 4, "mtbf_s": 100, "down_s": 0, "duration_s": 1000}
    with pytest.raises(ArgumentError, match="expected 1 to 10,000 nodes, times above 0"):
        poisson(**(fine | wrong), seed=7)


# Recorded


def recorded(name: str) -> Trace:
    if not (RECORDED / name).exists():
        pytest.skip(f"no {name} beside this checkout")
    return read_trace(RECORDED / name)


def test_read_trace__bamboo__matches_its_description() -> None:
    trace = recorded("bamboo-p3.csv")
    leaving = [each for each in trace.changes if each.removed]
    assert sum(len(each.added) for each in trace.changes) == 177
    assert (sum(len(each.removed) for each in leaving), len(leaving)) == (167, 79)
    assert trace.max_nodes == 32
    assert trace.duration_s == pytest.approx(11.37 * 3600, rel=1e-3)


@pytest.mark.parametrize("name", ["parcae-hh.jsonl", "parcae-lh.jsonl"])
def test_read_trace__parcae__lasts_an_hour(name: str) -> None:
    assert recorded(name).duration_s == 60 * 60


@pytest.mark.parametrize("name", ["bamboo-p3.csv", "parcae-hh.jsonl", "parcae-lh.jsonl"])
def test_scale__recorded_to_four_nodes__has_the_counts_of_the_rule(name: str) -> None:
    trace = recorded(name)
    found, known = counts(scale(trace, num_nodes=4)), 0
    for at_s, count in counts(trace).items():
        known = found.get(at_s, known)
        assert known == scaled_count(count, trace, 4)

"""What is done about a straggler: when it is kept, replaced, left out, or another node is requested."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forge.elastic.states import MemberNode, MembershipState, Phase
from forge.elastic.straggler_detector import Straggler
from forge.elastic.straggler_watch import StragglerTerms, decide_straggler

TERMS = StragglerTerms(replaces=True, global_batch_size=64)
SLOW = Straggler(node="n1-1", rank=1, ratio=2.0, own_s=0.2, usual_s=0.1)


def training(num_nodes: int, *, spare: int = 0, min_workers: int = 1) -> MembershipState:
    names = [f"n{number}-1" for number in range(num_nodes + spare)]
    return MembershipState(
        min_workers=min_workers,
        max_workers=num_nodes,
        phase=Phase.TRAINING,
        assignment=tuple(names[:num_nodes]),
        nodes={name: MemberNode(num_slots=1, is_ready=True) for name in names},
    )


def action(state: MembershipState, *, straggler: Straggler = SLOW, terms: StragglerTerms = TERMS) -> str:
    return decide_straggler(straggler, state=state, terms=terms, replaced=terms.replaced, now=0.0).action


def test_decide__replace_stragglers_is_false__kept() -> None:
    assert action(training(4, spare=1), terms=replace(TERMS, replaces=False)) == "kept"


def test_decide__another_node_is_ready__replaced() -> None:
    assert action(training(4, spare=1)) == "replaced"


def test_decide__faster_without_it__left_out() -> None:
    assert action(training(4)) == "left out"


@pytest.mark.parametrize("ratio", [1.5, 2.0])
def test_decide__two_workers__requested_because_one_alone_takes_as_long(ratio: float) -> None:
    assert action(training(2), straggler=replace(SLOW, ratio=ratio)) == "requested"


def test_decide__batch_of_one_sequence_per_worker__requested() -> None:
    # Without it three workers take two sequences each, so that a step takes as long as with the straggler.
    assert action(training(4), terms=replace(TERMS, global_batch_size=4)) == "requested"


def test_decide__fewer_than_the_minimum_would_remain__requested() -> None:
    assert action(training(4, min_workers=4)) == "requested"


def test_decide__other_node_is_leaving__is_no_replacement() -> None:
    state = training(4, spare=1, min_workers=4)
    leaving = replace(state.nodes["n4-1"], preempted_at=1000.0)
    assert action(replace(state, nodes={**state.nodes, "n4-1": leaving})) == "requested"


def test_decide__replaced_once__kept_under_another_agent() -> None:
    terms = replace(TERMS, replaced=("n1-0",))
    state = training(8, spare=1)
    assert decide_straggler(SLOW, state=state, terms=terms, replaced=["n1"], now=0.0).reason.startswith("it was")


@pytest.mark.parametrize(("num_nodes", "most"), [(2, 1), (4, 1), (8, 2), (100, 25)])
def test_decide__a_quarter_was_replaced__kept(num_nodes: int, most: int) -> None:
    state = training(num_nodes, spare=1)
    for count, expected in ((most - 1, "replaced"), (most, "kept")):
        replaced = [f"old{number}" for number in range(count)]
        assert decide_straggler(SLOW, state=state, terms=TERMS, replaced=replaced, now=0.0).action == expected

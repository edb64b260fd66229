"""Links that were measured: what they warn of, how long they count, and damaged files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from forge.config.cluster import SshSpec
from forge.plan.cluster_links import cluster_links
from forge.plan.forecast import forecast
from forge.plan.measured_links import MeasuredLinks, NodeLink, keep_links, kept_links, links_from
from forge.plan.throughput import Efficiency
from tests.plan.test_hpz import planned

SPEC = SshSpec.model_validate(
    {
        "name": "lab",
        "provider": "ssh",
        "machines": ("10.0.0.1", "10.0.0.2"),
        "user": "ann",
        "python": "/usr/bin/python3",
    }
)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORGE_STATE", str(tmp_path))
    return tmp_path


def node(name: str, **changes: Any) -> NodeLink:
    values = {"device": "H100", "num_ranks": 8, "within_bytes_per_s": 2e11, "between_bytes_per_s": 4e10}
    return NodeLink(node=name, **values | changes)


def links(*nodes: NodeLink, rate: float | None = 3e10) -> MeasuredLinks:
    return MeasuredLinks(nodes=nodes, all_gather_bytes_per_s=rate, measured_at=1.8e9)


def test_warnings__slow_or_different_node__is_named() -> None:
    same = [node("a"), node("b"), node("c")]
    assert links(*same, node("d", between_bytes_per_s=2.1e10)).warnings() == []
    (slow,) = links(*same, node("d", between_bytes_per_s=1e9)).warnings()
    assert slow == "d reaches 8 Gbit/s, half of the nodes 320 or more"
    fewer, other = links(*same, node("d", num_ranks=4), node("e", device="A100")).warnings()
    assert fewer.startswith("d has 4 x H100, most nodes 8 x H100:")
    assert other.startswith("e has 8 x A100, most nodes 8 x H100:")
    assert links(node("a", between_bytes_per_s=None)).warnings() == []


def test_cluster_links__measured__give_the_measured_rate_until_the_file_changes() -> None:
    assert "assumed" in cluster_links(SPEC).note
    keep_links(links(node("a"), node("b")), spec=SPEC)
    found = cluster_links(SPEC)
    assert found.interconnect.gpus_per_node == 8
    assert found.interconnect.inter_node_bytes_per_s * Efficiency().inter_node == pytest.approx(3e10)
    assert (
        "an all-gather over 2 machines at 240 Gbit/s, within a machine at 1.6e+03: forge cluster probe, 2027-01-15"
        in found.note
    )
    assert found.warnings == ()
    changed = SPEC.model_copy(update={"machines": ("10.0.0.1", "10.0.0.3")})
    assert "assumed" in cluster_links(changed).note
    keep_links(links(node("a")), spec=SPEC)  # of the others nothing is known
    assert "assumed" in cluster_links(SPEC).note


def test_cluster_links__slow_links_within_a_node__longer_steps_and_named_nodes() -> None:
    steps = []
    for rate in (2e11, 1e9):
        keep_links(links(node("a"), node("b", within_bytes_per_s=rate, num_ranks=4), node("c")), spec=SPEC)
        found = cluster_links(SPEC)
        within = found.interconnect.intra_node_bytes_per_s
        assert within is not None and within * Efficiency().intra_node == pytest.approx(rate)
        assert found.warnings == (
            "b has 4 x H100, most nodes 8 x H100: every step takes as long as on the slowest",
        )
        steps.append(forecast(planned(workers="8", links=found.interconnect), links=found).worlds[0].step_s)
    assert steps[1] > 2 * steps[0]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"spec": 1}', "[" * 100_000])
def test_kept_links__damaged_file__are_none(state: Path, text: str) -> None:
    keep_links(links(node("a"), node("b")), spec=SPEC)
    assert kept_links(SPEC) == links(node("a"), node("b"))
    (state / "links" / "lab.json").write_text(text)
    assert kept_links(SPEC) is None


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": []},
        {"all_gather_bytes_per_s": -1},
        {"measured_at": None},
        {"all_gather_bytes_per_s": float("nan")},
    ],
)
def test_links_from__other_values__raises(change: dict[str, Any]) -> None:
    record = asdict(links(node("a")))
    assert links_from(record) == links(node("a"))
    with pytest.raises((KeyError, TypeError, ValueError)):
        links_from(record | change)

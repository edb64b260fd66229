"""`forge cluster probe`: what it prints, and when it refuses."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from forge.cli.app import app
from forge.cluster.base import ClusterNode, ClusterStatus
from forge.plan.measured_links import MeasuredLinks, NodeLink

NODE = NodeLink(node="10.0.0.1", device="H100", num_ranks=8, within_bytes_per_s=2e11, between_bytes_per_s=4e10)
LINKS = MeasuredLinks(
    nodes=(NODE, replace(NODE, node="10.0.0.2"), replace(NODE, node="10.0.0.3", between_bytes_per_s=1e9)),
    all_gather_bytes_per_s=9e8,
    measured_at=1.8e9,
)


class FakeCluster:
    name = "lab"
    found = ClusterStatus(
        name="lab",
        provider="ssh",
        address="10.0.0.1:6379",
        nodes=(ClusterNode(name="n", kind="head", state="alive"),),
    )

    def status(self) -> ClusterStatus:
        return self.found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    given: dict[str, Any] = {"probe": asdict(LINKS)}
    monkeypatch.setattr("forge.cluster.registry.find_cluster", lambda name: FakeCluster())
    monkeypatch.setattr("forge.remote.mirror.ask", lambda cluster, *words, **options: given["probe"])
    return given


def test_probe__slow_node__is_shown_and_named(answers: dict[str, Any]) -> None:
    done = CliRunner().invoke(app, ["cluster", "probe", "lab"])
    assert done.exit_code == 0, done.output
    assert "10.0.0.3 reaches 8 Gbit/s" in done.output and "7.2 Gbit/s for each" in done.output
    found = json.loads(CliRunner().invoke(app, ["cluster", "probe", "lab", "-o", "json"]).stdout)
    assert found["nodes"] == json.loads(json.dumps(answers["probe"]["nodes"]))
    assert len(found["warnings"]) == 1 and found["is_kept"] is False  # no cluster of this name was started here


@pytest.mark.parametrize(
    ("status", "problem"),
    [({"address": None}, "is not up"), ({"runs": ("a-1", "b-2")}, "a-1, b-2 on 'lab' would be disturbed")],
)
def test_probe__cluster_down_or_in_use__is_refused(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, status: dict[str, Any], problem: str
) -> None:
    monkeypatch.setattr(FakeCluster, "found", replace(FakeCluster.found, **status))
    done = CliRunner().invoke(app, ["cluster", "probe", "lab"])
    assert done.exit_code != 0 and problem in f"{done.output} {done.exception}"


@pytest.mark.parametrize("answer", [{}, [], {"nodes": [], "all_gather_bytes_per_s": 1, "measured_at": 1}])
def test_probe__other_answer_of_the_head__is_an_error(answers: dict[str, Any], answer: Any) -> None:
    answers["probe"] = answer
    done = CliRunner().invoke(app, ["cluster", "probe", "lab"])
    assert done.exit_code != 0 and "gave no links" in f"{done.output} {done.exception}"

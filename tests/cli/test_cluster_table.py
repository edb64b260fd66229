"""The table of `forge cluster status`."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from forge.cli import display
from forge.cli.cluster_table import read_run_nodes, show_cluster, status_record
from forge.cluster.base import ClusterNode, ClusterStatus
from forge.events import Event, NodeJoined, NodeLeft, PreemptionNoticeReceived, RunStarted, RunStopped
from forge.runs.nodes import RunNode, nodes_now
from forge.runs.reader import read_run
from tests.support.runs import History, make_run

RUN = "tiny-0101-000000-abcd"
IDS = ["a4ab1ca4" + 48 * "0", "0d5ce920" + 48 * "0", "a35b908d" + 48 * "0"]
NAMES = [f"{node_id[:8]}-675260{at}" for at, node_id in enumerate(IDS)]


def cluster(*, gone_s: Sequence[float] = (), dashboard: str | None = None) -> ClusterStatus:
    alive = [ClusterNode(name="10.0.0.1", kind="worker", state="alive", node_id=one, num_cpus=1.0) for one in IDS]
    gone = [
        ClusterNode(name="10.0.0.9", kind="worker", state="gone", node_id="f" * 56, gone_s=one) for one in gone_s
    ]
    return ClusterStatus(
        name="local",
        provider="local",
        address="10.0.0.1:6379",
        nodes=(*alive, *gone),
        runs=(RUN,),
        dashboard=dashboard,
    )


def shown(found: ClusterStatus, runs: Mapping[str, Sequence[RunNode]], monkeypatch: pytest.MonkeyPatch) -> str:
    sent = io.StringIO()
    console = display.HarmlessConsole(file=sent, width=200, soft_wrap=True)
    monkeypatch.setattr(display, "OUT", console)
    monkeypatch.setattr(display, "ERR", console)
    show_cluster(found, runs=runs)
    return sent.getvalue()


def joined(*nodes: str) -> list[Event]:
    return [NodeJoined(node=node, host="10.0.0.1", num_slots=1, agent_pid=7) for node in nodes]


def nodes_of(*events: Event) -> list[RunNode]:
    history = History(began=time.time())
    for event in events:
        history.record(event)
    return nodes_now(history.events)


def test_runs__nodes__have_the_numbers_that_node_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = nodes_of(*joined(*NAMES), NodeLeft(node=NAMES[0], reason="lost"))
    assert f"{RUN}  0: 0d5ce920, 1: a35b908d\n" in shown(cluster(), {RUN: nodes}, monkeypatch)
    assert "are not known" in shown(cluster(), {}, monkeypatch)


@pytest.mark.parametrize(
    ("seconds_left", "is_certain", "state"),
    [(50.0, True, "notice, "), (None, True, "notice "), (0.0, True, "notice, overdue"), (50.0, False, "alive ")],
)
def test_state__node_under_notice__shown_as_such(
    monkeypatch: pytest.MonkeyPatch, seconds_left: float | None, is_certain: bool, state: str
) -> None:
    notice = PreemptionNoticeReceived(node=NAMES[1], seconds_left=seconds_left, source="ray", is_certain=is_certain)
    lines = shown(cluster(), {RUN: nodes_of(*joined(*NAMES), notice)}, monkeypatch).splitlines()
    (line,) = [line for line in lines if line.startswith("0d5ce920")]
    assert line.removeprefix("0d5ce920").lstrip().startswith(state)
    assert ("s left" in line) == (state == "notice, ")
    assert [line.split()[1] for line in lines if line.startswith(("a4ab1ca4", "a35b908d"))] == ["alive", "alive"]


def test_gone_nodes__after_ten_minutes__are_counted_only(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(cluster(gone_s=[30.0, 700.0, 9000.0]), {RUN: []}, monkeypatch)
    assert text.count("ffffffff") == 1
    assert "gone 30s ago" in text
    assert "2 nodes that left over 10m 00s ago: -o json lists them" in text


def test_access__cluster_here__names_token_and_dashboard_but_not_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("very-secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    found = cluster(dashboard="http://127.0.0.1:8265")
    text = shown(found, {}, monkeypatch)
    assert f"dashboard: http://127.0.0.1:8265 asks for the token in {token}" in text
    assert "Ray's own view: RAY_AUTH_MODE=token ray status --address 10.0.0.1:6379" in text
    record = status_record(found, runs={})
    assert (record["dashboard"], record["token_file"]) == ("http://127.0.0.1:8265", str(token))
    assert "very-secret" not in f"{text}{record}"


def test_read_run_nodes__runs_of_others_and_odd_names__are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_STATE", str(tmp_path / "state"))
    make_run(tmp_path / "runs", RUN, endings=joined(*NAMES))
    make_run(tmp_path / "elsewhere", "other", endings=joined("b"))
    found = ClusterStatus(
        name="local", provider="local", address="x", runs=(RUN, "elsewhere/other", "unknown", str(tmp_path), "")
    )
    assert {run: [node.name for node in nodes] for run, nodes in read_run_nodes(found).items()} == {RUN: NAMES}


def test_nodes_now__resumed_run__nodes_of_the_session_before_have_no_number(tmp_path: Path) -> None:
    again = RunStarted(run_id="r", total_steps=9, resumed_from_step=3)
    folder = make_run(tmp_path, RUN, endings=[*joined(*NAMES[:2]), RunStopped(step=3), again, *joined(NAMES[2])])
    assert [node.name for node in nodes_now(read_run(folder).events)] == NAMES[2:]

"""Which machine types are to be had, as the autoscaler's log tells it and its file is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge.cluster.cloud.capacity_backoff import CapacityBackoff, refused_types

REFUSED = (
    "2026-01-01 00:00:00,000 INFO node_provider.py:491 -- Failed to launch 2 nodes of type {}: Node Launch "
    "Exception (InsufficientInstanceCapacity): There is no room.\n"
)


class Box:
    """An autoscaler's file and log, and machines that are there."""

    def __init__(self, folder: Path) -> None:
        self.file, self.log = folder / "config.yaml", folder / "monitor.log"
        types = {name: {"max_workers": 4, "node_config": {}} for name in ("spot-a", "spot-b")}
        self.file.write_text(json.dumps({"cluster_name": "big", "available_node_types": types}))
        self.there = {"spot-a": 1, "spot-b": 0}
        self.market = CapacityBackoff(file=self.file, log=self.log, count=lambda config, name: self.there[name])

    def say(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text)

    @property
    def allowed(self) -> list[int]:
        types = json.loads(self.file.read_text())["available_node_types"]
        return [types[name]["max_workers"] for name in ("spot-a", "spot-b")]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_a_type_that_was_refused_is_closed_at_what_is_there_and_opened_again(box: Box) -> None:
    box.market.look(0.0)  # before there is a log
    box.say(REFUSED.format("spot-a"))
    box.market.look(1.0)
    assert box.allowed == [1, 4]
    box.market.look(120.0)
    assert box.allowed == [1, 4]
    box.market.look(122.0)
    assert box.allowed == [4, 4]


def test_a_second_refusal_does_not_make_the_first_ones_limit_the_wish(box: Box) -> None:
    for moment, name in ((0.0, "spot-a"), (60.0, "spot-b"), (100.0, "spot-a")):
        box.say(REFUSED.format(name))
        box.market.look(moment)
    assert box.allowed == [1, 0]
    box.market.look(181.0)
    assert box.allowed == [1, 4]
    box.market.look(221.0)
    assert box.allowed == [4, 4]


def test_half_a_line_is_read_when_it_is_whole_and_a_new_log_from_its_beginning(box: Box) -> None:
    line = REFUSED.format("spot-a")
    box.say("x\n" + line[:60])
    box.market.look(0.0)
    assert box.allowed == [4, 4]
    box.say(line[60:])
    box.market.look(1.0)
    assert box.allowed == [1, 4]
    box.log.unlink()
    box.say(REFUSED.format("spot-b"))
    box.market.look(2.0)
    assert box.allowed == [1, 0]


def test_a_cloud_that_does_not_answer_is_asked_again(box: Box, tmp_path: Path) -> None:
    before = box.file.read_text()
    box.say(REFUSED.format("spot-a"))
    del box.there["spot-a"]
    box.market.look(0.0)
    assert box.file.read_text() == before
    box.there["spot-a"] = 2
    box.say(REFUSED.format("spot-a"))
    box.market.look(1.0)
    assert box.allowed == [2, 4]
    assert (box.file.stat().st_mode & 0o077) == 0


def test_only_the_want_of_room_closes_a_type() -> None:
    denied = "Failed to launch 1 nodes of type spot-a: An error occurred (UnauthorizedOperation) when calling\n"
    assert refused_types(denied) == set()
    assert refused_types(REFUSED.format("spot-a") + denied + REFUSED.format("spot-b")) == {"spot-a", "spot-b"}

"""What a placement asks of Ray and tells the supervisor, without a cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from forge.runtime import placement
from forge.runtime.placement import Allocation, PlacementManager

HERE = Allocation(node_id="ray-1", num_slots=1, num_guaranteed=1)


class Ray:
    """Ray's drain requests: node → seconds left, None without a deadline."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draining: dict[str, float | None] = {}
        self.announced: list[tuple[str, float | None]] = []
        self.manager = PlacementManager(
            run_id="run",
            low=1,
            high=1,
            resource="CPU",
            start_agent=lambda name, allocation: name,
            end_agent=lambda handle: None,
            on_slots_changed=lambda name, allocation: None,
            on_draining=lambda name, left_s: self.announced.append((name, left_s)),
        )
        monkeypatch.setattr(placement, "_draining", lambda: dict(self.draining))
        monkeypatch.setattr(placement, "_mark_draining", self.draining.__setitem__)
        monkeypatch.setattr(self.manager, "_shape_groups", dict)
        monkeypatch.setattr(self.manager, "_allocations", lambda table: {"ray-1": HERE})

    async def replace(self, node: str, *, seconds_left: float | None) -> None:
        self.manager.replace_node(node, seconds_left=seconds_left)
        await asyncio.gather(*self.manager._calls)


def run_with_node(ray: Ray, script: Any) -> list[tuple[str, float | None]]:
    async def run() -> None:
        ray.manager.reattach("node", None, HERE)
        await script()

    asyncio.run(run())
    return ray.announced


def test_replace_node__only_at_risk__is_not_announced_as_leaving(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)

    async def script() -> None:
        await ray.replace("node", seconds_left=None)
        assert ray.draining == {"ray-1": None}
        await ray.manager._reconcile_once()

    assert run_with_node(ray, script) == []


def test_replace_node__drained_with_a_deadline_later__is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)

    async def script() -> None:
        await ray.replace("node", seconds_left=None)
        ray.draining["ray-1"] = 30.0
        await ray.manager._reconcile_once()

    assert run_with_node(ray, script) == [("node", 30.0)]


def test_drained_by_others_without_a_deadline__is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)
    ray.draining["ray-1"] = None
    assert run_with_node(ray, ray.manager._reconcile_once) == [("node", None)]


def test_slots_of__agent_lost_and_another_one_on_its_node__found_by_name_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = Ray(monkeypatch)

    async def script() -> None:
        assert ray.manager.slots_of("node") == (1, 1)
        ray.manager.agent_lost("node")
        assert ray.manager.slots_of("node") is None
        ray.manager.reattach("next", None, HERE)
        await ray.replace("node", seconds_left=30.0)
        assert ray.draining == {}, "the node's agent is another one now"
        assert ray.manager.slots_of("node") is None
        assert ray.manager.slots_of("next") == (1, 1)

    run_with_node(ray, script)


def test_shape_groups__many_workers__reads_all_groups_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[None] = []

    def group(bundles: list[Any], **options: Any) -> Any:
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: options["name"]))

    def table() -> dict[str, Any]:
        asked.append(None)
        return {}

    shape_groups = PlacementManager._shape_groups
    manager = Ray(monkeypatch).manager
    manager._low, manager._wanted = 1, 50
    monkeypatch.setattr(placement, "placement_group", group)
    monkeypatch.setattr(placement, "_table", table)
    shape_groups(manager)
    assert len(manager._groups) == 50
    asked.clear()
    shape_groups(manager)
    assert len(asked) == 1  # they are all there
    manager._num_extra, manager._num_groups = 1, 49
    asked.clear()
    shape_groups(manager)
    assert len(manager._groups) == 51
    assert len(asked) == 2  # again after another one was made, so that it is used at once


@pytest.mark.parametrize(
    ("num_slots", "draining", "is_settled"), [(1, {}, True), (2, {}, False), (1, {"ray-1": 30.0}, False)]
)
def test_reconcile__all_slots_and_nothing_drained__looks_at_the_tables_less_often(
    num_slots: int, draining: dict[str, float | None], is_settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Ray(monkeypatch)
    ray.manager._wanted = num_slots
    ray.draining = draining
    run_with_node(ray, ray.manager._reconcile_once)
    assert ray.manager._is_settled == is_settled


def test_reconcile__node_lost_or_leaving__keeps_looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Ray(monkeypatch)

    async def script() -> None:
        ray.manager.agent_lost("node")
        await ray.manager._reconcile_once()  # Ray has not noticed it: another agent is started there
        assert not ray.manager._is_settled
        ray.manager._restless_until = 0.0
        await ray.manager._reconcile_once()
        assert ray.manager._is_settled
        ray.manager._leaving = {"ray-1"}
        await ray.manager._reconcile_once()
        assert not ray.manager._is_settled

    run_with_node(ray, script)

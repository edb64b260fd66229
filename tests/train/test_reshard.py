"""Every world size and ZeRO stage loads checkpoints of every other, bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from forge.checkpoint.manifest import Progress, step_name
from forge.checkpoint.reader import open_checkpoint
from forge.checkpoint.storage import open_storage
from forge.checkpoint.verify import verify_checkpoint
from forge.inference.weights import CheckpointWeights
from forge.train.async_checkpoint import AsyncCheckpointer, CheckpointWritten
from forge.train.process_group import join_process_group
from tests.support.odd import MATRIX, VARIANTS, differing, odd_state, write_pattern
from tests.support.ranks import on_ranks

SOME_SIZES, ALL_SIZES = (1, 2, 3), tuple(range(1, 9))
"""Used by the slow tests: 5,184 loads, with groups too."""
GROUPED = ("zero 1 groups", "zero 2 groups", "zero 3 groups")
PROGRESS = Progress(step=7, num_tokens=70, config_digest="recipe", corpus="corpus")


def variants_of(sizes: tuple[int, ...]) -> list[str]:
    """The kinds of engines that are tested; groups need a number of ranks that is not prime."""
    return [*MATRIX, "zero 3 hpz", *GROUPED] if 4 in sizes else MATRIX


def save_all(rank: int, root: str, world_size: int, sizes: tuple[int, ...]) -> list[list[Any]]:
    """Save the pattern from every kind of engine."""
    join_process_group(device=torch.device("cpu"))
    outcomes = []
    for variant in variants_of(sizes):
        state = odd_state(variant, world_size=world_size)
        write_pattern(state)
        checkpointer = AsyncCheckpointer(state, url=folder_of(root, variant, world_size), keep=1)
        checkpointer.begin(PROGRESS)
        outcomes.append(checkpointer.finish())
        checkpointer.close()
    return outcomes


def load_all(rank: int, root: str, world_size: int, sizes: tuple[int, ...]) -> tuple[int, list[str]]:
    """Load all saved checkpoints into every kind of engine. Returns: number of loads, and differences."""
    join_process_group(device=torch.device("cpu"))
    wrong, count = [], 0
    for variant in variants_of(sizes):
        state = odd_state(variant, world_size=world_size)
        for saved_variant in variants_of(sizes):
            for saved_size in sizes:
                write_pattern(state, zero=True)
                state.read(open_checkpoint(open_storage(folder_of(root, saved_variant, saved_size)), step_name(7)))
                state.resume(step=7)
                where = f"{saved_variant} at {saved_size} → {variant} at {world_size}, rank {rank}"
                wrong += [f"{where}: {what}" for what in differing(state)]
                count += 1
    return count, wrong


def folder_of(root: str, variant: str, world_size: int) -> str:
    return f"{root}/{variant}/{world_size}"


@pytest.fixture(
    scope="module",
    params=[pytest.param(SOME_SIZES, id="some"), pytest.param(ALL_SIZES, id="all", marks=pytest.mark.slow)],
)
def sizes(request: pytest.FixtureRequest) -> tuple[int, ...]:
    """World sizes that checkpoints are saved at."""
    chosen: tuple[int, ...] = request.param
    return chosen


@pytest.fixture(scope="module")
def saved(sizes: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("saved")
    for world_size in sizes:
        for outcomes in on_ranks(save_all, str(root), world_size, sizes, world_size=world_size):
            assert all(isinstance(outcome, CheckpointWritten) for each in outcomes for outcome in each)
    return root


def test_load__any_world_size_and_stage__bit_for_bit(saved: Path, sizes: tuple[int, ...]) -> None:
    for world_size in sizes:
        for count, wrong in on_ranks(load_all, str(saved), world_size, sizes, world_size=world_size):
            assert count == len(variants_of(sizes)) ** 2 * len(sizes)
            assert wrong == []


@pytest.mark.parametrize("variant", MATRIX)
def test_save__all_parts__every_element_once(saved: Path, sizes: tuple[int, ...], variant: str) -> None:
    for world_size in sizes:
        storage = open_storage(folder_of(str(saved), variant, world_size))
        assert verify_checkpoint(storage, step_name(7)) is None
        checkpoint = open_checkpoint(storage, step_name(7))
        held: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for part in checkpoint.manifest.parts:
            for interval in part.layout.intervals:
                held.setdefault((interval.name, interval.kind), []).append((interval.start, interval.stop))
        trained = {name for name, p in checkpoint.shape.parameters.items() if p.kind == "master"}
        kinds = {(name, kind) for name in trained for kind in ("master", "exp_avg", "exp_avg_sq", "ema")}
        kinds |= {("frozen.weight", "frozen"), ("frozen.bias", "frozen"), ("shift", "buffer"), ("count", "buffer")}
        assert set(held) == kinds
        for (name, kind), intervals in held.items():
            intervals.sort()
            stops = [stop for _, stop in intervals]
            assert [start for start, _ in intervals] == [0, *stops[:-1]], (name, kind)
            assert stops[-1] == checkpoint.value_interval(name).stop, (name, kind)


def test_save__tied_weights__stored_once(saved: Path) -> None:
    shape = open_checkpoint(open_storage(folder_of(str(saved), "zero 2", 3)), step_name(7)).shape
    assert shape.tied == {"head.weight": "embedding.weight"}
    assert "head.weight" not in shape.parameters
    assert "scratch" not in shape.parameters  # a non-persistent buffer


def refreshed(rank: int, root: str, variant: str, world_size: int) -> list[str]:
    """Return the names of model weights that differ from the master weights."""
    import deepspeed

    join_process_group(device=torch.device("cpu"))
    state = odd_state(variant, world_size=world_size)
    state.read(open_checkpoint(open_storage(folder_of(root, "zero 1", 3)), step_name(7)))
    state.resume(step=7)
    values = dict(
        CheckpointWeights(open_checkpoint(open_storage(folder_of(root, "zero 0", 1)), step_name(7))).tensors()
    )
    wrong = []
    for name, parameter in state._engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            expected = values[name]
            if not torch.equal(parameter.detach().cpu(), expected.to(parameter.dtype)):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume__model_weights__equal_saved_weights(saved: Path, variant: str) -> None:
    for wrong in on_ranks(refreshed, str(saved), variant, 3, world_size=3):
        assert wrong == []


def round_trip(rank: int, root: str, world_size: int, *, is_saving: bool) -> list[str]:
    """Save or load everything in fp32."""
    join_process_group(device=torch.device("cpu"))
    wrong = []
    for variant in MATRIX:
        state = odd_state(variant, world_size=world_size, precision="fp32")
        if is_saving:
            write_pattern(state)
            checkpointer = AsyncCheckpointer(state, url=folder_of(root, variant, 2), keep=1)
            checkpointer.begin(PROGRESS)
            wrong += [
                str(outcome) for outcome in checkpointer.finish() if not isinstance(outcome, CheckpointWritten)
            ]
            checkpointer.close()
            continue
        for saved_variant in MATRIX:
            write_pattern(state, zero=True)
            state.read(open_checkpoint(open_storage(folder_of(root, saved_variant, 2)), step_name(7)))
            state.resume(step=7)
            wrong += [f"{saved_variant} → {variant}: {what}" for what in differing(state)]
    return wrong


def save_in_groups_and_load(rank: int, root: str) -> list[str]:
    """Save from groups, and load into groups of another stage, and into one group."""
    join_process_group(device=torch.device("cpu"))
    state = odd_state("zero 3 groups", world_size=4)
    write_pattern(state)
    checkpointer = AsyncCheckpointer(state, url=root, keep=1)
    checkpointer.begin(PROGRESS)
    wrong = [str(outcome) for outcome in checkpointer.finish() if not isinstance(outcome, CheckpointWritten)]
    checkpointer.close()
    for variant in ("zero 2 groups", "zero 3"):
        other = odd_state(variant, world_size=4)
        write_pattern(other, zero=True)
        other.read(open_checkpoint(open_storage(root), step_name(7)))
        wrong += [f"{variant}: {what}" for what in differing(other)]
    return wrong


def test_load__two_groups_of_two__bit_for_bit(tmp_path: Path) -> None:
    for wrong in on_ranks(save_in_groups_and_load, str(tmp_path), world_size=4):
        assert wrong == []


def test_load__fp32__any_stage_bit_for_bit(tmp_path: Path) -> None:
    for world_size, is_saving in ((2, True), (3, False)):
        function = partial(round_trip, is_saving=is_saving)
        for wrong in on_ranks(function, str(tmp_path), world_size, world_size=world_size):
            assert wrong == []

"""forge.runtime.shard_map: every shard once, at any number of workers, whatever happens to them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from forge.errors import DataError, RunError
from forge.runtime.actor_names import NAMESPACE
from forge.runtime.shard_files import ShardFiles
from forge.runtime.shard_map import MapOptions, MapTotals, ShardMap, StoppedError
from forge.runtime.shard_worker import ShardWorkerSpec

NUM_SHARDS = 12


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init("local", num_cpus=3, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    yield
    ray.shutdown()


def shards(*special: str, count: int = NUM_SHARDS) -> list[list[str]]:
    made = [[f"shard{number}", "ä", f"text {number}"] for number in range(count)]
    for number, word in enumerate(special):
        made[number].append(word)
    return made


class Case:
    """Maps over one folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.marks = folder / "results", folder / "marks"
        self.marks.mkdir(parents=True)
        self.stop = threading.Event()
        self.messages: list[str] = []

    def run(
        self,
        inputs: Iterable[Any],
        *,
        workers: int | None = 3,
        digest: str = "model",
        on_done: Callable[[int], None] = lambda _: None,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> MapTotals:
        return ShardMap(
            ShardWorkerSpec(
                function="tests.support.shards:Digests", config={"marks": str(self.marks), **(config or {})}
            ),
            files=ShardFiles(folder=self.folder, digest=digest),
            options=MapOptions(num_workers=workers, **options),
            stop=self.stop,
            on_done=on_done,
            on_message=self.messages.append,
        ).run(inputs)

    def contents(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def attempts(self) -> Counter[str]:
        return Counter(path.name.split(".")[0] for path in self.marks.iterdir())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that one worker writes without any disturbance."""
    case = Case(tmp_path_factory.mktemp("one"))
    totals = case.run(shards("dies once", "plain"), workers=1, digest="model")
    assert totals.num_shards == NUM_SHARDS
    return case.contents()


def test_run__worker_is_killed__same_bytes_and_only_its_shard_is_repeated(
    case: Case, expected: dict[str, bytes]
) -> None:
    totals = case.run(shards("dies once", "plain"), workers=3)
    assert case.contents() == expected
    assert totals.num_lost == 1 and totals.num_reused == 0
    assert case.attempts()["shard0"] == 2 and case.attempts().total() == NUM_SHARDS + 1
    assert any("shard 0 is repeated" in message for message in case.messages)


@pytest.mark.slow
def test_run__stopped_and_started_again__computes_only_what_is_missing(
    case: Case, expected: dict[str, bytes]
) -> None:
    done: list[int] = []

    def stop_after_five(number: int) -> None:
        done.append(number)
        if len(done) == 5:
            case.stop.set()

    with pytest.raises(StoppedError):
        case.run(shards("dies once", "plain"), on_done=stop_after_five)
    assert len(case.contents()) == len(done) == 5
    (case.folder / f".{'0' * 32}.jsonl.abc.tmp").write_text("of a process that was killed while it wrote")
    damaged = case.folder / sorted(case.contents())[1]
    damaged.write_bytes(damaged.read_bytes()[:-3])
    case.stop.clear()
    totals = case.run(shards("dies once", "plain"))
    assert case.contents() == expected
    assert totals.num_reused == 4
    case.stop.set()  # a stop that comes when nothing is left
    assert case.run(shards("dies once", "plain")).num_reused == NUM_SHARDS


@pytest.mark.slow
def test_run__other_digest_or_inputs__nothing_old_is_used(case: Case) -> None:
    case.run(shards(count=3))
    assert case.run(shards(count=3)).num_reused == 3
    assert case.run(shards("other", count=3)).num_reused == 2
    assert case.run(shards("other", count=3), digest="other model").num_reused == 0


@pytest.mark.slow
def test_run__process_is_suspended__is_replaced(case: Case) -> None:
    totals = case.run(shards("plain", "stops once", count=4), workers=2, silent_s=6.0)
    assert totals.num_replaced == 1 and case.attempts()["shard1"] == 2


@pytest.mark.slow
def test_run__worker_makes_no_progress__is_replaced(case: Case) -> None:
    totals = case.run(shards("hangs once", count=3), workers=2, stalled_s=6.0)
    assert totals.num_replaced == 1 and case.attempts()["shard0"] == 2
    assert any("made no progress" in message for message in case.messages)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "kind", "problem"),
    [
        ("fails", DataError, "shard 2 failed 3 times, at last: this text cannot be read"),
        ("dies", RunError, "shard 2 has lost 5 workers"),
    ],
)
def test_run__shard_fails_always__ends_with_its_reason(
    case: Case, word: str, kind: type[Exception], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        case.run(shards("plain", "plain", word, count=8), workers=2)


@pytest.mark.slow
def test_run__no_worker_can_load__ends_with_the_reason(case: Case) -> None:
    with pytest.raises(DataError, match="no such model"):
        case.run(shards(count=3), config={"fails_to_load": True})
    assert case.contents() == {}


@pytest.mark.slow
def test_run__endless_shards__reads_no_further_than_needed(case: Case) -> None:
    read: list[int] = []

    def endless() -> Iterator[list[str]]:
        for number in range(10**9):
            read.append(number)
            yield [f"shard{number}"]

    def stop_at_last(number: int) -> None:
        if number >= 9:
            case.stop.set()

    with pytest.raises(StoppedError):
        case.run(endless(), workers=2, on_done=stop_at_last)
    assert len(read) <= 10 + 2 * 2 + 2

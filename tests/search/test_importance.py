"""Optuna is asked about the trials as they were drawn, and says which key mattered."""

from __future__ import annotations

import logging
import math
import random

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from forge.search.importance import as_choice, distributions, importances
from tests.support.searches import LR, WARMUP, SearchHistory, search_spec

IDLE = "training.optimizer.weight_decay"
NAME = "training.schedule.kind"


def test_distributions__each_kind__is_optunas_and_computed_keys_have_none() -> None:
    space = {
        LR: {"loguniform": [1e-4, 1e-1]},
        IDLE: {"uniform": [0.0, 0.3]},
        WARMUP: {"int": [0, 4]},
        NAME: {"choice": ["cosine", None, [1, 2], {"b": 1, "a": 2}]},
        "training.optimizer.eps": {"of": LR, "times": 1e-3},
    }
    assert distributions(search_spec({"space": space})) == {
        LR: FloatDistribution(1e-4, 1e-1, log=True),
        IDLE: FloatDistribution(0.0, 0.3),
        WARMUP: IntDistribution(0, 4),
        NAME: CategoricalDistribution(["cosine", None, "[1, 2]", '{"a": 2, "b": 1}']),
    }
    grid = search_spec({"space": {WARMUP: {"grid": [1, 2]}}, "searcher": {"kind": "grid"}})
    assert distributions(grid) == {WARMUP: CategoricalDistribution([1, 2])}


def searched(*, of_lr: float = 0.0, of_warmup: float = 0.0, of_name: float = 0.0) -> tuple[SearchHistory, dict]:
    """24 trials over four keys, of which some matter so much."""
    rng, history = random.Random(5), SearchHistory()
    space = {
        LR: {"loguniform": [1e-4, 1e-1]},
        IDLE: {"uniform": [0.0, 0.3]},
        WARMUP: {"int": [0, 100]},
        NAME: {"choice": ["cosine", ["linear", 1]]},
    }
    for _ in range(24):
        drawn, warmup, name = rng.uniform(-4, -1), rng.randint(0, 100), rng.choice(["cosine", ["linear", 1]])
        values = {LR: 10**drawn, IDLE: rng.uniform(0, 0.3), WARMUP: warmup, NAME: name}
        noise = rng.gauss(0, 0.01)
        value = 3 + of_lr * (drawn + 2.5) ** 2 + of_warmup * warmup / 100 + of_name * (name == "cosine") + noise
        history.run(values, [value])
    return history, {"space": space}


@pytest.mark.parametrize(
    ("matters", "first"), [({"of_lr": 1.0}, LR), ({"of_warmup": 1.0}, WARMUP), ({"of_name": 1.0}, NAME)]
)
def test_importances__one_key_decides__comes_first(matters: dict[str, float], first: str) -> None:
    history, search = searched(**matters)
    shares = importances(search_spec(search), history.table)
    assert next(iter(shares)) == first and shares[first] > 0.8
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert sum(shares.values()) == pytest.approx(1.0) and len(shares) == 4
    assert all(type(share) is float for share in shares.values())


def test_importances__called_twice__same_shares_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    history, search = searched(of_lr=0.5, of_warmup=0.5)
    with caplog.at_level(logging.DEBUG):
        shares = [importances(search_spec(search), history.table) for _ in range(2)]
    assert shares[0] == shares[1] and not caplog.records


def test_importances__value_outside_its_range__counts_as_the_nearest_end() -> None:
    search = search_spec({"space": {LR: {"loguniform": [1e-4, 1e-1]}, WARMUP: {"int": [1, 8]}}})
    inside, outside = SearchHistory(), SearchHistory()
    for lr, moved_lr, warmup, moved in ((1e-4, 5e-5, 1, 0), (1e-1, 0.12, 8, 10), (1e-2, 1e-2, 2, 2)):
        inside.run({LR: lr, WARMUP: warmup}, [math.log(lr)])
        outside.run({LR: moved_lr, WARMUP: moved}, [math.log(lr)])
    shares = importances(search, inside.table)
    assert shares and importances(search, outside.table) == shares


def test_importances__too_few_different_trials__is_empty() -> None:
    search, history = search_spec(), SearchHistory()
    values = {LR: 1e-3, WARMUP: 1, IDLE: 0.1}
    assert importances(search, history.table) == {}
    history.run(values, [2.0])
    history.run(values, [math.nan], status="diverged")
    history.run(values | {LR: 1e-2}, [9.0], status="failed")
    history.run({LR: 1e-2}, [9.0])
    history.run(values | {WARMUP: 77}, [9.0])
    history.report(history.suggest(values | {LR: 1e-2}), 1, 9.0)
    assert importances(search, history.table) == {}, "one trial that is over, and has each of the keys' values"
    history.run(values | {LR: 1e-2}, [2.0])
    assert importances(search, history.table) == {}, "no variance"
    twice = SearchHistory()
    for value in (1.0, 2.0):
        twice.run(values, [value])
    assert importances(search, twice.table) == {}, "the same values came out differently"
    single = search_spec({"space": {WARMUP: {"choice": [1]}}})
    assert importances(single, twice.table) == {}


def test_as_choice__scalar__is_unchanged() -> None:
    assert [as_choice(value) for value in (None, True, 1, 0.5, "a", [1])] == [None, True, 1, 0.5, "a", "[1]"]

"""Parsing and formatting of numbers with units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge import units
from forge.units import Deadline, Every, Length, Range

PARSERS: list[Callable[[Any], object]] = [
    units.parse_bytes,
    units.parse_count,
    units.parse_duration_s,
    units.parse_every,
    units.parse_range,
    units.parse_fraction,
    units.parse_length,
    units.parse_deadline,
]


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.parse_bytes, "80GB", 80 * 10**9),
        (units.parse_bytes, "4GiB", 4 * 2**30),
        (units.parse_bytes, " 1.5 kib ", 1536),
        (units.parse_bytes, 17, 17),
        (units.parse_count, "20M", 20_000_000),
        (units.parse_count, "1.5k", 1500),
        (units.parse_count, "1_000", 1000),
        (units.parse_count, "2e3", 2000),
        (units.parse_count, 2e3, 2000),
        (units.parse_count, "9007199254740993", 2**53 + 1),  # no float on the way
        (units.parse_duration_s, "10m", 600.0),
        (units.parse_duration_s, "1.5h", 5400.0),
        (units.parse_duration_s, "2 d", 172_800.0),
        (units.parse_deadline, "48h", Deadline(seconds=172_800.0)),
        (units.parse_deadline, " 2026-12-01T18:00Z", Deadline(at=1_796_148_000.0)),
        (units.parse_deadline, "2026-12-01 19:00+01:00", Deadline(at=1_796_148_000.0)),
        (units.parse_every, "50 steps", Every(steps=50)),
        (units.parse_every, "1 step", Every(steps=1)),
        (units.parse_every, "10m", Every(seconds=600.0)),
        (units.parse_range, "2..16", Range(low=2, high=16)),
        (units.parse_range, "4", Range(low=4, high=4)),
        (units.parse_range, 4, Range(low=4, high=4)),
        (units.parse_length, 20, Length(steps=20)),
        (units.parse_length, "1 step", Length(steps=1)),
        (units.parse_length, "0.7%", Length(percent=0.7)),
        (units.parse_length, "2.5M tokens", Length(tokens=2_500_000)),
        (units.parse_fraction, "1%", 0.01),
        (units.parse_fraction, "0.7%", 0.007),
        (units.parse_fraction, "0.01", 0.01),
        (units.parse_fraction, 1, 1.0),
    ],
)
def test_parse__valid_text__gives_the_value(parse: Callable[[Any], object], text: object, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (units.parse_bytes, "80XB", "known unit"),
        (units.parse_bytes, "1.5", "whole number"),
        (units.parse_bytes, True, "not a number"),
        (units.parse_count, None, "not a number"),
        (units.parse_count, "1e999", "must not be larger"),
        (units.parse_count, math.nan, "must not be larger"),
        (units.parse_count, 10**400, "must not be larger"),
        (units.parse_duration_s, 600, "with a unit"),
        (units.parse_duration_s, "0s", "greater than zero"),
        (units.parse_deadline, "2026-12-01T18:00", "has no time zone"),
        (units.parse_deadline, "2026-13-01", "write it like 48h, 2d or 2026-12-01T18:00Z"),
        (units.parse_deadline, "0001-01-01T00:00+14:00", "after the year 2000"),
        (units.parse_deadline, 48, "write it like 48h"),
        (units.parse_deadline, "11e3d", "at most ten years"),
        (units.parse_every, "50", "50 steps"),
        (units.parse_every, "0 steps", "at least 1 step"),
        (units.parse_range, "16..2", "below its start"),
        (units.parse_range, True, "not a range"),
        (units.parse_length, "0.03", "20M"),
        (units.parse_length, 0.03, "3%"),
        (units.parse_length, "101%", "100%"),
        (units.parse_length, -1, "negative"),
        (units.parse_length, "3 days", "3%"),
        (units.parse_fraction, "many", "1%"),
        (units.parse_fraction, [1], "1%"),
        (units.parse_fraction, math.inf, "finite"),
        (units.parse_fraction, 10**400, "finite"),
    ],
)
def test_parse__invalid_text__gives_the_reason(parse: Callable[[Any], object], text: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


@pytest.mark.parametrize("parse", PARSERS)
@given(
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.lists(st.integers(), max_size=2),
        st.from_regex(r"\A[0-9]{1,50}(\.[0-9]+)?([eE]-?[0-9]{1,9})?( ?[a-zA-Z%]{1,5})?\Z"),
    )
)
def test_parse__anything__returns_or_raises_value_error(parse: Callable[[Any], object], value: object) -> None:
    try:
        parsed = parse(value)
    except ValueError as error:
        assert len(str(error)) < 120
    else:
        assert isinstance(parsed, (Deadline, Every, Length, Range)) or math.isfinite(parsed)  # type: ignore[arg-type]


@given(
    st.one_of(
        st.builds(Length, steps=st.integers(0, 10**17)),
        st.builds(Length, tokens=st.integers(0, 10**17)),
        st.builds(Length, percent=st.floats(0, 100)),
    )
)
def test_length__formatted__is_parsed_back(length: Length) -> None:
    assert units.parse_length(str(length)) == length


@given(
    st.one_of(st.integers(1, 10**17).map(lambda n: Every(steps=n)), st.builds(Every, seconds=st.floats(1e-3, 1e9)))
)
def test_every__formatted__is_parsed_back(every: Every) -> None:
    assert units.parse_every(str(every)) == every


@given(
    st.one_of(st.builds(Deadline, seconds=st.floats(1e-3, 1e8)), st.builds(Deadline, at=st.integers(10**9, 2**37)))
)
def test_deadline__formatted__is_parsed_back(deadline: Deadline) -> None:
    assert units.parse_deadline(str(deadline)) == deadline


@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_range__formatted__is_parsed_back(low: int, more: int) -> None:
    assert units.parse_range(str(Range(low=low, high=low + more))) == Range(low=low, high=low + more)


@pytest.mark.parametrize("wrong", [{}, {"steps": 1, "seconds": 1.0}, {"steps": 0}, {"seconds": math.inf}])
def test_every__neither_or_both_units__is_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="interval"):
        Every(**wrong)


def test_is_due__steps__at_multiples() -> None:
    assert [step for step in range(1, 8) if Every(steps=3).is_due(step=step, seconds_since_last=1e9)] == [3, 6]


def test_is_due__seconds__after_they_passed() -> None:
    every = Every(seconds=10.0)
    assert [every.is_due(step=1, seconds_since_last=s) for s in (0, 9.9, 10, 11)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (units.format_bytes(0), "0 B"),
        (units.format_bytes(1023), "1023 B"),
        (units.format_bytes(1024), "1.00 KiB"),
        (units.format_bytes(1.35 * 2**30), "1.35 GiB"),
        (units.format_bytes(2**20 - 1), "1.00 MiB"),
        (units.format_bytes(math.nan), "-"),
        (units.format_count(512), "512"),
        (units.format_count(8.4e6), "8.40M"),
        (units.format_count(999_999), "1.00M"),
        (units.format_count(1.6e11), "160B"),
        (units.format_duration(0.85), "850ms"),
        (units.format_duration(0.9999), "1s"),
        (units.format_duration(2.5), "2.5s"),
        (units.format_duration(42), "42s"),
        (units.format_duration(59.7), "1m 00s"),
        (units.format_duration(185), "3m 05s"),
        (units.format_duration(7500), "2h 05m"),
        (units.format_duration(3 * 86400 + 4 * 3600), "3d 04h"),
        (units.format_duration(math.inf), "-"),
    ],
)
def test_format__number__is_short(written: str, expected: str) -> None:
    assert written == expected


@given(st.integers(0, 2**60))
def test_format_bytes__any_size__is_within_half_a_percent(size_bytes: int) -> None:
    number, unit = units.format_bytes(size_bytes).split()
    assert float(number) * units.parse_bytes(f"1{unit}" if unit != "PiB" else 2**50) == pytest.approx(
        size_bytes, rel=5e-3
    )

import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from clipcluster.recipe.units import Duration, Interval, Length, Memory, Nodes, Period, Time, parse_period


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("2200 steps", 2200),
        ("1 step", 1),
        ("1_000 steps", 1000),
        ("1e3steps", 1000),
        ("26 epochs", 26 * 1541),
        ("0.5 epochs", 771),  # 770.5 goes up
        ("1 epoch", 1541),
        ("1000 samples", 3),  # 2.6
        ("0 steps", 0),
        ("5%", 2003),  # of 40,066 steps
        ("0.5 %", 200),
        ("100%", 40_066),
    ],
)
def test_a_duration_becomes_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(steps_per_epoch=1541, batch_size=384, total_steps=40_066) == steps


@pytest.mark.parametrize(
    ("parse", "value", "asked"),
    [
        (Duration.parse, 100, "did you mean 100 steps?"),
        (Duration.parse, " 1e3", "did you mean 1e3 steps?"),
        (Time.parse, "15", "did you mean 15 min or 15 h?"),
        (Memory.parse, 200, "did you mean 200 MB or 200 GB?"),
        (Time.parse, "24:00:00", "'N d'; did you mean 1 d?"),  # as SLURM writes it
        (Time.parse, "1-12:30:00", "did you mean 2190 min?"),
        (parse_period, "15m", "did you mean 15 min?"),
        (Duration.parse, "3 st", "did you mean 3 steps?"),
        (parse_period, 15, "did you mean 15 steps or 15 min?"),
        (Duration.parse, 0, "did you mean 0 steps?"),  # a warm-up may be none
        (Duration.parse, 0.1, "did you mean 10% or 0.1 epochs?"),
        (Length.parse, 0.5, "did you mean 0.5 epochs?"),
        (parse_period, 1.5, "did you mean 1.5 epochs or 1.5 min?"),
    ],
)
def test_a_number_without_a_known_unit_is_asked_back(
    parse: Callable[[object], object], value: object, asked: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(asked)):
        parse(value)


@pytest.mark.parametrize("parse", [Length.parse, Interval.parse, Time.parse, parse_period])
def test_what_cannot_be_zero_is_not_asked_back_as_zero(parse: Callable[[object], object]) -> None:
    for value in (0, "0", -1):
        with pytest.raises(ValueError, match=r"more than zero$"):
            parse(value)
    for text in ("0 steps", "0 epochs", "0 min"):
        with pytest.raises(ValueError, match=r"zero|'N s"):
            parse(text)
    with pytest.raises(ValueError, match=r"not negative$"):
        Duration.parse(-1)


def test_the_length_of_a_run_is_no_share_of_itself() -> None:
    assert TypeAdapter(Length).validate_python("2 epochs") == Length.parse("2 epochs")
    with pytest.raises(ValidationError, match="the length of a run is 'N steps'"):
        TypeAdapter(Length).validate_python("5%")


@pytest.mark.parametrize(
    "text",
    ["", "5", 5, None, "five steps", "-1 steps", "1.5 steps", "3 hours", "1 steps x", True, "101%", "%"],
)
def test_what_is_no_duration(text: object) -> None:
    with pytest.raises(ValueError, match=r"steps"):
        Duration.parse(text)


@given(st.integers(0, 10**12), st.sampled_from(["steps", "samples", "epochs"]))
def test_a_duration_is_read_back_as_it_was(count: int, unit: str) -> None:
    duration = Duration(Fraction(count), unit)
    assert Duration.parse(str(duration)) == duration


@given(st.decimals(min_value=0, max_value=10**5, places=3, allow_nan=False))
def test_a_decimal_is_read_back_as_it_was(count: Decimal) -> None:
    for unit in ("epochs", "%") if count <= 100 else ("epochs",):
        duration = Duration.parse(f"{count} {unit}")
        assert Duration.parse(str(duration)) == duration


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 10**6))
def test_a_duration_in_samples_is_the_nearest_step(samples: int, batch: int, steps_per_epoch: int) -> None:
    steps = Duration(Fraction(samples), "samples").steps(steps_per_epoch, batch, 1)
    assert abs(steps * batch - samples) * 2 <= batch


@pytest.mark.parametrize(
    ("text", "seconds", "shown"),
    [
        ("90 s", 90, "90 s"),
        ("15 min", 900, "15 min"),
        ("120 min", 7200, "2 h"),
        ("4h", 14400, "4 h"),
        ("2 days", 172800, "2 d"),
        ("1.5 h", 5400, "90 min"),
        ("0.25 s", 0.25, "0.25 s"),
    ],
)
def test_a_time_becomes_seconds(text: str, seconds: float, shown: str) -> None:
    time = Time.parse(text)
    assert time.seconds == seconds
    assert str(time) == shown
    assert Time.parse(str(time)) == time


def test_minutes_of_a_time_are_rounded_up() -> None:
    assert Time.parse("61 s").minutes == 2
    assert Time.parse("60 s").minutes == 1


@pytest.mark.parametrize("text", ["15", 15, "0 s", "15 m", "1:30", "4 epochs", None])
def test_what_is_no_time(text: object) -> None:
    with pytest.raises(ValueError, match="time"):
        Time.parse(text)


def test_a_period_is_a_duration_or_a_time() -> None:
    assert parse_period("15 min") == Time(900.0)
    assert parse_period("3 epochs") == Interval(Fraction(3), "epochs")
    assert parse_period("auto") == "auto"
    assert TypeAdapter(Period).dump_python(parse_period("auto")) == "auto"
    with pytest.raises(ValueError, match=r"duration.*time.*auto"):
        parse_period("3 weeks")
    with pytest.raises(ValidationError):
        TypeAdapter(Period).validate_python(3)


@pytest.mark.parametrize(
    ("text", "megabytes", "shown"),
    [
        ("200 GB", 204800, "200 GB"),
        ("500MB", 500, "500 MB"),
        ("1.5 TB", 1572864, "1536 GB"),
        ("2G", 2048, "2 GB"),
    ],
)
def test_memory_counts_as_slurm_does(text: str, megabytes: int, shown: str) -> None:
    assert Memory.parse(text).megabytes == megabytes
    assert str(Memory.parse(text)) == shown


@pytest.mark.parametrize("text", ["200", 200, "0 GB", "4 KB", None])
def test_what_is_no_memory(text: object) -> None:
    with pytest.raises(ValueError, match="memory"):
        Memory.parse(text)


@pytest.mark.parametrize(
    ("text", "least", "most"), [(2, 2, 2), ("2", 2, 2), ("2-4", 2, 4), (" 1 - 16 ", 1, 16)]
)
def test_nodes_are_a_count_or_a_range(text: object, least: int, most: int) -> None:
    assert Nodes.parse(text) == Nodes(least, most)
    assert Nodes.parse(str(Nodes(least, most))) == Nodes(least, most)


@pytest.mark.parametrize("text", [0, "4-2", "2-", -1, True, None, 1.5, "many"])
def test_what_is_no_count_of_nodes(text: object) -> None:
    with pytest.raises(ValueError, match="nodes"):
        Nodes.parse(text)

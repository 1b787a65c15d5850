"""The bad network of the lab does what its seed says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.lab.weather import IN, OUT, Fate, Fates, Line, Weather

SHARES = st.floats(0, 1)


def fates(weather: Weather, direction: str = IN, count: int = 2000) -> list[Fate]:
    source = Fates(weather, direction)
    return [source.next() for _ in range(count)]


@given(st.integers(), SHARES, SHARES, SHARES)
def test_one_seed_is_one_fate(seed: int, loss: float, duplicate: float, reorder: float) -> None:
    weather = Weather(seed, loss=loss, duplicate=duplicate, reorder=reorder)
    assert fates(weather, count=50) == fates(weather, count=50)


def test_directions_and_seeds_differ() -> None:
    weather = Weather(7, loss=0.5)
    assert fates(weather, IN) != fates(weather, OUT)
    assert fates(weather) != fates(Weather(8, loss=0.5))


def test_shares_are_kept() -> None:
    found = fates(Weather(7, loss=0.05, duplicate=0.02, reorder=0.1, late_ms=4), count=20_000)
    arrived = [one for one in found if one.copies]
    assert 0.045 < 1 - len(arrived) / len(found) < 0.055
    assert 0.015 < sum(one.copies == 2 for one in arrived) / len(arrived) < 0.025
    late = [one.late_ms for one in arrived if one.late_ms]
    assert 0.09 < len(late) / len(arrived) < 0.11
    assert 3.5 < max(late) <= 4


def test_one_rate_changes_nothing_but_its_own() -> None:
    """What is late stays late when packets are lost as well."""
    without, with_loss = (fates(Weather(7, loss=loss, reorder=0.1)) for loss in (0.0, 0.2))
    assert all(one.late_ms == other.late_ms for one, other in zip(without, with_loss, strict=True) if other.copies)


def test_the_first_packets_may_be_spared() -> None:
    weather = Weather(7, loss=1.0, spared=3)
    assert [one.copies for one in fates(weather, count=5)] == [1, 1, 1, 0, 0]


def test_a_line_delays_and_keeps_its_rate() -> None:
    line = Line(Weather(delay_ms=10, rate=1e6, queue_ms=5), IN)
    assert line.take(1000, 0) == (1, 11_000_000)
    assert line.take(1000, 0) == (1, 12_000_000)
    assert line.take(1000, 50_000_000) == (1, 61_000_000)


def test_what_would_wait_too_long_is_dropped_and_leaves_its_room_to_others() -> None:
    line = Line(Weather(rate=1e6, queue_ms=1.5), IN)
    assert [line.take(1000, 0)[0] for _ in range(4)] == [1, 1, 0, 0]
    assert line.take(1000, 600_000) == (1, 3_000_000)
    assert line.to_json() == {"seen": 5, "lost": 0, "doubled": 0, "late": 0, "overflowed": 2}


@pytest.mark.parametrize("wrong", [{"loss": 1.1}, {"reorder": -0.1}, {"delay_ms": -1.0}, {"rate": 0.0}])
def test_an_impossible_network_is_none(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        Weather(**wrong)  # type: ignore[arg-type]

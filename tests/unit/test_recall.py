"""What it takes to give a restored connection back what was learnt of its path."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.recall import MAX_BYTES, Recall, recall
from criu_tcpcp.core.state import NOTHING_LEARNT, Congestion, Negotiated

ETHERNET = Negotiated(1460, True, 7, 7, True, True)
BARE = replace(ETHERNET, timestamps=False)
LEARNT = Congestion(30, 20, 20_400, 1000, 224_000)


@pytest.mark.parametrize(("learnt", "negotiated", "expected"), [
    (LEARNT, ETHERNET, Recall(20 * 1448, 20_400)),
    (LEARNT, BARE, Recall(20 * 1460, None)),
    (replace(LEARNT, snd_cwnd=10), ETHERNET, Recall(1, 20_400)),  # a window as new, and one byte for the sample
    (replace(LEARNT, snd_cwnd=3), ETHERNET, Recall(1, 20_400)),
    (replace(LEARNT, snd_cwnd=10), BARE, None),
    (replace(LEARNT, rtt_us=0), ETHERNET, Recall(20 * 1448, None)),
    (NOTHING_LEARNT, ETHERNET, None)])
def test_as_many_bytes_as_segments_are_missing(learnt: Congestion, negotiated: Negotiated,
                                               expected: Recall | None) -> None:
    assert recall(learnt, negotiated) == expected


@pytest.mark.parametrize(("clock", "rtt_us", "echo"), [
    (1000, 20_400, 980), (1000, 70, 999),  # the clock has no less than a millisecond
    (6, 20_400, (1 << 32) - 14), (100_001, 20_400, 79_601), (1000, None, 0)])
def test_the_echo_is_a_round_trip_old(clock: int, rtt_us: int | None, echo: int) -> None:
    assert Recall(1, rtt_us).echo(clock) == echo


@given(st.integers(0, 1 << 32), st.integers(48, 65535), st.booleans())
def test_a_window_that_cannot_be_is_cut(cwnd: int, mss: int, timestamps: bool) -> None:
    found = recall(replace(LEARNT, snd_cwnd=cwnd), replace(ETHERNET, mss_clamp=mss, timestamps=timestamps))
    assert found is None or 0 < found.bytes_ <= MAX_BYTES


@pytest.mark.parametrize(("idle_ms", "cwnd"), [(0, 100), (223, 100), (224, 50), (500, 25), (700, 12), (10**9, 10)])
def test_a_window_that_is_not_used_decays(idle_ms: int, cwnd: int) -> None:
    assert replace(LEARNT, snd_cwnd=100).after(idle_ms * 1000) == replace(LEARNT, snd_cwnd=cwnd)


def test_a_small_window_does_not_grow_by_idling() -> None:
    assert replace(LEARNT, snd_cwnd=4).after(10**9).snd_cwnd == 4
    assert NOTHING_LEARNT.after(10**9) == NOTHING_LEARNT

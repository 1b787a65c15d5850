"""The peer's segments go on in the order in which it sent them, and none stays behind."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.core.reorder import Reorder
from criu_tcpcp.core.tcp import MODULUS
from criu_tcpcp.kernel.rawpacket import ACK, FIN, build_segment, extent


@pytest.mark.parametrize("start", [0, 1000, MODULUS - 250])
def test_what_is_ahead_waits_for_what_is_missing(start: int) -> None:
    order = Reorder(start)
    assert order.came(1, (start + 200) % MODULUS, 100) == []
    assert order.waits
    assert order.came(2, (start + 300) % MODULUS, 0) == [], "an acknowledgement behind it waits as well"
    assert order.came(3, start, 100) == [3]
    assert order.came(4, (start + 100) % MODULUS, 100) == [4, 1, 2]
    assert not order.waits


def test_what_repeats_something_goes_on_at_once() -> None:
    order = Reorder(1000)
    assert order.came(1, 500, 100) == [1]
    assert order.came(2, 1100, 10) == []
    assert order.came(3, 900, 50) == [3]
    assert order.came(4, 900, 200) == [4, 2], "this one brings what was missing as well"
    assert order.came(5, 1110, 0) == [5]


def test_what_is_missing_for_good_stops_nothing() -> None:
    order = Reorder(0)
    assert order.came(1, 300, 100) == []
    assert order.came(2, 100, 100) == []
    assert order.give_up() == [2, 1]
    assert not order.waits
    assert order.came(3, 400, 1) == [3]
    assert order.came(4, 0, 100) == [4], "late, but not held back"


@given(st.integers(0, MODULUS - 1), st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.data())
def test_any_mixture_of_two_ways_comes_out_as_it_was_sent(start: int, lengths: list[int], data: st.DataObject) -> None:
    """Each way keeps its order."""
    sent, at = [], start
    for number, length in enumerate(lengths):
        sent.append((number, at, length))
        at = (at + length) % MODULUS
    split = data.draw(st.integers(0, len(sent)))
    ways = [sent[:split], sent[split:]]  # over the old owner, and directly
    order, gone = Reorder(start), []
    while any(ways):
        way = data.draw(st.sampled_from([way for way in ways if way]))
        gone += order.came(*way.pop(0))
    assert not order.waits
    moved = [number for number in gone if lengths[number]]
    assert moved == [number for number, length in enumerate(lengths) if length]
    assert sorted(gone) == list(range(len(lengths)))


@pytest.mark.parametrize(("source", "destination"), [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")])
@pytest.mark.parametrize("timestamps", [None, (1, 2)])
def test_the_extent_of_a_segment_is_read_from_its_headers(source: str, destination: str,
                                                          timestamps: tuple[int, int] | None) -> None:
    ends = Endpoint(ipaddress.ip_address(source), 1), Endpoint(ipaddress.ip_address(destination), 2)
    version = ends[0].address.version
    whole = build_segment(*ends, sequence=77, acknowledgement=5, flags=ACK | FIN, window=1, timestamps=timestamps,
                          payload=b"x" * 300)
    assert extent(whole, version) == (77, 301)
    assert extent(whole[:120], version) == (77, 301), "as the queue gives it"
    assert extent(whole[:50 if version == 6 else 30], version) == (0, 0)

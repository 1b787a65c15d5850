"""The demo's pure parts, and what it says where something is missing."""

from __future__ import annotations

import ipaddress
import os
import xml.etree.ElementTree as ElementTree

import pytest

from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import Refused
from criu_tcpcp.demo import plot, stage
from criu_tcpcp.demo.sightings import Record, Sighting, Switch, record
from criu_tcpcp.verify import Capture, Packet, Role

FLOW = Flow(Endpoint(ipaddress.IPv4Address("10.0.0.1"), 80), Endpoint(ipaddress.IPv4Address("10.0.0.2"), 4000))
MACS = {Role.ORIGIN: b"\0\0\0\0\0\1", Role.DESTINATION: b"\0\0\0\0\0\2"}
ROUTER = b"\0\0\0\0\0\3"
SYN, ACK = 2, 16


def packet(time_ns: int, seq: int, length: int = 0, *, ack: int = 501, flags: int = ACK, capture: str = "peer",
           mac: bytes = ROUTER, from_peer: bool = False) -> Packet:
    src, dst = (FLOW.peer, FLOW.local) if from_peer else (FLOW.local, FLOW.peer)
    return Packet(time_ns, capture, 1, 4, src, dst, seq, ack, flags, 1000, payload=bytes(length), payload_len=length,
                  ether_src=mac)


def sent(one: Packet, role: Role, mac: bytes | None = None) -> Packet:
    return packet(one.time_ns - 1, one.seq, one.payload_len, flags=one.flags, capture=str(role),
                  mac=MACS[role] if mac is None else mac)


def test_each_packet_is_given_to_the_host_that_sent_it() -> None:
    shake = packet(1, 999, flags=SYN | ACK)
    one, two, again, three = packet(10, 1000, 100), packet(20, 1100, 50), packet(30, 1000, 100), packet(40, 1150, 7)
    at_peer = (packet(0, 500, flags=SYN, ack=0, from_peer=True), shake, one,
               packet(15, 501, ack=1100, from_peer=True), two, again, three)
    origin = (sent(shake, Role.ORIGIN), sent(one, Role.ORIGIN), sent(two, Role.ORIGIN, MACS[Role.DESTINATION]))
    found = record([Capture("peer", Role.PEER, at_peer), Capture("origin", Role.ORIGIN, origin),
                    Capture("destination", Role.DESTINATION, (sent(two, Role.DESTINATION),))], FLOW, MACS)
    assert [(seen.host, seen.start, seen.end, seen.new) for seen in found.sightings] == [
        (Role.ORIGIN, 0, 0, 0), (Role.ORIGIN, 0, 100, 100), (Role.DESTINATION, 100, 150, 50),
        (Role.ORIGIN, 0, 100, 0), (Role.UNKNOWN, 150, 157, 7)]
    assert found.bytes_by_host() == {"origin": 100, "destination": 50, "unknown": 7}
    assert found.packets_by_host() == {"origin": 3, "destination": 1, "unknown": 1}
    assert found.switches == [Switch(Role.ORIGIN, Role.DESTINATION, 10, 20),
                              Switch(Role.DESTINATION, Role.ORIGIN, 20, 30)]
    assert (15, 100) in found.acknowledged


def stream(count: int, at: int) -> Record:
    """A packet each millisecond; the destination's from number `at` on, 10 ms later."""
    seen = [Sighting((number + 10 * (number >= at)) * 1_000_000, Role.ORIGIN if number < at else Role.DESTINATION,
                     number * 1000, (number + 1) * 1000, 1000) for number in range(count)]
    return Record(tuple(seen), tuple((one.time_ns + 1000, one.end) for one in seen))


@pytest.mark.parametrize(("count", "at"), [(2, 1), (40, 1), (40, 20), (40, 39), (20000, 7000)])
def test_the_picture_stays_in_its_frame(count: int, at: int) -> None:
    root = ElementTree.fromstring(plot.svg(stream(count, at), "<title>"))
    width, height = float(root.get("width") or 0), float(root.get("height") or 0)
    for element in root.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(element.get(name, "0")) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, "0")) <= height
    circles = [one for one in root.iter() if one.tag.endswith("circle")]
    assert 2 <= len(circles) <= 2000
    assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_there_is_no_picture_without_a_pass() -> None:
    with pytest.raises(ValueError, match="nothing was passed"):
        plot.svg(stream(5, 5), "")


def test_what_is_missing_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match="root is needed"):
        stage.require()
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(stage, "NEEDED", {"sh": "dash", "no-such-program": "no-such-package", "nor-this": "another"})
    with pytest.raises(Refused) as caught:
        stage.require()
    assert str(caught.value) == "not installed: no-such-program, nor-this (apt install no-such-package another)"

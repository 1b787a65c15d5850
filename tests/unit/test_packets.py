"""Whole packets: which are the connection's, and where one ends."""

from __future__ import annotations

import ipaddress

import pytest

from criu_tcpcp.core.endpoint import Endpoint, Flow
from criu_tcpcp.core.errors import ProtocolError
from criu_tcpcp.core.packets import Sieve, split
from criu_tcpcp.kernel.rawpacket import ACK, build_segment

FLOWS = {version: Flow(Endpoint(ipaddress.ip_address(here), 9000), Endpoint(ipaddress.ip_address(there), 4000))
         for version, here, there in ((4, "10.0.0.1", "10.0.0.2"), (6, "fd00::1", "fd00::2"))}


def packet(source: Endpoint, destination: Endpoint, payload: bytes = b"") -> bytes:
    made = bytearray(build_segment(source, destination, sequence=1, acknowledgement=2, flags=ACK, window=3,
                                   payload=payload))
    if source.address.version == 4:
        made[2:4] = len(made).to_bytes(2, "big")  # the kernel's to fill in
    return bytes(made)


@pytest.mark.parametrize("version", [4, 6])
def test_the_connection_s_packets_are_told_by_their_way(version: int) -> None:
    flow = FLOWS[version]
    sieve = Sieve.of(flow)
    assert sieve.leaves(packet(flow.local, flow.peer)) is True
    assert sieve.leaves(packet(flow.peer, flow.local)) is False
    other = Endpoint(flow.peer.address, flow.peer.port + 1)
    assert sieve.leaves(packet(flow.local, other)) is None
    assert sieve.leaves(packet(other, flow.local)) is None
    fragment = bytearray(packet(flow.local, flow.peer))
    fragment[7 if version == 4 else 6] = 44  # an offset; a fragment header
    assert sieve.leaves(bytes(fragment)) is None
    assert sieve.leaves(packet(FLOWS[10 - version].local, FLOWS[10 - version].peer)) is None
    for length in (0, 1, 19):
        assert sieve.leaves(packet(flow.local, flow.peer)[:length]) is None


@pytest.mark.parametrize("version", [4, 6])
def test_packets_lie_behind_each_other(version: int) -> None:
    flow = FLOWS[version]
    some = [packet(flow.local, flow.peer, b"x" * length) for length in (0, 1, 1000)]
    assert list(split(b"".join(some), version)) == some
    assert list(split(b"", version)) == []


@pytest.mark.parametrize("version", [4, 6])
def test_what_is_no_row_of_packets_is_refused(version: int) -> None:
    flow, other = FLOWS[version], FLOWS[10 - version]
    one = packet(flow.local, flow.peer, b"payload")
    for data in (one[:-1], one + one[:10], one + b"\0", packet(other.local, other.peer)):
        with pytest.raises(ProtocolError):
            list(split(data, version))

"""What the peer saw of the passed end, packet by packet, and which host had sent it. Pure.

The peer cannot tell (a router stands between, and all packets have its Ethernet address): the hosts' own captures tell.
A packet that the peer saw is the one with the same numbers that left a host; the clock is the machine's for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..core.endpoint import Flow
from ..verify import Capture, Packet, Role
from ..verify.wire import Wire


@dataclass(frozen=True)
class Sighting:
    """A packet of the passed end as it reached the peer: it carried bytes `start`..`end` of the stream, of which `new`
    came for the first time."""

    time_ns: int
    host: Role
    start: int
    end: int
    new: int


@dataclass(frozen=True)
class Switch:
    """Another host began to speak: when the peer saw the last packet of the old one, and the first of the new one."""

    old: Role
    new: Role
    last_ns: int
    first_ns: int

    @property
    def silence_ms(self) -> float:
        return (self.first_ns - self.last_ns) / 1e6


@dataclass(frozen=True)
class Record:
    """`acknowledged`: (time, bytes) of what the peer acknowledged."""

    sightings: tuple[Sighting, ...]
    acknowledged: tuple[tuple[int, int], ...]

    @property
    def switches(self) -> list[Switch]:
        told = [one for one in self.sightings if one.host is not Role.UNKNOWN]
        return [Switch(old.host, new.host, old.time_ns, new.time_ns)
                for old, new in itertools.pairwise(told) if old.host is not new.host]

    def bytes_by_host(self) -> dict[str, int]:
        """Payload bytes, each counted once, for the host from which it came first."""
        return {str(role): sum(one.new for one in self.sightings if one.host is role)
                for role in (Role.ORIGIN, Role.DESTINATION, Role.UNKNOWN)}

    def packets_by_host(self) -> dict[str, int]:
        return {str(role): sum(one.host is role for one in self.sightings)
                for role in (Role.ORIGIN, Role.DESTINATION, Role.UNKNOWN)}


def _key(packet: Packet) -> tuple[int, int, int, int | None, int | None, int]:
    return (packet.seq, packet.ack, packet.flags, packet.options.tsval, packet.options.tsecr, packet.payload_len)


def record(captures: Iterable[Capture], flow: Flow, macs: Mapping[Role, bytes]) -> Record:
    """From the captures at the peer and at both hosts; `macs`: the hosts' own Ethernet addresses."""
    captures = list(captures)
    sent = {_key(packet): capture.role for capture in captures if capture.role in macs for packet in capture.packets
            if (packet.src, packet.dst) == (flow.local, flow.peer) and packet.ether_src == macs[capture.role]}
    wire = Wire(flow, {}, {})
    sightings: list[Sighting] = []
    acknowledged: list[tuple[int, int]] = []
    for packet in (packet for capture in captures if capture.role is Role.PEER for packet in capture.packets):
        if {packet.src, packet.dst} != {flow.local, flow.peer}:
            continue
        step = wire.step(packet)
        new = wire.advance(step)
        first = (wire.passed.first or 0) + 1  # behind the SYN
        if not step.from_peer:
            start = step.data_start - first
            sightings.append(Sighting(packet.time_ns, sent.get(_key(packet), Role.UNKNOWN), start,
                                      start + packet.payload_len, new))
        elif step.ack is not None:
            acknowledged.append((packet.time_ns, step.ack - first))
    return Record(tuple(sightings), tuple(acknowledged))

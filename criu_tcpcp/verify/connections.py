"""Which connections the captures hold, and which end of each was passed.

Which end moved is not written in a packet. What tells it, if anything:

- at the peer, packets of the passed end come from two Ethernet sources (where no router stands between);
- a capture taken at a host shows which end is that host: what it sends is outgoing, where the format tells
  (LINUX_SLL), and its TTL has not been counted down yet (64, 128 or 255), while the other end's has. At the peer that
  is the peer, at an egress the passed end.

Evidence that points to both ends is none: the caller must name the connection then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..core.endpoint import Endpoint, Flow
from .capture import Capture
from .packet import CaptureError, Packet, Role

_EGRESS = (Role.ORIGIN, Role.DESTINATION)
_INITIAL_TTL = (64, 128, 255)
_LISTED = 5


@dataclass(frozen=True)
class Connection:
    """`flow`: named from the end that was passed; None where `why_not` says why it is not judged. `ends`: both ends, in
    the order of their first packet."""

    ends: tuple[Endpoint, Endpoint]
    flow: Flow | None
    why_not: str = ""

    def __str__(self) -> str:
        return str(self.flow) if self.flow is not None else f"{self.ends[0]} <-> {self.ends[1]}"

    def named_from(self, local: Endpoint) -> Connection:
        """The same, with `local` for the end that was passed."""
        return Connection(self.ends, Flow(local, next(end for end in self.ends if end != local)))


def find_connections(captures: Sequence[Capture]) -> list[Connection]:
    """Every connection in the captures, in the order of their first packets. One that was not passed is not judged, as
    far as that can be told: one that is not in all captures, or comes from one source only where another moved."""
    packets: dict[tuple[Endpoint, Endpoint], dict[str, list[Packet]]] = {}
    for capture in captures:
        for packet in capture.packets:
            pair = (packet.src, packet.dst)
            if pair not in packets:
                pair = pair[::-1] if pair[::-1] in packets else pair
            packets.setdefault(pair, defaultdict(list))[capture.name].append(packet)
    moved = {pair: _moved(pair, captures, mine) for pair, mine in packets.items()}
    found = []
    for pair, mine in packets.items():
        missing = next((capture.name for capture in captures if capture.name not in mine), None)
        passed = moved[pair] or _by_host(pair, captures, mine)
        if pair[0] == pair[1]:
            found.append(Connection(pair, None, "both ends are the same"))
        elif missing is not None:
            found.append(Connection(pair, None, f"not in {missing}"))
        elif any(moved.values()) and not moved[pair]:
            found.append(Connection(pair, None, "each end has one Ethernet source: it was not passed"))
        elif len(passed) != 1:
            found.append(Connection(pair, None, "which end was passed cannot be told"))
        else:
            found.append(Connection(pair, None).named_from(*passed))
    return found


def _moved(pair: tuple[Endpoint, Endpoint], captures: Iterable[Capture],
           mine: dict[str, list[Packet]]) -> set[Endpoint]:
    """The ends that have more than one Ethernet source in one capture, other than an egress capture: there, the peer's
    packets also leave again, for the other host."""
    found = set()
    for capture in captures:
        if capture.role not in _EGRESS and capture.name in mine:
            for end in pair:
                sources = {packet.ether_src for packet in mine[capture.name] if packet.src == end}
                if len(sources - {None}) > 1:
                    found.add(end)
    return found


def _by_host(pair: tuple[Endpoint, Endpoint], captures: Iterable[Capture],
             mine: dict[str, list[Packet]]) -> set[Endpoint]:
    """The end that was passed, by every capture of which it is known where it was taken."""
    found = set()
    for capture in captures:
        if capture.role is Role.UNKNOWN or capture.name not in mine:
            continue
        for end, other in (pair, pair[::-1]):
            if _is_here(mine[capture.name], end, other):
                found.add(other if capture.role is Role.PEER else end)
    return found


def _is_here(packets: Iterable[Packet], end: Endpoint, other: Endpoint) -> bool:
    """Is `end` the capturing host, and `other` not?"""
    sent = [packet for packet in packets if packet.src == end]
    received = [packet for packet in packets if packet.src == other]
    if not sent or not received:
        return False
    outgoing = all(packet.outgoing for packet in sent) and any(packet.outgoing is False for packet in received)
    fresh = (all(packet.ttl in _INITIAL_TTL for packet in sent)
             and all(packet.ttl not in _INITIAL_TTL for packet in received))
    return outgoing or fresh


def narrowed(captures: Sequence[Capture], flows: Iterable[Flow]) -> dict[Flow, list[Capture]]:
    """For each flow, the captures with its packets alone: to judge many, each packet is looked at once."""
    flow_of = {frozenset((flow.local, flow.peer)): flow for flow in flows}
    found: dict[Flow, list[Capture]] = {flow: [] for flow in flow_of.values()}
    for capture in captures:
        mine: defaultdict[Flow | None, list[Packet]] = defaultdict(list)
        for packet in capture.packets:
            mine[flow_of.get(frozenset((packet.src, packet.dst)))].append(packet)
        for flow, one in found.items():
            one.append(replace(capture, packets=tuple(mine[flow])))
    return found


def find_flow(captures: Sequence[Capture]) -> Flow:
    """The one connection in the captures that was passed. CaptureError where it cannot be told."""
    found = find_connections(captures)
    flows = [connection.flow for connection in found if connection.flow is not None]
    if len(flows) == 1:
        return flows[0]
    if not found:
        raise CaptureError("no TCP packet is in the captures")
    raise CaptureError(f"{len(found)} connections in the captures, and {len(flows)} that were passed: {listed(found)}",
                       hint="name the connection")


def listed(connections: Sequence[Connection]) -> str:
    """The first of them, with what speaks against each."""
    texts = [f"{one}{f' ({one.why_not})' if one.why_not else ''}" for one in connections[:_LISTED]]
    more = len(connections) - _LISTED
    return ", ".join(texts) + (f", and {more} more" if more > 0 else "")

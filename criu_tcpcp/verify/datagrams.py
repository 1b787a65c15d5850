"""The wire assertions of a passed UDP connection: what captures of the peer and of both hosts must show. Pure.

UDP has no numbers of its own, so two datagrams with the same bytes cannot be told apart: whoever is judged sends each
of them once. Fragments but the first are not looked at.

    1  no ICMP error about the connection, anywhere
    2  nothing from the origin after the destination's first datagram, until the connection comes back
    3  no datagram leaves or reaches a host twice, and the peer's reach the new owner in their order
    4  TTL (hop limit), but for one hop, TOS, and DF of what reaches the peer are constant
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.endpoint import Endpoint, Flow
from .container import frames
from .decode import UdpDatagram, decode_udp
from .packet import IcmpError, Role


@dataclass(frozen=True)
class DatagramCapture:
    """What a host's capture shows of one UDP connection, in its order."""

    role: Role
    datagrams: tuple[UdpDatagram, ...]
    errors: tuple[IcmpError, ...]

    def sent_by(self, end: Endpoint) -> list[UdpDatagram]:
        return [one for one in self.datagrams if one.src == end]


def parse_datagrams(data: bytes, role: Role, flow: Flow) -> DatagramCapture:
    """CaptureError for what is no capture."""
    ends = {flow.local, flow.peer}
    datagrams: list[UdpDatagram] = []
    errors: list[IcmpError] = []
    for frame in frames(data):
        found = decode_udp(frame, role.value)
        if isinstance(found, UdpDatagram) and {found.src, found.dst} == ends:
            datagrams.append(found)
        elif isinstance(found, IcmpError) and {found.quoted_src, found.quoted_dst} == ends:
            errors.append(found)
    return DatagramCapture(role, tuple(datagrams), tuple(errors))


def judge_datagrams(captures: Sequence[DatagramCapture], flow: Flow, passes: int = 1) -> list[str]:
    """The violations, one line each. `passes`: how often the connection changed hands."""
    return [*_icmp(captures), *_turns(captures, flow, passes), *_repeats(captures, flow), *_constants(captures, flow)]


def _icmp(captures: Sequence[DatagramCapture]) -> Iterator[str]:
    for capture in captures:
        yield from (f"1: {error}" for error in capture.errors)


def _turns(captures: Sequence[DatagramCapture], flow: Flow, passes: int) -> Iterator[str]:
    """Who spoke in the connection's name, by what left the two hosts."""
    said = sorted((one.time_ns, capture.role) for capture in captures if capture.role is not Role.PEER
                  for one in capture.sent_by(flow.local))
    changes = sum(before[1] is not after[1] for before, after in itertools.pairwise(said))
    if changes > passes:
        yield f"2: the two hosts spoke in turns {changes} times in {passes} passes"


def _repeats(captures: Sequence[DatagramCapture], flow: Flow) -> Iterator[str]:
    sent = {one.payload: place for capture in captures if capture.role is Role.PEER
            for place, one in enumerate(capture.sent_by(flow.peer))}
    for capture in captures:
        for end in (flow.local, flow.peer):
            seen: set[bytes] = set()
            for one in capture.sent_by(end):
                # A host that sends a datagram on shows it twice: as it came, and with one hop less.
                key = one.payload + bytes([one.hops])
                if key in seen:
                    yield f"3: twice: {one}"
                seen.add(key)
    for capture in captures:
        if capture.role is not Role.DESTINATION:
            continue
        # Once each: held there as the connection goes home, it is sent back.
        places = list(dict.fromkeys(sent[one.payload] for one in capture.sent_by(flow.peer) if one.payload in sent))
        yield from (f"3: the peer's datagram {after} reached the destination behind {before}"
                    for before, after in itertools.pairwise(places) if after < before)


def _constants(captures: Sequence[DatagramCapture], flow: Flow) -> Iterator[str]:
    for capture in captures:
        if capture.role is Role.PEER:
            came = capture.sent_by(flow.local)
            for name, values in (("TOS", {one.tos for one in came}), ("DF", {one.df for one in came})):
                if len(values) > 1:
                    yield f"4: {name} of what reached the peer was {sorted(values)}"
            if came and max(one.hops for one in came) - min(one.hops for one in came) > 1:
                yield f"4: TTL of what reached the peer was {sorted({one.hops for one in came})}"

"""Packets made by hand, and given to this host's own stack: never on any wire, and marked, so that every rule of ours
lets them by. Among them is a pure acknowledgement of the peer's, which sets ts_recent, for which there is no interface
(RFC 7323 4.3); how it is learnt: tap.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from dataclasses import dataclass

from ..core.endpoint import Endpoint, Flow, IPAddress, Protocol
from ..core.restoreplan import InjectSegment
from .checksums import checksum, pseudo_header
from .rawdatagram import build_knock
from .syscalls import failing

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_SO_MARK, _SO_BINDTOIFINDEX, _IPV6_HDRINCL = 36, 62, 36


def build_segment(source: Endpoint, destination: Endpoint, *, sequence: int, acknowledgement: int, flags: int,
                  window: int, timestamps: tuple[int, int] | None = None, payload: bytes = b"") -> bytes:
    """A whole IP packet that holds one TCP segment."""
    options = struct.pack(">BBBBII", 1, 1, 8, 10, *timestamps) if timestamps is not None else b""
    offset = (20 + len(options)) // 4 << 4
    head = struct.pack(">HHIIBBHHH", source.port, destination.port, sequence, acknowledgement, offset, flags, window,
                       0, 0)
    length = len(head) + len(options) + len(payload)
    pair = source.address.packed + destination.address.packed
    pseudo = pseudo_header(source, destination, socket.IPPROTO_TCP, length)
    total = checksum(pseudo + head + options + payload)
    segment = head[:16] + struct.pack(">H", total) + head[18:] + options + payload
    if source.address.version == 4:  # the kernel fills in the header's checksum and, where it is 0, the identification
        return struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, socket.IPPROTO_TCP, 0) + pair + segment
    return struct.pack(">IHBB", 6 << 28, length, socket.IPPROTO_TCP, 64) + pair + segment


@dataclass(frozen=True)
class Segment:
    """A segment by its headers. `length`: bytes of payload; `window`: as it stands in the header, unscaled."""

    sequence: int
    acknowledgement: int
    flags: int
    window: int
    length: int


def headers(packet: bytes, ip_version: int) -> Segment | None:
    """None for what is no whole header (RFC 791 3.1, RFC 8200 3, RFC 9293 3.1), or whose lengths contradict each other.
    `packet` may end behind the headers."""
    if len(packet) < (20 if ip_version == 4 else 40):
        return None
    if ip_version == 4:
        begin, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
    else:
        begin, end = 40, 40 + int.from_bytes(packet[4:6], "big")
    if begin < 20 or len(packet) < begin + 20 or packet[9 if ip_version == 4 else 6] != socket.IPPROTO_TCP:
        return None
    sequence, acknowledgement, offset, flags, window = struct.unpack_from(">IIBBH", packet, begin + 4)
    length = end - begin - (offset >> 4) * 4
    return Segment(sequence, acknowledgement, flags, window, length) if offset >> 4 >= 5 and length >= 0 else None


def extent(packet: bytes, ip_version: int) -> tuple[int, int]:
    """(sequence number, how many numbers it takes) of a segment, by its headers; of anything else (0, 0)."""
    segment = headers(packet, ip_version)
    if segment is None:
        return 0, 0
    return segment.sequence, segment.length + bool(segment.flags & SYN) + bool(segment.flags & FIN)


class Injector:
    """Gives packets to this host's own stack. `mark`: on every packet, so that rules can tell them apart."""

    def __init__(self, ip_version: int, mark: int) -> None:
        self._version = ip_version
        family = socket.AF_INET if ip_version == 4 else socket.AF_INET6
        with failing("socket(SOCK_RAW)"):
            self._socket = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
            if ip_version == 6:
                self._socket.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)

    def deliver(self, flow: Flow, segment: InjectSegment) -> None:
        """Hand the segment, from the peer, to the local end of the flow."""
        stamps = (segment.timestamp, segment.echo) if segment.timestamp is not None else None
        packet = build_segment(flow.peer, flow.local, sequence=segment.sequence,
                               acknowledgement=segment.acknowledgement,
                               flags=ACK | (FIN if segment.fin else 0), window=segment.window, timestamps=stamps)
        self._send(flow, packet)

    def deliver_old(self, flow: Flow, sequence: int, acknowledgement: int, payload: bytes) -> None:
        """What was received long ago (kernel/timestamps.py)."""
        self._send(flow, build_segment(flow.peer, flow.local, sequence=sequence, acknowledgement=acknowledgement,
                                       flags=ACK, window=0, payload=payload))

    def knock(self, flow: Flow) -> None:
        """Show this host's rules a packet of the flow that no peer sends (kernel/rules.py, `gate`); they let it go no
        further. A socket would ignore it."""
        with contextlib.suppress(OSError):  # EPERM is what a rule drops; without the knock the hold ends all the same
            self._socket.sendto(_knock(flow, 0), (str(flow.local.address), 0))

    def knock_at(self, nexthop: IPAddress, interface: int, flow: Flow, size: int) -> None:
        """Send such a packet, of at least `size` bytes, to a next hop on one of this host's links. KernelError where it
        cannot leave. A raw socket's packet goes where sendto says, not where its header does (net/ipv4/raw.c,
        raw_sendmsg; net/ipv6/raw.c, rawv6_sendmsg)."""
        with failing("send of a made packet"):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, interface)
            self._socket.sendto(_knock(flow, size), (str(nexthop), 0))

    def deliver_bare(self, flow: Flow, flags: int, sequence: int, acknowledgement: int = 0,
                     payload: bytes = b"") -> None:
        """A segment without options, from the peer."""
        self._send(flow, build_segment(flow.peer, flow.local, sequence=sequence, acknowledgement=acknowledgement,
                                       flags=flags, window=65535, payload=payload))

    def hand_over(self, flow: Flow, packet: bytes) -> None:
        """Give any whole packet of the peer's to the local end of the flow."""
        self._send(flow, packet)

    def _send(self, flow: Flow, packet: bytes) -> None:
        with failing("send of a made packet"):
            self._socket.sendto(packet, (str(flow.local.address), 0))

    def close(self) -> None:
        self._socket.close()


def is_knock(packet: bytes, protocol: Protocol, ip_version: int) -> bool:
    """Such a packet as `Injector.knock_at` sends."""
    if protocol is Protocol.UDP:
        start = (packet[0] & 15) * 4 if packet and ip_version == 4 else 40
        return packet[start + 4:start + 6] == b"\0\0"
    segment = headers(packet, ip_version)
    return segment is not None and segment.flags == 0


def _knock(flow: Flow, size: int) -> bytes:
    """A packet of the peer's that no peer sends, and that no socket takes or answers."""
    if flow.protocol is Protocol.UDP:
        return build_knock(flow.peer, flow.local, size)
    empty = 40 if flow.ip_version == 4 else 60
    return build_segment(flow.peer, flow.local, sequence=0, acknowledgement=0, flags=0, window=0,
                         payload=bytes(max(0, size - empty)))

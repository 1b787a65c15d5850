"""Segments made and seen by hand, for the one value that no interface tells or sets: ts_recent.

*Learnt* at the origin: the socket is made to send one segment, and a packet socket sees it leave; its TSecr is
ts_recent. *Set* at the destination: a pure acknowledgement of the peer's, never on any wire, is given to the socket
through the loopback path; marked, so that every rule of ours lets it by (RFC 7323 4.3 is what makes both work).
"""

from __future__ import annotations

import contextlib
import ctypes
import select
import socket
import struct
import time
from dataclasses import dataclass

from ..core.endpoint import Endpoint, Flow, Protocol
from ..core.restoreplan import InjectSegment
from .checksums import checksum, pseudo_header
from .rawdatagram import build_knock
from .syscalls import check, failing, libc

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_SO_MARK, _SO_ATTACH_FILTER, _IPV6_HDRINCL = 36, 26, 36
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
_ETH_P_ALL = 3  # what a host sends itself is shown to taps of all protocols only (net/core/dev.c dev_queue_xmit_nit)
_PACKET_OUTGOING = 4
_SKF_AD_OFF, _SKF_AD_PROTOCOL, _SKF_AD_PKTTYPE = 0xFFFFF000, 0, 4  # linux/filter.h


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
        packet = (build_knock(flow.peer, flow.local) if flow.protocol is Protocol.UDP else
                  build_segment(flow.peer, flow.local, sequence=0, acknowledgement=0, flags=0, window=0))
        with contextlib.suppress(OSError):  # EPERM is what a rule drops; without the knock the hold ends all the same
            self._socket.sendto(packet, (str(flow.local.address), 0))

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


class Sniffer:
    """Sees the segments of one flow that leave this host, from when it is made."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._newest: tuple[int, int] | None = None
        with failing("socket(AF_PACKET)"):
            # Protocol 0 first: nothing is received before the filter is in place.
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
            program = _filter(flow)
            buffer = ctypes.create_string_buffer(program)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                                    struct.pack("HL", len(program) // 8, ctypes.addressof(buffer)))
            self._socket.setblocking(False)
        # All interfaces: struct sockaddr_ll with index 0, which socket.bind of Python 3.11 cannot say.
        everywhere = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_ALL), 0, 0, 0, 0)
        check("bind(AF_PACKET)", libc.bind(self._socket.fileno(), everywhere, len(everywhere)))

    def next_tsecr(self, timeout_s: float) -> int | None:
        """TSecr of the newest segment that left; None if none left in time."""
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while (stamps := self.newest()) is None:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poller.poll(remaining * 1000):
                return None
        return stamps[1]

    def newest(self) -> tuple[int, int] | None:
        """(TSval, TSecr) of the newest segment that left since `drain`; None if none did."""
        while True:
            try:
                data = self._socket.recv(256)
            except BlockingIOError:
                return self._newest
            self._newest = _timestamps(data, self._flow.ip_version) or self._newest

    def drain(self) -> None:
        """Forget what left so far."""
        self._newest = None
        while True:
            try:
                self._socket.recv(1)
            except BlockingIOError:
                return

    def close(self) -> None:
        self._socket.close()


def _timestamps(packet: bytes, version: int) -> tuple[int, int] | None:
    """(TSval, TSecr) of a packet that the filter let by."""
    if headers(packet, version) is None:
        return None
    start = (packet[0] & 15) * 4 if version == 4 else 40
    options = packet[start + 20:start + (packet[start + 12] >> 4) * 4]
    while options and options[0] != 0:
        if options[0] == 1:
            options = options[1:]
            continue
        if len(options) < 2 or options[1] < 2:
            return None
        if options[0] == 8 and options[1] == 10 and len(options) >= 10:
            first, second = struct.unpack_from(">II", options, 2)
            return first, second
        options = options[options[1]:]
    return None


def _filter(flow: Flow) -> bytes:
    """Classic BPF over the network header: TCP from the flow's local end to its peer (linux/filter.h)."""
    load_word, load_half, load_byte = 0x20, 0x28, 0x30
    load_half_x, load_header_length, jump_equal, give = 0x48, 0xB1, 0x15, 0x06
    local, peer = flow.local, flow.peer
    tests: list[tuple[int, int, int]] = [
        (load_half, _SKF_AD_OFF + _SKF_AD_PROTOCOL, _ETH_P_IP if flow.ip_version == 4 else _ETH_P_IPV6),
        (load_byte, _SKF_AD_OFF + _SKF_AD_PKTTYPE, _PACKET_OUTGOING)]
    if flow.ip_version == 4:
        tests.append((load_byte, 9, socket.IPPROTO_TCP))
        places = ((12, local.address.packed), (16, peer.address.packed))
    else:
        tests.append((load_byte, 6, socket.IPPROTO_TCP))
        places = ((8, local.address.packed), (24, peer.address.packed))
    for offset, packed in places:
        tests += [(load_word, offset + at, int.from_bytes(packed[at:at + 4], "big")) for at in range(0, len(packed), 4)]
    instructions: list[tuple[int, int, int, int]] = []
    for load, offset, value in tests:
        instructions += [(load, 0, 0, offset), (jump_equal, 0, -1, value)]
    if flow.ip_version == 4:
        instructions.append((load_header_length, 0, 0, 0))  # X = 4 * (P[0] & 15)
    ports = (load_half_x, 0) if flow.ip_version == 4 else (load_half, 40)
    for at, value in ((0, local.port), (2, peer.port)):
        instructions += [(ports[0], 0, 0, ports[1] + at), (jump_equal, 0, -1, value)]
    instructions += [(give, 0, 0, 0x40000), (give, 0, 0, 0)]
    last = len(instructions) - 1
    return b"".join(struct.pack("HBBI", code, true, last - number - 1 if false == -1 else false, value)
                    for number, (code, true, false, value) in enumerate(instructions))

"""Packets of one connection, seen by packet sockets as they leave this host, or as they come.

What no interface tells is learnt so: the origin's socket is made to send one segment, and the TSecr in it is ts_recent
(RFC 7323 4.3). And whether packets of the connection would come to a destination at all: its origin sends some that no
peer sends, and the destination listens, before anything is stopped.
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time

from ..core.endpoint import Flow
from .rawpacket import headers, is_knock
from .syscalls import check, failing, libc

_SO_ATTACH_FILTER = 26
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
_ETH_P_ALL = 3  # what a host sends itself is shown to taps of all protocols only (net/core/dev.c dev_queue_xmit_nit)
_PACKET_HOST, _PACKET_OUTGOING = 0, 4
_SKF_AD_OFF, _SKF_AD_PROTOCOL, _SKF_AD_PKTTYPE = 0xFFFFF000, 0, 4  # linux/filter.h


def _tapping(program: bytes) -> socket.socket:
    """A socket to which the packets come that the filter lets by, on all interfaces, from their network headers on."""
    with failing("socket(AF_PACKET)"):
        # Protocol 0 first: nothing is received before the filter is in place.
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC, 0)
        buffer = ctypes.create_string_buffer(program)
        tap.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                       struct.pack("HL", len(program) // 8, ctypes.addressof(buffer)))
        tap.setblocking(False)
    # Struct sockaddr_ll with index 0, which socket.bind of Python 3.11 cannot say.
    everywhere = struct.pack("=HHiHBB8x", socket.AF_PACKET, socket.htons(_ETH_P_ALL), 0, 0, 0, 0)
    check("bind(AF_PACKET)", libc.bind(tap.fileno(), everywhere, len(everywhere)))
    return tap


class KnockListener:
    """Hears, from when it is made, what knocks at this host for one flow (rawpacket.py, `knock_at`)."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._socket = _tapping(_filter(flow, _PACKET_HOST))

    def hears(self, size: int, timeout_s: float) -> bool:
        """One of at least `size` bytes comes within the time."""
        deadline = time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            if poller.poll(left_s * 1000):
                packet = self._socket.recv(1 << 16)
                if len(packet) >= size and is_knock(packet, self._flow.protocol, self._flow.ip_version):
                    return True
        return False

    def close(self) -> None:
        self._socket.close()


class Sniffer:
    """Sees the segments of one flow that leave this host, from when it is made."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._newest: tuple[int, int] | None = None
        self._socket = _tapping(_filter(flow, _PACKET_OUTGOING))

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


def _filter(flow: Flow, kind: int) -> bytes:
    """Classic BPF over the network header (linux/filter.h): the flow's packets of this kind, which leave from its local
    end, or come from its peer."""
    load_word, load_half, load_byte = 0x20, 0x28, 0x30
    load_half_x, load_header_length, jump_equal, give = 0x48, 0xB1, 0x15, 0x06
    source, target = (flow.local, flow.peer) if kind == _PACKET_OUTGOING else (flow.peer, flow.local)
    tests: list[tuple[int, int, int]] = [
        (load_half, _SKF_AD_OFF + _SKF_AD_PROTOCOL, _ETH_P_IP if flow.ip_version == 4 else _ETH_P_IPV6),
        (load_byte, _SKF_AD_OFF + _SKF_AD_PKTTYPE, kind)]
    if flow.ip_version == 4:
        tests.append((load_byte, 9, flow.protocol))
        places = ((12, source.address.packed), (16, target.address.packed))
    else:
        tests.append((load_byte, 6, flow.protocol))
        places = ((8, source.address.packed), (24, target.address.packed))
    for offset, packed in places:
        tests += [(load_word, offset + at, int.from_bytes(packed[at:at + 4], "big")) for at in range(0, len(packed), 4)]
    instructions: list[tuple[int, int, int, int]] = []
    for load, offset, value in tests:
        instructions += [(load, 0, 0, offset), (jump_equal, 0, -1, value)]
    if flow.ip_version == 4:
        instructions.append((load_header_length, 0, 0, 0))  # X = 4 * (P[0] & 15)
    ports = (load_half_x, 0) if flow.ip_version == 4 else (load_half, 40)
    for at, value in ((0, source.port), (2, target.port)):
        instructions += [(ports[0], 0, 0, ports[1] + at), (jump_equal, 0, -1, value)]
    instructions += [(give, 0, 0, 0x40000), (give, 0, 0, 0)]
    last = len(instructions) - 1
    return b"".join(struct.pack("HBBI", code, true, last - number - 1 if false == -1 else false, value)
                    for number, (code, true, false, value) in enumerate(instructions))

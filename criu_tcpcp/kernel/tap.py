"""Packets of one connection, seen as they leave this host, by packet sockets.

What no interface tells is learnt so: the origin's socket is made to send one segment, and the TSecr in it is ts_recent
(RFC 7323 4.3).
"""

from __future__ import annotations

import ctypes
import select
import socket
import struct
import time

from ..core.endpoint import Flow
from .rawpacket import headers
from .syscalls import check, failing, libc

_SO_ATTACH_FILTER = 26
_ETH_P_IP, _ETH_P_IPV6 = 0x0800, 0x86DD
_ETH_P_ALL = 3  # what a host sends itself is shown to taps of all protocols only (net/core/dev.c dev_queue_xmit_nit)
_PACKET_OUTGOING = 4
_SKF_AD_OFF, _SKF_AD_PROTOCOL, _SKF_AD_PKTTYPE = 0xFFFFF000, 0, 4  # linux/filter.h


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

"""UDP datagrams and ICMP errors made by hand, as whole IP packets (RFC 768, 791, 792, 4443, 8200).

What they are for: a datagram that waits at the origin is handed to the destination's socket as the peer sent it; and
the old endpoint's program learns that its peer is not there any more, as any UDP program learns that.
"""

from __future__ import annotations

import socket
import struct

from ..core.endpoint import Endpoint, Flow
from .checksums import checksum, pseudo_header

_HEADER = 8
_LOOPBACK_MTU = 65536  # drivers/net/loopback.c; the kernel never cuts a raw packet
_FRAGMENT = 44
_HOPS = 64
_PORT_UNREACHABLE = {4: (3, 3), 6: (1, 4)}  # type and code


def build_datagram(source: Endpoint, destination: Endpoint, payload: bytes, *, hops: int = _HOPS,
                   traffic_class: int = 0) -> list[bytes]:
    """One UDP datagram as IP packets: two only where IPv6 needs them for it to pass over loopback."""
    length = _HEADER + len(payload)
    head, total = struct.pack(">HHH", source.port, destination.port, length), 0
    if source.address.version == 6:  # to IPv4 a checksum of 0 says that there is none
        pseudo = pseudo_header(source, destination, socket.IPPROTO_UDP, length)
        total = checksum(pseudo + head + b"\0\0" + payload) or 0xFFFF
    return _packets(source, destination, socket.IPPROTO_UDP, head + struct.pack(">H", total) + payload, hops,
                    traffic_class)


def build_knock(source: Endpoint, destination: Endpoint, size: int = 0) -> bytes:
    """A datagram that says it is shorter than its header: no socket takes it, and nobody answers (net/ipv4/udp.c,
    __udp4_lib_rcv: short_packet). `size`: of the whole packet, at least."""
    empty = (20 if source.address.version == 4 else 40) + _HEADER
    return _packets(source, destination, socket.IPPROTO_UDP, struct.pack(">HHHH", source.port, destination.port, 0, 0)
                    + bytes(max(_HEADER, size - empty)))[0]


def build_refusal(flow: Flow) -> bytes:
    """The peer's host says that nothing is at the peer's port, to a datagram of this end's."""
    quoted = _packets(flow.local, flow.peer, socket.IPPROTO_UDP,
                      struct.pack(">HHHH", flow.local.port, flow.peer.port, _HEADER, 0))[0]
    kind, code = _PORT_UNREACHABLE[flow.ip_version]
    body = struct.pack(">BBHI", kind, code, 0, 0) + quoted
    protocol = socket.IPPROTO_ICMP if flow.ip_version == 4 else socket.IPPROTO_ICMPV6
    pseudo = b"" if flow.ip_version == 4 else pseudo_header(flow.peer, flow.local, protocol, len(body))
    body = body[:2] + struct.pack(">H", checksum(pseudo + body)) + body[4:]
    return _packets(flow.peer, flow.local, protocol, body)[0]


def _packets(source: Endpoint, destination: Endpoint, protocol: int, body: bytes, hops: int = _HOPS,
             traffic_class: int = 0) -> list[bytes]:
    pair = source.address.packed + destination.address.packed
    if source.address.version == 4:  # the kernel fills in the header's checksum and, where it is 0, the identification
        return [struct.pack(">BBHHHBBH", 0x45, traffic_class, 20 + len(body), 0, 0x4000, hops, protocol, 0)
                + pair + body]
    first_word = 6 << 28 | traffic_class << 20
    if 40 + len(body) <= _LOOPBACK_MTU:
        return [struct.pack(">IHBB", first_word, len(body), protocol, hops) + pair + body]
    half = len(body) // 2 & ~7
    return [struct.pack(">IHBB", first_word, 8 + len(part), _FRAGMENT, hops) + pair
            + struct.pack(">BBHI", protocol, 0, offset | more, source.port << 16 | destination.port) + part
            for offset, part, more in ((0, body[:half], 1), (half, body[half:], 0))]

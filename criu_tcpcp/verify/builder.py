"""Packets -> the bytes of a capture file: the inverse of `capture.parse`, for captures made up in tests.

A `Packet` says nearly everything that is written; checksums are left 0 (no reader here looks at them).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from .packet import Options, Packet

_MAC = b"\x02\0\0\0\0\xfe"


def options(value: Options) -> bytes:
    """TCP options in Linux's order (net/ipv4/tcp_output.c, tcp_options_write), padded with NOP to a multiple of 4."""
    out = b""
    if value.mss is not None:
        out += struct.pack("!BBH", 2, 4, value.mss)
    if value.sack_permitted:
        out += b"\x04\x02" if value.tsval is not None else b"\1\1\x04\x02"
    if value.tsval is not None:
        out += (b"" if value.sack_permitted else b"\1\1") + struct.pack("!BBII", 8, 10, value.tsval, value.tsecr or 0)
    if value.window_scale is not None:
        out += struct.pack("!BBBB", 1, 3, 3, value.window_scale)
    if value.sack:
        out += struct.pack("!BBBB", 1, 1, 5, 2 + 8 * len(value.sack))
        out += b"".join(struct.pack("!II", left, right) for left, right in value.sack)
    return out + b"\1" * (-len(out) % 4)


def segment(packet: Packet) -> bytes:
    """The TCP header and the captured payload."""
    extra = options(packet.options)
    word = (5 + len(extra) // 4) << 12 | packet.flags
    return struct.pack("!HHIIHHHH", packet.src.port, packet.dst.port, packet.seq, packet.ack, word, packet.window,
                       0, 0) + extra + packet.payload


def datagram(packet: Packet, protocol: int = 6, body: bytes | None = None) -> bytes:
    """The IP packet around the segment, or around `body` (an ICMP message). Lengths are the real ones, also where the
    captured payload is shorter."""
    inner = segment(packet) if body is None else body
    length = len(inner) + (packet.payload_len - len(packet.payload) if body is None else 0)
    src, dst = packet.src.address.packed, packet.dst.address.packed
    if packet.ip_version == 6:
        return struct.pack("!IHBB", 6 << 28 | packet.tos << 20, length, protocol, packet.ttl) + src + dst + inner
    fragment = (0x4000 if packet.df else 0) | (0x2000 if packet.fragment else 0)
    return struct.pack("!BBHHHBBH", 0x45, packet.tos, 20 + length, packet.number & 0xFFFF, fragment, packet.ttl,
                       protocol, 0) + src + dst + inner


def ethernet(packet: Packet, inner: bytes | None = None) -> bytes:
    kind = 0x0800 if packet.ip_version == 4 else 0x86DD
    body = datagram(packet) if inner is None else inner
    return _MAC + (packet.ether_src or bytes(6)) + kind.to_bytes(2, "big") + body


def icmp(packet: Packet, kind: int = 3, code: int = 1) -> bytes:
    """An Ethernet frame with an ICMP error (ICMPv6 likewise) about `packet`, sent to where it came from."""
    quoted = datagram(packet)[:60 if packet.ip_version == 6 else 28]
    body = struct.pack("!BBHI", kind, code, 0, 0) + quoted
    return ethernet(packet, datagram(packet, 1 if packet.ip_version == 4 else 58, body))


def pcap(records: Iterable[tuple[int, bytes, int]], *, link_type: int = 1, order: str = "<",
         nanoseconds: bool = True) -> bytes:
    """A pcap file of (time_ns, captured bytes, length on the wire)."""
    magic, unit = (0xA1B23C4D, 1) if nanoseconds else (0xA1B2C3D4, 1000)
    out = [struct.pack(order + "IHHiIII", magic, 2, 4, 0, 0, 262144, link_type)]
    for time_ns, data, wire_len in records:
        out.append(struct.pack(order + "IIII", time_ns // 10**9, time_ns % 10**9 // unit, len(data), wire_len))
        out.append(data)
    return b"".join(out)


def pcapng(records: Iterable[tuple[int, bytes, int]], *, link_types: tuple[int, ...] = (1,), order: str = "<",
           resolution: int = 9) -> bytes:
    """A pcapng file, one interface for each link type; frames go to the interfaces in turn. `resolution` is
    if_tsresol: 9 for nanoseconds, 6 for microseconds, 0x80 | n for 2^-n."""
    out = [_block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order)]
    for link_type in link_types:
        body = struct.pack(order + "HHIHHB3xHH", link_type, 0, 262144, 9, 1, resolution, 0, 0)
        out.append(_block(1, body, order))
    units = 2 ** (resolution & 127) if resolution & 128 else 10 ** resolution
    for index, (time_ns, data, wire_len) in enumerate(records):
        ticks = time_ns * units // 10**9
        head = struct.pack(order + "IIIII", index % len(link_types), ticks >> 32, ticks & 0xFFFFFFFF, len(data),
                           wire_len)
        out.append(_block(6, head + data + bytes(-len(data) % 4), order))
    return b"".join(out)


def _block(kind: int, body: bytes, order: str) -> bytes:
    length = struct.pack(order + "I", len(body) + 12)
    return struct.pack(order + "I", kind) + length + body + length


def frames_of(packets: Iterable[Packet]) -> list[tuple[int, bytes, int]]:
    """Records for `pcap` and `pcapng`: Ethernet frames, cut where the payload was cut."""
    out = []
    for packet in packets:
        data = ethernet(packet)
        out.append((packet.time_ns, data, len(data) + packet.payload_len - len(packet.payload)))
    return out

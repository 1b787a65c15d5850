"""Packets as bytes: what `verify.builder` writes, with checksums; what `verify.decode` reads, with theirs looked at."""

from __future__ import annotations

import socket
import struct

from criu_tcpcp.verify import builder
from criu_tcpcp.verify.container import Frame
from criu_tcpcp.verify.decode import Skipped, decode
from criu_tcpcp.verify.packet import IcmpError, Packet

_RAW = 101  # a capture's link type: the IP header comes first
_TCP_CHECKSUM, _IP_CHECKSUM = 16, 10


def words_sum(data: bytes | bytearray) -> int:
    """The one's complement sum of RFC 1071, 0..0xFFFE: that is arithmetic modulo 2^16 - 1, of the whole number at once.
    A sum of 0 and one of 0xFFFF are the same here."""
    return int.from_bytes(data + b"\0" if len(data) % 2 else data, "big") % 0xFFFF


def pseudo_header(source: bytes, destination: bytes, length: int, protocol: int) -> bytes:
    """RFC 9293 3.1, RFC 8200 8.1."""
    if len(source) == 4:
        return source + destination + struct.pack(">BBH", 0, protocol, length)
    return source + destination + struct.pack(">IHBB", length, 0, 0, protocol)


def to_bytes(packet: Packet) -> bytes:
    """The whole IP packet."""
    data = bytearray(builder.datagram(packet))
    header = 20 if packet.ip_version == 4 else 40
    if packet.ip_version == 4:
        struct.pack_into(">H", data, _IP_CHECKSUM, 0xFFFF - words_sum(data[:20]))
    length = len(data) - header
    pseudo = pseudo_header(packet.src.address.packed, packet.dst.address.packed, length, socket.IPPROTO_TCP)
    struct.pack_into(">H", data, header + _TCP_CHECKSUM, 0xFFFF - words_sum(pseudo + data[header:]))
    return bytes(data)


def from_bytes(data: bytes, number: int, time_ns: int) -> Packet | IcmpError | Skipped:
    """One IP packet, as it came."""
    return decode(Frame(number, time_ns, _RAW, data, len(data)), "peer")


def wrong_checksum(data: bytes) -> str | None:
    """What is wrong about the checksums of a whole TCP packet that could be decoded; None if nothing is.

    Where the sender's network card is to fill them in, and there is none (veth), they are wrong: see
    `packets.without_offload`."""
    if data[0] >> 4 == 4:
        header, end = (data[0] & 15) * 4, int.from_bytes(data[2:4], "big")
        if words_sum(data[:header]):
            return "the IP header's checksum is wrong"
        source, destination = data[12:16], data[16:20]
    else:
        header, end = 40, 40 + int.from_bytes(data[4:6], "big")
        source, destination = data[8:24], data[24:40]
    segment = data[header:end]
    if words_sum(pseudo_header(source, destination, len(segment), socket.IPPROTO_TCP) + segment):
        return "the TCP checksum is wrong"
    return None

"""The checksum of IP and of what it carries (RFC 1071), for packets that are made by hand."""

from __future__ import annotations

import struct

from ..core.endpoint import Endpoint


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo_header(source: Endpoint, destination: Endpoint, protocol: int, length: int) -> bytes:
    """What a checksum covers beside what follows the IP header (RFC 9293 3.1, RFC 8200 8.1)."""
    pair = source.address.packed + destination.address.packed
    if source.address.version == 4:
        return pair + struct.pack(">BBH", 0, protocol, length)
    return pair + struct.pack(">IHBB", length, 0, 0, protocol)

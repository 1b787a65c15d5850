"""Whole IP packets of one connection: which they are, and several in one stretch of bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from .endpoint import Flow, Protocol
from .errors import ProtocolError

_HEADER = {4: 20, 6: 40}


def split(data: bytes, version: int) -> Iterator[bytes]:
    """The packets that lie behind each other in `data`, each as long as its header says (RFC 791 3.1, RFC 8200 3).
    ProtocolError where that does not add up."""
    position = 0
    while position < len(data):
        head = data[position:position + _HEADER[version]]
        if len(head) < _HEADER[version] or head[0] >> 4 != version:
            raise ProtocolError("what is no packet of the connection's IP version, among packets")
        size = int.from_bytes(head[2:4], "big") if version == 4 else 40 + int.from_bytes(head[4:6], "big")
        if not len(head) <= size <= len(data) - position:
            raise ProtocolError("a packet that is longer, or shorter, than it says")
        yield data[position:position + size]
        position += size


@dataclass(frozen=True)
class Sieve:
    """Tells the connection's packets from others: by its addresses, its protocol and its ports; a fragment that names
    no ports, and what has headers of IPv6 in between, is none."""

    version: int
    protocol: int
    outgoing: bytes  # addresses, as the headers have them
    incoming: bytes
    outgoing_ports: bytes
    incoming_ports: bytes

    @classmethod
    def of(cls, flow: Flow) -> Sieve:
        here, there = flow.plain.local, flow.plain.peer
        return cls(flow.ip_version, int(Protocol.TCP), here.address.packed + there.address.packed,
                   there.address.packed + here.address.packed, struct.pack(">HH", here.port, there.port),
                   struct.pack(">HH", there.port, here.port))

    def leaves(self, packet: bytes) -> bool | None:
        """True for one that the local end has sent, False for one of the peer's, None for what is neither."""
        if len(packet) < _HEADER[self.version] or packet[0] >> 4 != self.version:
            return None
        if self.version == 4:
            begin, addresses, protocol = (packet[0] & 15) * 4, packet[12:20], packet[9]
            if int.from_bytes(packet[6:8], "big") & 0x1FFF:
                return None
        else:
            begin, addresses, protocol = 40, packet[8:40], packet[6]
        ports = packet[begin:begin + 4]
        if protocol != self.protocol:
            return None
        if addresses == self.outgoing and ports == self.outgoing_ports:
            return True
        if addresses == self.incoming and ports == self.incoming_ports:
            return False
        return None

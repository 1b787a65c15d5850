"""Addresses of a connection: `Endpoint` (one end) and `Flow` (both ends, seen from the host that is passed).

A *flow* is named from the side that moves: `local` is the origin's or destination's end, `peer` the far end. The
family of the packets and the family of the socket differ for a v4-mapped socket (an AF_INET6 socket that speaks IPv4,
RFC 4291 2.5.5.2): `Flow.ip_version` is the packets', `Flow.socket_family` the socket's. A connected UDP socket
is a connection, too.
"""

from __future__ import annotations

import enum
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any, Self

from .errors import ProtocolError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class Protocol(enum.IntEnum):
    """By the number that packets carry it under (linux/in.h)."""

    TCP = socket.IPPROTO_TCP
    UDP = socket.IPPROTO_UDP

    @property
    def socket_type(self) -> int:
        return socket.SOCK_STREAM if self is Protocol.TCP else socket.SOCK_DGRAM

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, order=True)
class Endpoint:
    """One end of a connection: the address as packets carry it (never v4-mapped) and the port, 1..65535."""

    address: IPAddress
    port: int

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ValueError(f"port {self.port} is outside 1..65535")
        if isinstance(self.address, ipaddress.IPv6Address):
            if self.address.ipv4_mapped is not None:
                raise ValueError(f"{self.address} is v4-mapped; an endpoint holds the IPv4 address itself")
            if self.address.scope_id is not None:
                raise ValueError(f"{str(self.address)[:80]!r} names an interface, which has a meaning on one host only")

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Inverse of `str`. Raises ValueError for anything else."""
        address, colon, port = text.rpartition(":")
        bracketed = address.startswith("[") and address.endswith("]")
        if not colon or not (port.isascii() and port.isdigit()) or len(port) > 5 or bracketed != (":" in address):
            raise ValueError(f"{text[:80]!r} is not ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
        return cls(ipaddress.ip_address(address.strip("[]")), int(port))


@dataclass(frozen=True)
class Flow:
    """Both ends of a connection. `mapped`: the socket is AF_INET6 though the packets are IPv4.
    `scope_id`: interface index of a link-local peer (IPv6), else 0."""

    local: Endpoint
    peer: Endpoint
    mapped: bool = False
    scope_id: int = 0
    protocol: Protocol = Protocol.TCP

    def __post_init__(self) -> None:
        if self.local.address.version != self.peer.address.version:
            raise ValueError(f"{self.local} and {self.peer} are of different families")
        if self.mapped and self.ip_version != 4:
            raise ValueError("only an IPv4 flow can be v4-mapped")
        if not 0 <= self.scope_id < 1 << 32:
            raise ValueError(f"{str(self.scope_id)[:20]} is not the index of an interface")

    @property
    def ip_version(self) -> int:
        return self.local.address.version

    @property
    def socket_family(self) -> int:
        return socket.AF_INET6 if self.mapped or self.ip_version == 6 else socket.AF_INET

    @property
    def plain(self) -> Flow:
        """As packets show it, and so the rules: without what only its socket knows."""
        return Flow(self.local, self.peer, protocol=self.protocol)

    def __str__(self) -> str:
        prefix = "" if self.protocol is Protocol.TCP else f"{self.protocol.label} "
        return f"{prefix}{self.local} <-> {self.peer}"

    def to_json(self) -> dict[str, Any]:
        """TCP is not said: so it reads as what was written before there was anything else."""
        said = {"local": [str(self.local.address), self.local.port], "peer": [str(self.peer.address), self.peer.port],
                "mapped": self.mapped, "scope_id": self.scope_id}
        return said if self.protocol is Protocol.TCP else {**said, "protocol": self.protocol.label}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Inverse of `to_json`; raises ProtocolError for anything else, since it reads what another host wrote."""
        try:
            (local, local_port), (peer, peer_port) = value["local"], value["peer"]
            mapped, scope_id = value["mapped"], value["scope_id"]
            protocol = _SAID[value["protocol"]] if "protocol" in value else Protocol.TCP
            if set(value) - {"protocol"} != {"local", "peer", "mapped", "scope_id"} or not isinstance(mapped, bool):
                raise ValueError("unknown or missing fields")
            if not all(type(number) is int for number in (local_port, peer_port, scope_id)):
                raise ValueError("a port is not a number")
            return cls(Endpoint(ipaddress.ip_address(str(local)), local_port),
                       Endpoint(ipaddress.ip_address(str(peer)), peer_port), mapped, scope_id, protocol)
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"not a flow: {error}") from None

    @classmethod
    def of_socket(cls, sock: socket.socket) -> Self:
        """The flow of a connected socket."""
        protocol = Protocol.UDP if sock.type == socket.SOCK_DGRAM else Protocol.TCP
        return cls.from_names(sock.getsockname(), sock.getpeername(), protocol)

    @classmethod
    def from_names(cls, local: tuple[Any, ...], peer: tuple[Any, ...], protocol: Protocol = Protocol.TCP) -> Self:
        """From what getsockname() and getpeername() return. Raises ValueError for a port 0 (not bound)."""
        addresses = [ipaddress.ip_address(str(name[0]).split("%")[0]) for name in (local, peer)]
        plain: list[IPAddress] = []
        mapped = False
        for address in addresses:
            inner = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
            mapped = mapped or inner is not None
            plain.append(inner if inner is not None else address)
        scope_id = int(peer[3]) if len(peer) == 4 else 0
        return cls(Endpoint(plain[0], local[1]), Endpoint(plain[1], peer[1]), mapped, scope_id, protocol)


_SAID = {protocol.label: protocol for protocol in Protocol if protocol is not Protocol.TCP}

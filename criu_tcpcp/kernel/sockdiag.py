"""Is there a socket of exactly this connection in this network namespace, and who listens? (sock_diag(7),
linux/inet_diag.h)

pyroute2's DiagSocket lists sockets; this asks for one, in some 30 us, and touches nothing.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.endpoint import Endpoint, Flow, IPAddress
from ..core.errors import KernelError
from ..core.tcp import TcpState
from . import netlink
from .syscalls import failing

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_MSG_ERROR, _MSG_DONE = 2, 3
_NO_COOKIE = 0xFFFFFFFF
_MESSAGE_BYTES = 72  # struct inet_diag_msg
_ATTR_SKV6ONLY = 11  # INET_DIAG_SKV6ONLY


@dataclass(frozen=True)
class Entry:
    """A connection's socket. `inode` is 0 while no program has it: it waits for accept, or its program has closed it.
    `unacknowledged`: bytes in its send queue; `cookie` as of SO_COOKIE."""

    state: TcpState
    inode: int
    unacknowledged: int
    cookie: int


@dataclass(frozen=True)
class Listener:
    """A listening TCP socket. `waiting` connections are in its accept queue, which holds `backlog` + 1."""

    address: IPAddress
    port: int
    socket_family: int
    only_ipv6: bool
    inode: int
    waiting: int
    backlog: int

    @property
    def is_full(self) -> bool:
        return self.waiting > self.backlog

    @property
    def plain_address(self) -> IPAddress:
        """As packets carry it."""
        mapped = self.address.ipv4_mapped if isinstance(self.address, ipaddress.IPv6Address) else None
        return mapped or self.address

    def takes(self, ip_version: int) -> bool:
        """Connections of this IP version can come to it."""
        if self.plain_address.is_unspecified and self.socket_family == socket.AF_INET6:
            return ip_version == 6 or not self.only_ipv6
        return self.plain_address.version == ip_version

    def __str__(self) -> str:
        return str(Endpoint(self.plain_address, self.port))


def state_of(flow: Flow) -> TcpState | None:
    """The state of the socket that has this flow, TIME_WAIT included; None where there is none."""
    entry = entry_of(flow)
    return entry.state if entry is not None else None


def entry_of(flow: Flow) -> Entry | None:
    """The socket that has this flow, TIME_WAIT included; None where there is none. The kernel falls back to a listener
    of the port, which does not count."""
    family = socket.AF_INET if flow.ip_version == 4 else socket.AF_INET6
    identity = struct.pack(">HH", flow.local.port, flow.peer.port) + _address(flow.local) + _address(flow.peer)
    request = (struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF) + identity
               + struct.pack("=III", flow.scope_id, _NO_COOKIE, _NO_COOKIE))
    for body in _ask(request, 0):
        state = TcpState(body[1])
        cookie, = struct.unpack_from("=Q", body, 44)
        outgoing, _uid, inode = struct.unpack_from("=III", body, 60)
        return None if state is TcpState.LISTEN else Entry(state, inode, outgoing, cookie)
    return None


def listeners() -> list[Listener]:
    """Every listening TCP socket of the calling thread's network namespace."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 1 << TcpState.LISTEN) + bytes(48)
        for body in _ask(request, netlink.F_DUMP):
            port = struct.unpack_from(">H", body, 4)[0]
            packed = bytes(body[8:12] if body[0] == socket.AF_INET else body[8:24])
            waiting, backlog, _uid, inode = struct.unpack_from("=IIII", body, 56)
            only_ipv6 = any(kind == _ATTR_SKV6ONLY and value[0] for kind, value
                            in netlink.attributes(body[_MESSAGE_BYTES:]))
            found.append(Listener(ipaddress.ip_address(packed), port, body[0], only_ipv6, inode, waiting, backlog))
    return found


def _ask(request: bytes, flags: int) -> Iterator[memoryview]:
    """The answers, each a struct inet_diag_msg and its attributes."""
    head = netlink.HEADER.pack(netlink.HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, netlink.F_REQUEST | flags, 1,
                               0)
    with failing("sock_diag"), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC,
                                             _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(5)
        diag.send(head + request)
        while True:
            for kind, _sequence, body in netlink.messages(diag.recv(1 << 16)):
                if kind == _MSG_DONE:
                    return
                if kind == _MSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    if number == errno.ENOENT:
                        return
                    raise KernelError("sock_diag", number, "look for a connection")
                yield body
            if not flags:
                return


def _address(end: Endpoint) -> bytes:
    return end.address.packed.ljust(16, b"\0")

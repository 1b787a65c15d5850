"""What TCP and UDP sockets are in this network namespace: that of exactly this connection, those that listen, all of
them (sock_diag(7), linux/inet_diag.h).

One is asked for in some 30 us, and ten thousand are told of in 0.1 s; nothing is touched. (pyroute2's DiagSocket takes
a hundred times as long for many.)
"""

from __future__ import annotations

import errno
import ipaddress
import itertools
import socket
import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass

from ..core import tcp
from ..core.endpoint import Endpoint, Flow, IPAddress, Protocol
from ..core.errors import KernelError
from ..core.tcp import TcpState
from . import netlink
from .syscalls import failing

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_BOUND_INACTIVE = 13  # TCP_BOUND_INACTIVE, net/tcp_states.h; sock_diag only
_MSG_ERROR, _MSG_DONE = 2, 3
_NO_COOKIE = 0xFFFFFFFF
_MESSAGE_BYTES = 72  # struct inet_diag_msg
_ATTR_INFO, _ATTR_SKV6ONLY, _ATTR_MD5SIG, _ATTR_ULP_INFO = 2, 11, 18, 19  # INET_DIAG_*
_ULP_NAME = 1  # INET_ULP_INFO_NAME
_INFO_OPTIONS = 5  # struct tcp_info, tcpi_options
_HEAD = struct.Struct("=BB2xHH16s16sIQIIIII")  # struct inet_diag_msg; ports and addresses are the network's
_INODE, _INODE_AT = struct.Struct("=I"), 68
_ATTRIBUTE = struct.Struct("=HH")
_MAPPED = bytes(10) + b"\xff\xff"  # of an IPv4 address in an IPv6 socket
_UNOWNED = (1 << TcpState.TIME_WAIT) | (1 << TcpState.NEW_SYN_RECV)


@dataclass(frozen=True)
class Entry:
    """A connection's socket. `inode` is 0 while no program has it: it waits for accept, or its program has closed it.
    `unread`, `unacknowledged`: bytes in its queues (the peer's FIN counts as one); `cookie` as of SO_COOKIE.
    `is_signed`: it has keys for TCP-MD5, as far as one with CAP_NET_ADMIN asks."""

    state: TcpState
    inode: int
    unacknowledged: int
    cookie: int
    unread: int
    is_signed: bool = False


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


@dataclass(frozen=True)
class Known:
    """What the kernel tells of a program's socket. `state`: a UDP socket is ESTABLISHED or CLOSE. `flow`: None where it
    has no peer; `unread` bytes without the peer's FIN, `unacknowledged` without ours, both of UDP by their memory;
    `options` as tcpi_options; `upper`: the protocol that runs inside the kernel on top of it, or ''; `is_signed`: it
    has keys for TCP-MD5."""

    protocol: Protocol
    state: TcpState
    inode: int
    cookie: int
    flow: Flow | None
    unread: int
    unacknowledged: int
    options: int
    upper: str
    is_signed: bool


def known(wanted: Container[int]) -> dict[int, Known]:
    """Of these inodes, the TCP sockets in the calling thread's network namespace that are connected or listen, and the
    UDP sockets."""
    found = {}
    addresses: dict[bytes, IPAddress] = {}
    for protocol, family in itertools.product(Protocol, (socket.AF_INET, socket.AF_INET6)):
        request = struct.pack("=BBBBI", family, protocol, 1 << (_ATTR_INFO - 1), 0, 0xFFFFFFFF & ~_UNOWNED) + bytes(48)
        for body in _ask(request, netlink.F_DUMP):
            inode, = _INODE.unpack_from(body, _INODE_AT)
            if inode in wanted:
                found[inode] = _known(protocol, body, addresses)
    return found


def _known(protocol: Protocol, body: memoryview, addresses: dict[bytes, IPAddress]) -> Known:
    """`addresses`: those that were made already; one of them is rarely alone."""
    (family, state, local_port, peer_port, local, peer, interface, cookie, _expires, unread, outgoing, _uid,
     inode) = _HEAD.unpack_from(body)
    options, upper, is_signed, position, end = 0, "", False, _MESSAGE_BYTES, len(body)
    while position + _ATTRIBUTE.size <= end:  # as netlink.attributes, which is too slow for thousands
        length, kind = _ATTRIBUTE.unpack_from(body, position)
        if length < _ATTRIBUTE.size or position + length > end:
            break
        if kind == _ATTR_INFO:
            options = body[position + _ATTRIBUTE.size + _INFO_OPTIONS]
        elif kind == _ATTR_MD5SIG:
            is_signed = True
        elif kind & netlink.TYPE_MASK == _ATTR_ULP_INFO:
            upper = next((bytes(name).rstrip(b"\0").decode("ascii", "replace") for inner, name
                          in netlink.attributes(body[position + _ATTRIBUTE.size:position + length])
                          if inner == _ULP_NAME), "")
        position += (length + 3) & ~3
    if state == TcpState.LISTEN or not peer_port:
        return Known(protocol, TcpState(state), inode, cookie, None, 0, 0, options, upper, is_signed)
    ends, mapped = [], False
    for packed, port in ((local, local_port), (peer, peer_port)):
        mapped = mapped or (family == socket.AF_INET6 and packed.startswith(_MAPPED))
        address = addresses.get(packed)
        if address is None:
            plain = packed[:4] if family == socket.AF_INET else packed[12:] if mapped else packed
            address = addresses[packed] = ipaddress.ip_address(plain)
        ends.append(Endpoint(address, socket.ntohs(port)))
    scope = interface if interface and ends[1].address.is_link_local and ends[1].address.version == 6 else 0
    has_fin = state in tcp.FIN_RECEIVED_STATES and unread > 0
    has_sent_fin = state in tcp.FIN_QUEUED_STATES and outgoing > 0
    return Known(protocol, TcpState(state), inode, cookie, Flow(ends[0], ends[1], mapped, scope, protocol),
                 unread - has_fin, outgoing - has_sent_fin, options, upper, is_signed)


def state_of(flow: Flow) -> TcpState | None:
    """The state of the socket that has this flow, TIME_WAIT included; None where there is none."""
    entry = entry_of(flow)
    return entry.state if entry is not None else None


def entry_of(flow: Flow) -> Entry | None:
    """The socket that has this flow, TIME_WAIT included; None where there is none. The kernel falls back to one that
    waits at the port for anybody, which does not count."""
    family = socket.AF_INET if flow.ip_version == 4 else socket.AF_INET6
    # Of UDP the two ends stand the other way round (net/ipv4/udp_diag.c, udp_dump_one).
    ends = (flow.local, flow.peer) if flow.protocol is Protocol.TCP else (flow.peer, flow.local)
    identity = struct.pack(">HH", *(end.port for end in ends)) + b"".join(map(_address, ends))
    # The keys are told only to who asks for struct tcp_info (net/ipv4/inet_diag.c, inet_sk_diag_fill).
    request = (struct.pack("=BBBBI", family, flow.protocol, 1 << (_ATTR_INFO - 1), 0, 0xFFFFFFFF) + identity
               + struct.pack("=III", flow.scope_id, _NO_COOKIE, _NO_COOKIE))
    for body in _ask(request, 0):
        state = TcpState(body[1])
        if struct.unpack_from(">HH", body, 4) != (flow.local.port, flow.peer.port):
            return None
        cookie, = struct.unpack_from("=Q", body, 44)
        unread, outgoing, _uid, inode = struct.unpack_from("=IIII", body, 56)
        if state is TcpState.LISTEN:
            return None
        is_signed = any(kind == _ATTR_MD5SIG for kind, _value in netlink.attributes(body[_MESSAGE_BYTES:]))
        return Entry(state, inode, outgoing, cookie, unread, is_signed)
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


@dataclass(frozen=True)
class Use:
    """A socket that is bound to a local address: `peer` is None where it waits for anybody."""

    protocol: Protocol
    local: Endpoint
    peer: Endpoint | None
    inode: int

    def __str__(self) -> str:
        if self.peer is not None:
            return str(Flow(self.local, self.peer, protocol=self.protocol))
        return f"{self.local} ({'a listener' if self.protocol is Protocol.TCP else 'of UDP'})"


def uses_of(address: IPAddress) -> list[Use]:
    """The sockets in the calling thread's network namespace that live by this local address, those without a program
    too; what only waits for its end (TIME-WAIT) does not, and neither does what is bound and neither listens nor is
    connected, as a descriptor whose connection was passed away (since Linux 6.8 the kernel lists those too)."""
    found = []
    states = 0xFFFFFFFF & ~(1 << TcpState.TIME_WAIT) & ~(1 << _BOUND_INACTIVE)
    for protocol, family in itertools.product(Protocol, (socket.AF_INET, socket.AF_INET6)):
        request = struct.pack("=BBBBI", family, protocol, 0, 0, states) + bytes(48)
        for body in _ask(request, netlink.F_DUMP):
            _family, _state, local_port, peer_port, local, peer, *_others, inode = _HEAD.unpack_from(body)
            if local_port and _plain(family, local) == address.packed:
                end = Endpoint(address, socket.ntohs(local_port))
                other = ipaddress.ip_address(_plain(family, peer)) if peer_port else None
                found.append(Use(protocol, end, Endpoint(other, socket.ntohs(peer_port)) if other else None, inode))
    return found


def _plain(family: int, packed: bytes) -> bytes:
    """As packets carry it."""
    if family == socket.AF_INET:
        return packed[:4]
    return packed[12:] if packed.startswith(_MAPPED) else packed


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

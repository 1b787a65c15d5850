"""The table of socket options that a passed connection keeps: one row an option, and nothing else in the code knows
one.

A row says how the option is read (level, number, form), when it is written at the destination, which field of CRIU
3.17's images holds it, and what happens where the destination cannot set it. Options without such a field travel beside
the images, by name. An option that has the wanted value already is not written, since some have effects beyond their
value. Not carried, because they are states of the moment and not settings: TCP_QUICKACK, SO_ERROR, SO_INCOMING_CPU.
"""

from __future__ import annotations

import enum
import socket
from dataclasses import dataclass

from .endpoint import Protocol

#: What an option's value looks like in a state: a number, a pair (seconds, microseconds; on, seconds), or a name.
OptionValue = int | tuple[int, int] | str


class Form(enum.Enum):
    """How the kernel hands the value over."""

    INT = enum.auto()
    TIMEVAL = enum.auto()  # struct __kernel_sock_timeval of two longs
    LINGER = enum.auto()  # struct linger of two ints
    TEXT = enum.auto()  # zero-terminated name


class When(enum.IntEnum):
    """The point of the restore at which the option is written."""

    BEFORE_BIND = 1
    CONNECTED = 2  # in repair: nothing that it triggers leaves the host
    ALIVE = 3  # after the last repair-off, before the unsent bytes: it says how they are sent
    RUNNING = 4  # after both: the repair-off clears or overrides it


class Missing(enum.Enum):
    """What to do where the destination's kernel refuses the value."""

    REFUSE = "refuse"  # the connection would behave differently: the pass is undone
    REPORT = "report"  # harmless: the report names it


@dataclass(frozen=True)
class Option:
    """`again`: the point at which it is written once more, since others change it in between. `write_number` and
    `write_halved`: set by another number, and with half the value (the kernel doubles it)."""

    name: str
    level: int
    number: int
    when: When
    form: Form = Form.INT
    criu: str | None = None
    missing: Missing = Missing.REFUSE
    ip_version: int | None = None
    again: When | None = None
    write_number: int | None = None
    write_halved: bool = False

    def is_of(self, protocol: Protocol) -> bool:
        """A socket of this protocol has it."""
        return self.level not in _OWN_LEVELS or self.level == protocol


_SOCKET, _TCP, _IP, _IP6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
_UDP = socket.IPPROTO_UDP
_OWN_LEVELS = frozenset({_TCP, _UDP})
_EARLY, _LATE, _RUNNING = When.BEFORE_BIND, When.CONNECTED, When.RUNNING

# Numbers: asm-generic/socket.h, linux/tcp.h, linux/in.h, linux/in6.h. The order is that of writing.
TABLE: tuple[Option, ...] = (
    Option("SO_BINDTODEVICE", _SOCKET, 25, _EARLY, Form.TEXT, criu="ifname"),
    Option("IP_FREEBIND", _IP, 15, _EARLY, criu="ip_opts.freebind"),
    Option("SO_MARK", _SOCKET, 36, _LATE, criu="opts.so_mark"),
    Option("SO_DONTROUTE", _SOCKET, 5, _LATE, criu="opts.so_dontroute"),
    Option("SO_RCVLOWAT", _SOCKET, 18, _RUNNING, criu="opts.so_rcvlowat"),
    Option("SO_RCVTIMEO", _SOCKET, 20, _LATE, Form.TIMEVAL, criu="opts.so_rcv_tmo"),
    Option("SO_SNDTIMEO", _SOCKET, 21, _LATE, Form.TIMEVAL, criu="opts.so_snd_tmo"),
    Option("SO_LINGER", _SOCKET, 13, _LATE, Form.LINGER, criu="opts.so_linger"),
    Option("SO_OOBINLINE", _SOCKET, 10, _LATE, criu="opts.so_oobinline"),
    Option("SO_KEEPALIVE", _SOCKET, 9, _LATE, criu="opts.so_keepalive"),
    Option("TCP_KEEPIDLE", _TCP, 4, _LATE, criu="opts.tcp_keepidle"),
    Option("TCP_KEEPINTVL", _TCP, 5, _LATE, criu="opts.tcp_keepintvl"),
    Option("TCP_KEEPCNT", _TCP, 6, _LATE, criu="opts.tcp_keepcnt"),
    Option("SO_REUSEPORT", _SOCKET, 15, _LATE, criu="opts.so_reuseport"),
    Option("SO_TIMESTAMP", _SOCKET, 29, _LATE, missing=Missing.REPORT),
    Option("SO_TIMESTAMPNS", _SOCKET, 35, _LATE, missing=Missing.REPORT),
    Option("SO_MAX_PACING_RATE", _SOCKET, 47, _LATE, missing=Missing.REPORT),
    Option("TCP_CONGESTION", _TCP, 13, _LATE, Form.TEXT),
    # A tail that the program holds back is not pushed out: not by being written before the cork is in, nor by a
    # TCP_NODELAY behind that (net/ipv4/tcp.c, __tcp_sock_set_nodelay).
    Option("TCP_NODELAY", _TCP, 1, When.ALIVE),
    Option("TCP_CORK", _TCP, 3, When.ALIVE),
    Option("TCP_SYNCNT", _TCP, 7, _LATE, missing=Missing.REPORT),
    Option("TCP_LINGER2", _TCP, 8, _LATE, missing=Missing.REPORT),
    Option("TCP_THIN_LINEAR_TIMEOUTS", _TCP, 16, _LATE, missing=Missing.REPORT),
    Option("TCP_USER_TIMEOUT", _TCP, 18, _LATE),
    Option("TCP_NOTSENT_LOWAT", _TCP, 25, _LATE, missing=Missing.REPORT),
    Option("IP_TOS", _IP, 1, _LATE),
    Option("IP_TTL", _IP, 2, _LATE),
    Option("IP_MTU_DISCOVER", _IP, 10, _LATE),
    Option("IP_PKTINFO", _IP, 8, _LATE, missing=Missing.REPORT),
    Option("IP_RECVTTL", _IP, 12, _LATE, missing=Missing.REPORT),
    Option("IP_RECVTOS", _IP, 13, _LATE, missing=Missing.REPORT),
    Option("IPV6_UNICAST_HOPS", _IP6, 16, _LATE, ip_version=6),
    Option("IPV6_TCLASS", _IP6, 67, _LATE, ip_version=6),
    # Behind the two that change it too (net/ipv4/ip_sockglue.c, __ip_sock_set_tos).
    Option("SO_PRIORITY", _SOCKET, 12, _LATE, criu="opts.so_priority", missing=Missing.REPORT),
    Option("IPV6_MTU_DISCOVER", _IP6, 23, _LATE, ip_version=6),
    Option("IPV6_RECVPKTINFO", _IP6, 49, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("SO_PEEK_OFF", _SOCKET, 42, _RUNNING),  # it moves with what is put into the receive queue
    # Both buffers were forced large for the restore. The first segment that leaves promises a window that the receive
    # buffer must keep: more would be taken back (net/ipv4/tcp_output.c, tcp_select_window: 0 once memory is short,
    # Linux 6.6, e2142825c120). The unsent bytes still have to go into the other.
    Option("SO_RCVBUF", _SOCKET, 8, _LATE, criu="opts.so_rcvbuf", write_number=33, write_halved=True),
    Option("SO_SNDBUF", _SOCKET, 7, _RUNNING, criu="opts.so_sndbuf", write_number=32, write_halved=True),
    # Setting a buffer locks its size; this puts autotuning back as it was (Linux 5.14, 04190bf89438).
    Option("SO_BUF_LOCK", _SOCKET, 72, _LATE, again=_RUNNING, criu="opts.so_buf_lock", missing=Missing.REPORT),
    # Repair on forces it, repair off clears it (net/ipv4/tcp.c, do_tcp_setsockopt TCP_REPAIR).
    Option("SO_REUSEADDR", _SOCKET, 2, _RUNNING, criu="opts.reuseaddr"),
)

#: By these a socket chooses among its host's rules and routes.
STEERING = frozenset({"SO_MARK", "SO_BINDTODEVICE"})
#: What the peer, or the network, can tell: of a socket that its program has set up already, only these are changed.
ON_THE_WIRE = frozenset({"TCP_CONGESTION", "IP_TOS", "IP_TTL", "IP_MTU_DISCOVER", "IPV6_UNICAST_HOPS", "IPV6_TCLASS",
                         "IPV6_MTU_DISCOVER"})
#: What may grow and not shrink there: the peer was promised a window that it fills.
BUFFERS = frozenset({"SO_RCVBUF", "SO_SNDBUF"})

#: What UDP sockets have beside the rows above that are not TCP's own. Numbers: linux/udp.h, too.
DATAGRAM_TABLE: tuple[Option, ...] = (
    Option("SO_RXQ_OVFL", _SOCKET, 40, _LATE, missing=Missing.REPORT),
    Option("IP_RECVORIGDSTADDR", _IP, 20, _LATE, missing=Missing.REPORT),
    Option("IP_RECVFRAGSIZE", _IP, 25, _LATE, missing=Missing.REPORT),
    Option("IP_MULTICAST_TTL", _IP, 33, _LATE, missing=Missing.REPORT),
    Option("IP_MULTICAST_LOOP", _IP, 34, _LATE, missing=Missing.REPORT),
    Option("IPV6_MULTICAST_HOPS", _IP6, 18, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_MULTICAST_LOOP", _IP6, 19, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_RECVPATHMTU", _IP6, 60, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_DONTFRAG", _IP6, 62, _LATE, ip_version=6),
    Option("UDP_SEGMENT", _UDP, 103, _LATE),
    Option("UDP_GRO", _UDP, 104, _LATE),
    Option("UDP_NO_CHECK6_TX", _UDP, 101, _LATE, ip_version=6),
    Option("UDP_NO_CHECK6_RX", _UDP, 102, _LATE, ip_version=6),
    Option("UDP_CORK", _UDP, 1, _RUNNING),
)

BY_NAME = {option.name: option for option in TABLE + DATAGRAM_TABLE}


def applying(socket_family: int, when: When | None = None, protocol: Protocol = Protocol.TCP) -> tuple[Option, ...]:
    """The rows for a socket of this family and protocol, in order; those of one point of the restore if `when` is
    given."""
    rows = TABLE if protocol is Protocol.TCP else TABLE + DATAGRAM_TABLE
    return tuple(option for option in rows if option.is_of(protocol)
                 and (option.ip_version is None or socket_family == socket.AF_INET6)
                 and (when is None or when in (option.when, option.again)))

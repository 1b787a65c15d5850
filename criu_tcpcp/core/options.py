"""The table of socket options that a passed connection keeps: one row an option, and nothing else in the code knows
one.

A row says how the option is read (level, number, form), when it is written at the destination, which field of CRIU
3.17's images holds it, and what happens where the destination cannot set it. Options without such a field travel beside
the images, by name. An option that has the wanted value already is not written, since some have effects beyond their
value. What a destination does not know and what is switched off is not missed.

`NOT_CARRIED` is the other table: every option of the kernel's headers that no row has, with the reason. A test holds
that an option which a kernel answers for on a TCP socket stands in one of both, and that docs/socket-options.md says
the same.

Of the fields of CRIU's sk_opts_entry, so_bound_dev has no row: it is the index that `ifname` names.
"""

from __future__ import annotations

import enum
import socket
from dataclasses import dataclass

from .endpoint import Protocol

#: What an option's value looks like in a state: a number, a pair (seconds, microseconds; on, seconds; ...), a name, or
#: bytes as hexadecimal digits.
OptionValue = int | tuple[int, int] | str


class Form(enum.Enum):
    """How the kernel hands the value over."""

    INT = enum.auto()
    LONG = enum.auto()  # an unsigned long
    PAIR = enum.auto()  # a struct of two ints, or its first one alone where the kernel is older
    TIMEVAL = enum.auto()  # struct __kernel_sock_timeval of two longs
    LINGER = enum.auto()  # struct linger of two ints
    TEXT = enum.auto()  # zero-terminated name
    BYTES = enum.auto()  # what stands in the packets, or nothing
    FILTER = enum.auto()  # the instructions of a classic BPF program: struct sock_filter, 8 bytes each


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
    `write_halved`: set by another number, and with half the value (the kernel doubles it). `mask`: the bits that are
    the option's; the others are the kernel's."""

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
    mask: int = -1

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
    # A bind to a v4-mapped address fails where net.ipv6.bindv6only has set it; to any other one, it sets it
    # (net/ipv6/af_inet6.c, __inet6_bind).
    Option("IPV6_V6ONLY", _IP6, 26, _EARLY, criu="v6only", ip_version=6),
    # What it adds to every packet makes the segments smaller, which connect works out (net/ipv4/tcp_ipv4.c).
    Option("IP_OPTIONS", _IP, 4, _EARLY, Form.BYTES),
    Option("SO_MARK", _SOCKET, 36, _LATE, criu="opts.so_mark"),
    Option("SO_DEBUG", _SOCKET, 1, _LATE, missing=Missing.REPORT),
    Option("SO_DONTROUTE", _SOCKET, 5, _LATE, criu="opts.so_dontroute"),
    Option("SO_BROADCAST", _SOCKET, 6, _LATE, criu="opts.so_broadcast", missing=Missing.REPORT),
    Option("SO_NO_CHECK", _SOCKET, 11, _LATE, criu="opts.so_no_check", missing=Missing.REPORT),
    # Since Linux 6.16 TCP sockets do not have these two (net/core/sock.c, sk_may_scm_recv).
    Option("SO_PASSCRED", _SOCKET, 16, _LATE, criu="opts.so_passcred", missing=Missing.REPORT),
    Option("SO_PASSSEC", _SOCKET, 34, _LATE, criu="opts.so_passsec", missing=Missing.REPORT),
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
    Option("SO_TIMESTAMPING", _SOCKET, 37, _LATE, Form.PAIR, missing=Missing.REPORT),
    # The same three for programs with a 64-bit time on 32-bit machines: another flag (Linux 5.1, 887feae36aee).
    Option("SO_TIMESTAMP_NEW", _SOCKET, 63, _LATE, missing=Missing.REPORT),
    Option("SO_TIMESTAMPNS_NEW", _SOCKET, 64, _LATE, missing=Missing.REPORT),
    Option("SO_TIMESTAMPING_NEW", _SOCKET, 65, _LATE, Form.PAIR, missing=Missing.REPORT),
    Option("SO_TXTIME", _SOCKET, 61, _LATE, Form.PAIR, missing=Missing.REPORT),
    Option("SO_SELECT_ERR_QUEUE", _SOCKET, 45, _LATE, missing=Missing.REPORT),
    Option("SO_BUSY_POLL", _SOCKET, 46, _LATE, missing=Missing.REPORT),
    Option("SO_PREFER_BUSY_POLL", _SOCKET, 69, _LATE, missing=Missing.REPORT),
    Option("SO_MAX_PACING_RATE", _SOCKET, 47, _LATE, Form.LONG, missing=Missing.REPORT),
    Option("SO_TXREHASH", _SOCKET, 74, _LATE, missing=Missing.REPORT),
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
    Option("TCP_INQ", _TCP, 36, _LATE),
    Option("TCP_TX_DELAY", _TCP, 37, _LATE, missing=Missing.REPORT),
    Option("TCP_RTO_MAX_MS", _TCP, 44, _LATE, missing=Missing.REPORT),
    Option("TCP_RTO_MIN_US", _TCP, 45, _LATE, missing=Missing.REPORT),
    Option("TCP_DELACK_MAX_US", _TCP, 46, _LATE, missing=Missing.REPORT),
    # The two lowest bits are ECN's: the kernel sets them for each packet (include/net/inet_ecn.h, INET_ECN_xmit).
    Option("IP_TOS", _IP, 1, _LATE, mask=~3),
    Option("IP_TTL", _IP, 2, _LATE),
    Option("IP_MTU_DISCOVER", _IP, 10, _LATE),
    Option("IP_RECVERR", _IP, 11, _LATE),
    Option("IP_MINTTL", _IP, 21, _LATE),
    Option("IP_BIND_ADDRESS_NO_PORT", _IP, 24, _LATE, missing=Missing.REPORT),
    Option("IP_PKTINFO", _IP, 8, _LATE, missing=Missing.REPORT),
    Option("IP_RECVTTL", _IP, 12, _LATE, missing=Missing.REPORT),
    Option("IP_RECVTOS", _IP, 13, _LATE, missing=Missing.REPORT),
    Option("IPV6_UNICAST_HOPS", _IP6, 16, _LATE, ip_version=6),
    Option("IPV6_TCLASS", _IP6, 67, _LATE, ip_version=6, mask=~3),
    # Behind the two that change it too (net/ipv4/ip_sockglue.c, __ip_sock_set_tos).
    Option("SO_PRIORITY", _SOCKET, 12, _LATE, criu="opts.so_priority", missing=Missing.REPORT),
    Option("IPV6_MTU_DISCOVER", _IP6, 23, _LATE, ip_version=6),
    Option("IPV6_RECVERR", _IP6, 25, _LATE, ip_version=6),
    Option("IPV6_MINHOPCOUNT", _IP6, 73, _LATE, ip_version=6),
    Option("IPV6_AUTOFLOWLABEL", _IP6, 70, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_RECVPKTINFO", _IP6, 49, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_RECVHOPLIMIT", _IP6, 51, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_RECVTCLASS", _IP6, 66, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_FLOWINFO", _IP6, 11, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_2292PKTINFO", _IP6, 2, _LATE, missing=Missing.REPORT, ip_version=6),
    Option("IPV6_2292HOPLIMIT", _IP6, 8, _LATE, missing=Missing.REPORT, ip_version=6),
    # Behind the last segment that is made here, in front of the first that comes. The lock takes no other filter.
    Option("SO_ATTACH_FILTER", _SOCKET, 26, _LATE, Form.FILTER, criu="opts.so_filter"),
    Option("SO_LOCK_FILTER", _SOCKET, 44, _LATE, missing=Missing.REPORT),
    Option("SO_PEEK_OFF", _SOCKET, 42, _RUNNING),  # it moves with what is put into the receive queue
    # Both buffers were forced large for the restore. The first segment that leaves promises a window that the receive
    # buffer must keep: more would be taken back (net/ipv4/tcp_output.c, tcp_select_window: 0 once memory is short,
    # Linux 6.6, e2142825c120). The unsent bytes still have to go into the other.
    Option("SO_RCVBUF", _SOCKET, 8, _LATE, criu="opts.so_rcvbuf", write_number=33, write_halved=True),
    Option("SO_SNDBUF", _SOCKET, 7, _RUNNING, criu="opts.so_sndbuf", write_number=32, write_halved=True),
    # Setting a buffer locks its size; this puts autotuning back as it was (Linux 5.14, 04190bf89438).
    Option("SO_BUF_LOCK", _SOCKET, 72, _LATE, again=_RUNNING, criu="opts.so_buf_lock", missing=Missing.REPORT),
    Option("SO_RESERVE_MEM", _SOCKET, 73, _RUNNING, missing=Missing.REPORT),
    # The kernel moves it with the buffer, as the program may; a restored socket has the largest there is.
    Option("TCP_WINDOW_CLAMP", _TCP, 10, _RUNNING, missing=Missing.REPORT),
    # 0 while acknowledgements wait for data to go with; setting it pays one that is owed.
    Option("TCP_QUICKACK", _TCP, 12, _RUNNING, missing=Missing.REPORT),
    # Repair on forces it, repair off clears it (net/ipv4/tcp.c, do_tcp_setsockopt TCP_REPAIR).
    Option("SO_REUSEADDR", _SOCKET, 2, _RUNNING, criu="opts.reuseaddr"),
)


@dataclass(frozen=True)
class Absent:
    """An option that is not carried, and why: a clause that follows its name."""

    name: str
    level: int
    number: int
    why: str


def _absent(why: str, level: int, **numbers: int) -> tuple[Absent, ...]:
    return tuple(Absent(name, level, number, why) for name, number in numbers.items())


_REFUSED = "a connection that uses it is refused"
_FACT = "tells something and is not set, or not for TCP"
_SAME = "another way to what a row above has"
_OTHERS = "does nothing on a TCP connection"
_MULTICAST = "is about multicast, which TCP has not"
_OPENING = "is about how a connection is opened, which is over"
_UNREADABLE = "cannot be read"

NOT_CARRIED: tuple[Absent, ...] = (
    *_absent(_REFUSED, _SOCKET, SO_ATTACH_BPF=50, SO_ZEROCOPY=60),
    *_absent(_REFUSED, _TCP, TCP_MD5SIG=14, TCP_MD5SIG_EXT=32, TCP_ULP=31, TCP_AO_ADD_KEY=38, TCP_AO_DEL_KEY=39,
             TCP_AO_INFO=40, TCP_AO_GET_KEYS=41, TCP_AO_REPAIR=42, TCP_IS_MPTCP=43),
    *_absent(_REFUSED, _IP6, IPV6_HOPOPTS=54, IPV6_RTHDRDSTOPTS=55, IPV6_RTHDR=57, IPV6_DSTOPTS=59),
    *_absent(_FACT, _SOCKET, SO_TYPE=3, SO_ERROR=4, SO_PEERCRED=17, SO_SNDLOWAT=19, SO_PEERNAME=28, SO_ACCEPTCONN=30,
             SO_PEERSEC=31, SO_PROTOCOL=38, SO_DOMAIN=39, SO_BPF_EXTENSIONS=48, SO_MEMINFO=55, SO_INCOMING_NAPI_ID=56,
             SO_COOKIE=57, SO_PEERGROUPS=59, SO_NETNS_COOKIE=71, SO_PEERPIDFD=77),
    *_absent(_FACT, _TCP, TCP_INFO=11, TCP_CC_INFO=26),
    *_absent(_FACT, _IP, IP_MTU=14, IP_PKTOPTIONS=9, IP_PROTOCOL=52),
    *_absent(_FACT, _IP6, IPV6_ADDRFORM=1, IPV6_2292PKTOPTIONS=6, IPV6_PATHMTU=61, IPV6_MTU=24),
    *_absent("belongs to the processors of a host", _SOCKET, SO_INCOMING_CPU=49),
    *_absent("is part of the state itself", _TCP, TCP_MAXSEG=2, TCP_REPAIR=19, TCP_REPAIR_QUEUE=20, TCP_QUEUE_SEQ=21,
             TCP_REPAIR_OPTIONS=22, TCP_TIMESTAMP=24, TCP_REPAIR_WINDOW=29),
    *_absent("is set where the destination does not have the address itself", _IP, IP_TRANSPARENT=19),
    *_absent("is set where the destination does not have the address itself", _IP6, IPV6_TRANSPARENT=75),
    *_absent(_SAME, _SOCKET, SO_DETACH_FILTER=27, SO_SNDBUFFORCE=32, SO_RCVBUFFORCE=33, SO_BINDTOIFINDEX=62,
             SO_RCVTIMEO_NEW=66, SO_SNDTIMEO_NEW=67),
    *_absent(_SAME, _IP6, IPV6_FREEBIND=78),
    *_absent(_UNREADABLE, _SOCKET, SO_CNX_ADVICE=53, SO_BUSY_POLL_BUDGET=70, SO_SECURITY_AUTHENTICATION=22,
             SO_SECURITY_ENCRYPTION_TRANSPORT=23, SO_SECURITY_ENCRYPTION_NETWORK=24),
    *_absent(_UNREADABLE, _IP, IP_IPSEC_POLICY=16, IP_XFRM_POLICY=17),
    *_absent(_UNREADABLE, _IP6, IPV6_IPSEC_POLICY=34, IPV6_XFRM_POLICY=35, IPV6_PKTINFO=50),
    *_absent("is of listening sockets", _SOCKET, SO_ATTACH_REUSEPORT_CBPF=51, SO_ATTACH_REUSEPORT_EBPF=52,
             SO_DETACH_REUSEPORT_BPF=68),
    *_absent(_OPENING, _TCP, TCP_DEFER_ACCEPT=9, TCP_FASTOPEN=23, TCP_SAVE_SYN=27, TCP_SAVED_SYN=28,
             TCP_FASTOPEN_CONNECT=30, TCP_FASTOPEN_KEY=33, TCP_FASTOPEN_NO_COOKIE=34),
    *_absent(_OPENING, _IP, IP_LOCAL_PORT_RANGE=51),
    *_absent(_OPENING, _IP6, IPV6_ADDR_PREFERENCES=72),
    *_absent("is lent to a process, or to the address of its host", _IP6, IPV6_FLOWLABEL_MGR=32, IPV6_FLOWINFO_SEND=33),
    *_absent("is a call and no setting", _TCP, TCP_ZEROCOPY_RECEIVE=35),
    *_absent("is a call and no setting", _SOCKET, SO_DEVMEM_LINEAR=78, SO_DEVMEM_DMABUF=79, SO_DEVMEM_DONTNEED=80),
    *_absent(_OTHERS, _SOCKET, SO_BSDCOMPAT=14, SO_RXQ_OVFL=40, SO_WIFI_STATUS=41, SO_NOFCS=43, SO_RCVMARK=75,
             SO_PASSPIDFD=76, SCM_TS_OPT_ID=81, SO_RCVPRIORITY=82, SO_PASSRIGHTS=83, SO_INQ=84),
    *_absent("does nothing since Linux 4.11", _TCP, TCP_THIN_DUPACK=17),
    *_absent(_OTHERS, _IP, IP_HDRINCL=3, IP_ROUTER_ALERT=5, IP_RECVOPTS=6, IP_RETOPTS=7, IP_PASSSEC=18,
             IP_RECVORIGDSTADDR=20, IP_NODEFRAG=22, IP_CHECKSUM=23, IP_RECVFRAGSIZE=25, IP_RECVERR_RFC4884=26,
             IP_UNICAST_IF=50),
    *_absent(_MULTICAST, _IP, IP_MULTICAST_IF=32, IP_MULTICAST_TTL=33, IP_MULTICAST_LOOP=34, IP_ADD_MEMBERSHIP=35,
             IP_DROP_MEMBERSHIP=36, IP_UNBLOCK_SOURCE=37, IP_BLOCK_SOURCE=38, IP_ADD_SOURCE_MEMBERSHIP=39,
             IP_DROP_SOURCE_MEMBERSHIP=40, IP_MSFILTER=41, MCAST_JOIN_GROUP=42, MCAST_BLOCK_SOURCE=43,
             MCAST_UNBLOCK_SOURCE=44, MCAST_LEAVE_GROUP=45, MCAST_JOIN_SOURCE_GROUP=46, MCAST_LEAVE_SOURCE_GROUP=47,
             MCAST_MSFILTER=48, IP_MULTICAST_ALL=49),
    *_absent(_OTHERS, _IP6, IPV6_2292HOPOPTS=3, IPV6_2292DSTOPTS=4, IPV6_2292RTHDR=5, IPV6_CHECKSUM=7, IPV6_NEXTHOP=9,
             IPV6_AUTHHDR=10, IPV6_ROUTER_ALERT=22, IPV6_ROUTER_ALERT_ISOLATE=30, IPV6_RECVERR_RFC4884=31,
             IPV6_HDRINCL=36, IPV6_HOPLIMIT=52, IPV6_RECVHOPOPTS=53, IPV6_RECVRTHDR=56, IPV6_RECVDSTOPTS=58,
             IPV6_RECVPATHMTU=60, IPV6_DONTFRAG=62, IPV6_USE_MIN_MTU=63, IPV6_RECVORIGDSTADDR=74, IPV6_UNICAST_IF=76,
             IPV6_RECVFRAGSIZE=77),
    *_absent(_MULTICAST, _IP6, IPV6_MULTICAST_IF=17, IPV6_MULTICAST_HOPS=18, IPV6_MULTICAST_LOOP=19,
             IPV6_ADD_MEMBERSHIP=20, IPV6_DROP_MEMBERSHIP=21, IPV6_JOIN_ANYCAST=27, IPV6_LEAVE_ANYCAST=28,
             IPV6_MULTICAST_ALL=29),
)

#: By these a socket chooses among its host's rules and routes.
STEERING = frozenset({"SO_MARK", "SO_BINDTODEVICE", "IP_OPTIONS"})
#: What the peer, or the network, can tell: of a socket that its program has set up already, only these are changed.
ON_THE_WIRE = frozenset({"TCP_CONGESTION", "IP_TOS", "IP_TTL", "IP_MTU_DISCOVER", "IPV6_UNICAST_HOPS", "IPV6_TCLASS",
                         "IPV6_MTU_DISCOVER", "IP_OPTIONS"})
#: What may grow and not shrink there: the peer was promised a window that it fills.
BUFFERS = frozenset({"SO_RCVBUF", "SO_SNDBUF", "TCP_WINDOW_CLAMP"})
#: What the kernel changes by itself all the time.
VARYING = frozenset({"SO_RCVBUF", "SO_SNDBUF", "TCP_WINDOW_CLAMP", "TCP_QUICKACK"})

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

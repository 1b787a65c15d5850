"""What forbids the pass of a connection, found without touching it.

Each function looks at one source: what the kernel tells of all sockets at once, what only the socket itself tells, and
what the rings of its process tell. The first obstacle that is found is the one that is named.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from collections.abc import Callable, Container
from dataclasses import dataclass

from .core import tcp
from .core.endpoint import Flow, IPAddress, Protocol
from .core.errors import KernelError, Refused
from .core.refusals import Refusal
from .core.tcp import TcpState
from .kernel import conntrack, datagrams, iouring, sockdiag, sockopt, tcpinfo

_SO_ZEROCOPY, _SO_TIMESTAMPING = 60, 37
_TCP_ULP = 31
_UDP_ENCAP = 100  # linux/udp.h
#: linux/net_tstamp.h: TX_HARDWARE, TX_SOFTWARE, TX_SCHED, TX_ACK, TX_COMPLETION
_SENDS_TIMESTAMPS = 1 << 0 | 1 << 1 | 1 << 8 | 1 << 9 | 1 << 18
#: IPV6_HOPOPTS, IPV6_RTHDRDSTOPTS, IPV6_RTHDR, IPV6_DSTOPTS (linux/in6.h)
_EXTENSION_HEADERS = (54, 55, 57, 59)

#: What could be done about a state in which there is no connection to pass.
_WHY_STATE = {TcpState.SYN_SENT: "try again once it is established",
              TcpState.CLOSE: "the connection is over, or never began: no packet belongs to it any more"}


@dataclass(frozen=True)
class Obstacle:
    """`what`: the descriptor's predicate. `hint`: what to do about it, or ''."""

    refusal: Refusal
    what: str
    hint: str = ""

    def refused(self, subject: str) -> Refused:
        return Refused(f"{subject} {self.what}", hint=self.hint, refusal=self.refusal)


MPTCP = Obstacle(Refusal.MPTCP, "is an MPTCP socket: the kernel has no repair mode for it")
_ZEROCOPY = Obstacle(Refusal.ZEROCOPY, "uses MSG_ZEROCOPY, whose completions would be lost")
_BPF_FILTER = Obstacle(Refusal.BPF_FILTER, "has a filter that is no classic BPF program (SO_ATTACH_BPF)")


def in_kernels_list(state: TcpState, flow: Flow | None, options: int, upper: str, is_signed: bool,
                    others: tuple[int, ...], allowing: Container[Refusal] = ()) -> Obstacle | None:
    """`options` as of tcpi_options; `upper`: the protocol on top of it; `is_signed`: it has keys for TCP-MD5; `others`:
    processes that have it, too. `allowing`: what the user takes all the same."""
    if upper == "mptcp":
        return MPTCP
    if state is TcpState.LISTEN:
        return Obstacle(Refusal.LISTENING, "is a listening socket, which has no peer")
    if state is TcpState.SYN_RECV:
        return Obstacle(Refusal.FAST_OPEN, "is being opened (TCP Fast Open): the peer has not confirmed it",
                        "try again once the handshake is over")
    if state not in tcp.PASSABLE_STATES or flow is None:
        return Obstacle(Refusal.STATE, f"is in state {state.label}", _WHY_STATE.get(state, ""))
    if others:
        return Obstacle(Refusal.SHARED, f"is shared with process {', '.join(map(str, others[:4]))}",
                        "every process that could use the connection would have to give it up")
    if upper:
        return Obstacle(Refusal.UPPER_PROTOCOL,
                        f"has the kernel protocol {upper!r} on top, which cannot be carried")
    if is_signed:
        return Obstacle(Refusal.TCP_MD5, "is signed by TCP-MD5, whose keys are not carried")
    if options & tcp.OPT_ECN and Refusal.ECN not in allowing:
        return Obstacle(Refusal.ECN, "negotiated ECN, which no restored connection has",
                        "--ecn-anyway passes it without: marks of the network then tell the peer nothing")
    for address in (flow.local.address, flow.peer.address):
        if _is_loopback(address):
            return Obstacle(Refusal.LOOPBACK, "is a loopback connection, which no other host can continue")
    if _is_of_a_link(flow.peer.address):
        return Obstacle(Refusal.LINK_LOCAL,
                        f"has the peer {flow.peer.address}, which has a meaning on its own link only")
    return None


@functools.lru_cache(1 << 12)  # thousands of connections have few addresses, and ipaddress is slow
def _is_loopback(address: IPAddress) -> bool:
    return address.is_loopback


@functools.lru_cache(1 << 12)
def _is_of_a_link(address: IPAddress) -> bool:
    return address.is_multicast or address.is_link_local


def inside(sock: socket.socket) -> Obstacle | None:
    """What only the socket itself tells."""
    if tcpinfo.has_urgent_data(sock):
        return Obstacle(Refusal.URGENT_DATA, "has urgent data waiting, which cannot be carried",
                        "try again once the program has read it")
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY):
        return _ZEROCOPY
    if sock.getsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPING) & _SENDS_TIMESTAMPS:  # those of ..._NEW, too
        return Obstacle(Refusal.SEND_TIMESTAMPS,
                        "asks for timestamps of what it sends (SO_TIMESTAMPING), which would be lost",
                        "switch its TX flags off first")
    if tcpinfo.is_authenticated(sock):
        return Obstacle(Refusal.TCP_AO, "is authenticated by TCP-AO, whose keys are not carried")
    if sockopt.has_hidden_filter(sock):
        return _BPF_FILTER
    if sock.family == socket.AF_INET6 and any(sock.getsockopt(socket.IPPROTO_IPV6, number, 8)
                                              for number in _EXTENSION_HEADERS):
        return Obstacle(Refusal.EXTENSION_HEADERS, "adds IPv6 extension headers to its packets",
                        "take them away first (setsockopt IPV6_HOPOPTS, IPV6_RTHDR, IPV6_DSTOPTS, of length 0)")
    return None


def to_datagrams(flow: Flow | None, others: tuple[int, ...]) -> Obstacle | None:
    """Of a UDP socket, as `in_kernels_list`."""
    if flow is None:
        return Obstacle(Refusal.NO_PEER, "is a UDP socket without a peer of its own",
                        "only one that its program has connected to its peer is passed")
    return in_kernels_list(TcpState.ESTABLISHED, flow, 0, "", False, others)


def inside_datagrams(sock: socket.socket) -> Obstacle | None:
    """What only a UDP socket itself tells."""
    if sock.getsockopt(socket.IPPROTO_UDP, _UDP_ENCAP):
        return Obstacle(Refusal.UPPER_PROTOCOL, "has a kernel protocol on top (UDP_ENCAP), which cannot be carried")
    if tcpinfo.reads_end(sock):
        return Obstacle(Refusal.STATE, "is a UDP socket that is shut down for reading, which is not carried")
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY):
        return _ZEROCOPY
    if sockopt.has_hidden_filter(sock):
        return _BPF_FILTER
    if datagrams.has_corked(sock):
        return Obstacle(Refusal.CORKED, "has a datagram that was begun and not finished (UDP_CORK, MSG_MORE), which "
                        "cannot be carried", "try again once the program has sent it")
    if datagrams.has_error(sock):
        return Obstacle(Refusal.PENDING_ERROR, "has an error waiting, which cannot be carried",
                        "try again once the program has read it")
    return None


#: What only a look at the socket itself tells.
INSIDE: dict[Protocol, Callable[[socket.socket], Obstacle | None]] = {
    Protocol.TCP: inside, Protocol.UDP: inside_datagrams}


def in_rings(rings: tuple[iouring.Ring, ...], inode: int) -> Obstacle | None:
    """An io_uring may use the socket without a system call, and while its program is stopped. It tells which sockets
    it has registered, and of what is pending only the kinds: any but an accept may be of this connection."""
    what = ""
    for ring in rings:
        if inode in ring.files:
            what = "is registered with an io_uring of its process"
        elif ring.is_pending:
            what = "may be in use by an io_uring: its process has requests pending in one"
        elif ring.has_thread:
            what = "may be in use by an io_uring: a thread of the kernel takes requests from it (SQPOLL)"
        if what:
            return Obstacle(Refusal.IO_URING, what, "let the program cancel its requests, and unregister its files")
    return None


def upper_protocol(sock: socket.socket) -> str:
    """Of the kernel, on top of TCP; or ''."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).split(b"\0")[0].decode("ascii", "replace")
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN):
            return ""
        raise


def is_signed(flow: Flow | None) -> bool:
    """In the calling thread's network namespace: no option of the socket tells it."""
    entry = sockdiag.entry_of(flow) if flow is not None else None
    return entry is not None and entry.is_signed


def local_peer(flow: Flow) -> Obstacle:
    return Obstacle(Refusal.LOCAL_PEER, f"has the peer {flow.peer}, which is on the origin host itself",
                    "its packets cannot be sent on to another host")


def translated(flow: Flow | None, tracking: conntrack.Tracking | None = None) -> Obstacle | None:
    """In the calling thread's network namespace, whose table of connections `tracking` is."""
    if flow is None:
        return None
    entry: conntrack.Entry | None = None
    with contextlib.suppress(KernelError):  # this kernel does not tell
        entry = tracking.entry_of(flow) if tracking is not None else conntrack.entry_of(flow)
    if entry is None or not entry.is_translated:
        return None
    seen = entry.outside(flow.local)
    what = f"the peer knows it as {seen}" if seen != flow.local else "the peer's address is another one, too"
    return Obstacle(Refusal.NAT, f"is translated by a NAT of its own host: {what}",
                    "its packets have other addresses in the network than its socket has")

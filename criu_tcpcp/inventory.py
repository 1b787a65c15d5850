"""From a process to its connections, each passable or with the reason why not.

`list`, `pass`, `--dry-run` and `check` share it, so what `list` calls passable is what `pass` accepts. Nothing is
touched: descriptors are copied (pidfd_getfd), looked at and closed; of all at once the kernel tells most by itself
(sock_diag), which is what makes ten thousand bearable. What only the stopped, held connection shows (the
queues' contents) is looked at again by the pass itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .core import tcp
from .core.endpoint import Flow, IPAddress, Protocol
from .core.errors import KernelError, Refused
from .core.tcp import TcpState
from .kernel import datagrams, netns, process, routing, sockdiag, syscalls, tcpinfo

_SO_PROTOCOL, _SO_DOMAIN, _SO_ACCEPTCONN, _SO_ZEROCOPY = 38, 39, 30, 60
_TCP_ULP = 31
_UDP_ENCAP = 100
_IPPROTO_MPTCP = 262


#: What could be done about a state in which there is no connection to pass.
_WHY_STATE = {TcpState.SYN_SENT: "try again once it is established",
              TcpState.SYN_RECV: "try again once it is established",
              TcpState.CLOSE: "the connection is over, or never began: no packet belongs to it any more"}


@dataclass(frozen=True)
class Connection:
    """A TCP or UDP socket of a process. `why_not` is None where it can be passed; `hint` then is what could be done
    about it."""

    pid: int
    process_name: str
    descriptors: tuple[int, ...]
    inode: int
    state: TcpState
    flow: Flow | None
    unread: int
    unacknowledged: int
    cookie: int
    why_not: str | None
    hint: str = ""
    shared_with: tuple[int, ...] = field(default=())
    protocol: Protocol = Protocol.TCP

    @property
    def state_label(self) -> str:
        """As ss(8) has it."""
        is_unconnected = self.protocol is Protocol.UDP and self.state is TcpState.CLOSE
        return "UNCONN" if is_unconnected else self.state.label


def find(pid: int, fd: int) -> Connection:
    """The connection behind a descriptor. Refused, with the reason, where there is none that can be passed."""
    process.identity(pid)
    links = process.descriptors(pid)
    if fd not in links:
        raise Refused(f"process {pid} has no descriptor {fd}",
                      hint=f"criu-tcpcp list --pid {pid} shows its connections")
    inode = process.socket_inode(links[fd])
    if inode is None:
        raise Refused(f"descriptor {fd} of process {pid} is not a socket but {links[fd]}")
    pidfd = syscalls.pidfd_open(pid)
    try:
        found = _examine(pid, pidfd, inode, tuple(n for n, link in links.items() if link == links[fd]),
                         process.holders({inode})[inode])
    finally:
        os.close(pidfd)
    if isinstance(found, str):
        raise Refused(f"descriptor {fd} of process {pid} {found}")
    if found.why_not is not None:
        raise Refused(f"descriptor {fd} of process {pid} {found.why_not}", hint=found.hint)
    return found


def connections(pid: int | None = None) -> Iterator[Connection]:
    """Every TCP socket that is connected or listens, and every UDP socket, of the process, or of all processes that may
    be looked at. What a process has from another network namespace than its own is left out, and cannot be passed."""
    if pid is not None:
        process.descriptors(pid)  # Refused where that may not be seen
    by_process = process.sockets()
    holding: dict[int, set[int]] = {}
    for one, found in by_process.items():
        for inode in found:
            holding.setdefault(inode, set()).add(one)
    wanted = holding.keys() if pid is None else by_process.get(pid, {}).keys()
    networks: dict[tuple[int, int], _Network] = {}
    for one in sorted(by_process) if pid is None else [pid] * (pid in by_process):
        try:
            path = process.network_namespace(one)
            identity = netns.identity(path)
            if identity not in networks:
                with netns.enter(path):
                    networks[identity] = _Network(sockdiag.known(wanted))
            pidfd = syscalls.pidfd_open(one)
        except KernelError:  # it has exited
            continue
        name = process.name(one)
        try:
            for inode, numbers in by_process[one].items():
                entry = networks[identity].sockets.get(inode)
                if entry is not None:
                    yield _listed(one, name, pidfd, entry, tuple(numbers), holding[inode], networks[identity])
        finally:
            os.close(pidfd)


@dataclass
class _Network:
    """A network namespace: the sockets in it by inode, and which addresses are local, as far as that was asked."""

    sockets: dict[int, sockdiag.Known]
    local: dict[IPAddress, bool] = field(default_factory=dict)


def _listed(pid: int, name: str, pidfd: int, entry: sockdiag.Known, numbers: tuple[int, ...], holding: set[int],
            network: _Network) -> Connection:
    """Of what the kernel tells of all sockets at once; only one that may be passed is looked at by itself."""
    others = tuple(sorted(holding - {pid})) if len(holding) > 1 else ()
    if entry.protocol is Protocol.UDP:
        why_not, hint = _obstacle_to_datagrams(entry.flow, others)
    else:
        why_not, hint = _obstacle(entry.state, entry.flow, entry.options, entry.upper, others)
    if why_not is None and entry.flow is not None:
        peer = entry.flow.peer.address
        if peer not in network.local:
            with netns.enter(process.network_namespace(pid)):
                network.local[peer] = routing.is_local(peer)
        if network.local[peer]:
            refusal = _local_peer(entry.flow)
            why_not, hint = refusal.message, refusal.hint
        else:
            try:
                with syscalls.borrow_known(pidfd, numbers[0], entry.flow) as sock:
                    why_not, hint = _INSIDE[entry.protocol](sock)
            except (KernelError, OSError):  # ENOTSOCK: it has become something else
                why_not = "may not be taken, or was closed just now"
    return Connection(pid=pid, process_name=name, descriptors=numbers, inode=entry.inode,
                      state=entry.state, flow=entry.flow, unread=entry.unread, unacknowledged=entry.unacknowledged,
                      cookie=entry.cookie, why_not=why_not, hint=hint, shared_with=others, protocol=entry.protocol)


def _examine(pid: int, pidfd: int, inode: int, numbers: tuple[int, ...], holding: set[int]) -> Connection | str:
    """A TCP or UDP socket as a Connection; for anything else, what it is. Refused where it cannot be had."""
    try:
        sock = syscalls.borrow_socket(pidfd, numbers[0])
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise Refused(f"descriptor {numbers[0]} of process {pid} may not be taken",
                          hint="root, or CAP_SYS_PTRACE and CAP_NET_ADMIN, are needed") from None
        if error.errno in (errno.ESRCH, errno.EBADF, errno.ENOTSOCK):
            raise Refused(f"process {pid} has closed descriptor {numbers[0]} or has exited") from None
        raise
    with sock:
        domain = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        protocol = sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
        if domain == socket.AF_UNIX:
            return "is a unix socket, not a TCP connection"
        if domain not in (socket.AF_INET, socket.AF_INET6):
            return f"is a socket of address family {domain}, not a TCP connection"
        if protocol == socket.IPPROTO_UDP:
            return _examine_datagrams(sock, pid, inode, numbers, tuple(sorted(holding - {pid})))
        if protocol not in (socket.IPPROTO_TCP, _IPPROTO_MPTCP):
            return f"is a socket of IP protocol {protocol}, not a TCP connection"
        if protocol == _IPPROTO_MPTCP:
            return "is an MPTCP socket: the kernel has no repair mode for it"
        info = tcpinfo.read(sock)
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN))
        flow: Flow | None = None
        if not listening and info.state is not TcpState.CLOSE:
            try:
                flow = tcpinfo.flow_of(sock)
            except (KernelError, ValueError):
                flow = None
        others = tuple(sorted(holding - {pid}))
        why_not, hint = _obstacle(info.state, flow, info.options, _upper_protocol(sock), others)
        if why_not is None:
            why_not, hint = _obstacle_inside(sock)
        return Connection(
            pid=pid, process_name=process.name(pid), descriptors=numbers, inode=inode, state=info.state, flow=flow,
            unread=0 if listening else tcpinfo.unread_bytes(sock),
            unacknowledged=0 if listening else _unacknowledged(sock, info.state),
            cookie=tcpinfo.cookie(sock), why_not=why_not, hint=hint, shared_with=others)


def _unacknowledged(sock: socket.socket, state: TcpState) -> int:
    """Without our FIN."""
    count = tcpinfo.unacknowledged_bytes(sock)
    return count - 1 if count and state in tcp.FIN_QUEUED_STATES else count


def _examine_datagrams(sock: socket.socket, pid: int, inode: int, numbers: tuple[int, ...],
                       others: tuple[int, ...]) -> Connection:
    flow: Flow | None = None
    with contextlib.suppress(KernelError, ValueError):
        flow = tcpinfo.flow_of(sock)
    why_not, hint = _obstacle_to_datagrams(flow, others)
    if why_not is None:
        why_not, hint = _obstacle_inside_datagrams(sock)
    return Connection(
        pid=pid, process_name=process.name(pid), descriptors=numbers, inode=inode,
        state=TcpState.CLOSE if flow is None else TcpState.ESTABLISHED, flow=flow,
        unread=datagrams.queue_memory(sock), unacknowledged=tcpinfo.bytes_below(sock), cookie=tcpinfo.cookie(sock),
        why_not=why_not, hint=hint, shared_with=others, protocol=Protocol.UDP)


def _obstacle_to_datagrams(flow: Flow | None, others: tuple[int, ...]) -> tuple[str | None, str]:
    if flow is None:
        return ("is a UDP socket without a peer of its own",
                "only one that its program has connected to its peer is passed")
    return _obstacle(TcpState.ESTABLISHED, flow, 0, "", others)


def _obstacle_inside_datagrams(sock: socket.socket) -> tuple[str | None, str]:
    if sock.getsockopt(socket.IPPROTO_UDP, _UDP_ENCAP):
        return "has a kernel protocol on top (UDP_ENCAP), which cannot be carried", ""
    if tcpinfo.reads_end(sock):
        return "is shut down for reading, which is not carried", ""
    if datagrams.has_filter(sock):
        return "has a packet filter (SO_ATTACH_FILTER), which is not carried", ""
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY):
        return "uses MSG_ZEROCOPY, whose completions would be lost", ""
    if datagrams.has_corked(sock):
        return "has a datagram that was begun and not finished (UDP_CORK, MSG_MORE), which cannot be carried", \
            "try again once the program has sent it"
    if datagrams.has_error(sock):
        return "has an error waiting, which cannot be carried", "try again once the program has read it"
    return None, ""


def _obstacle(state: TcpState, flow: Flow | None, options: int, upper: str,
              others: tuple[int, ...]) -> tuple[str | None, str]:
    """The first thing that forbids the pass, as what the descriptor is, and what to do about it."""
    if state is TcpState.LISTEN:
        return "is a listening socket, which has no peer", ""
    if state not in tcp.PASSABLE_STATES or flow is None:
        return f"is in state {state.label}", _WHY_STATE.get(state, "")
    if others:
        return (f"is shared with process {', '.join(map(str, others[:4]))}",
                "every process that could use the connection would have to give it up")
    if options & tcp.OPT_USEC_TS:
        return "uses microsecond timestamps, which cannot be carried", ""
    if upper:
        return f"has the kernel protocol {upper!r} on top, which cannot be carried", ""
    if _is_loopback(flow.local.address) or _is_loopback(flow.peer.address):
        return "is a loopback connection, which no other host can continue", ""
    if _is_of_a_link(flow.peer.address):
        return f"has the peer {flow.peer.address}, which has a meaning on its own link only", ""
    return None, ""


@functools.lru_cache(1 << 12)  # thousands of connections have few addresses, and ipaddress is slow
def _is_loopback(address: IPAddress) -> bool:
    return address.is_loopback


@functools.lru_cache(1 << 12)
def _is_of_a_link(address: IPAddress) -> bool:
    return address.is_multicast or address.is_link_local


def _obstacle_inside(sock: socket.socket) -> tuple[str | None, str]:
    """What only the socket itself tells."""
    if tcpinfo.has_urgent_data(sock):
        return "has urgent data waiting, which cannot be carried", "try again once the program has read it"
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY):
        return "uses MSG_ZEROCOPY, whose completions would be lost", ""
    return None, ""


#: What only a look at the socket itself tells.
_INSIDE: dict[Protocol, Callable[[socket.socket], tuple[str | None, str]]] = {
    Protocol.TCP: _obstacle_inside, Protocol.UDP: _obstacle_inside_datagrams}


def _upper_protocol(sock: socket.socket) -> str:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).split(b"\0")[0].decode("ascii", "replace")
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN):
            return ""
        raise


def refuse_local_peer(connection: Connection) -> None:
    """Refused where the peer is on the origin's own host: its packets never pass the hooks that hold and forward."""
    if connection.flow is None:
        return
    with netns.enter(process.network_namespace(connection.pid)):
        if routing.is_local(connection.flow.peer.address):
            raise _local_peer(connection.flow)


def _local_peer(flow: Flow) -> Refused:
    return Refused(f"the peer {flow.peer} is on the origin host itself",
                   hint="its packets cannot be sent on to another host")

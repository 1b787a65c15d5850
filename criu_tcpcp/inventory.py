"""From a process to its connections, each passable or with the reason why not.

`list`, `pass`, `--dry-run` and `check` share it, so what `list` calls passable is what `pass` accepts. Nothing is
touched: descriptors are copied (pidfd_getfd), looked at and closed; of all at once the kernel tells most by itself
(sock_diag), which is what makes ten thousand bearable. What only the stopped, held connection shows (the
queues' contents) is looked at again by the pass itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Container, Iterator
from dataclasses import dataclass, field

from . import obstacles
from .core import tcp
from .core.endpoint import Flow, IPAddress, Protocol
from .core.errors import KernelError, Refused
from .core.refusals import Refusal
from .core.tcp import TcpState
from .kernel import conntrack, datagrams, iouring, netns, process, routing, sockdiag, syscalls, tcpinfo
from .obstacles import Obstacle

_SO_PROTOCOL, _SO_DOMAIN, _SO_ACCEPTCONN = 38, 39, 30
_IPPROTO_MPTCP = 262


@dataclass(frozen=True)
class Connection:
    """A TCP or UDP socket of a process. `obstacle` is None where it can be passed."""

    pid: int
    process_name: str
    descriptors: tuple[int, ...]
    inode: int
    state: TcpState
    flow: Flow | None
    unread: int
    unacknowledged: int
    cookie: int
    obstacle: Obstacle | None
    shared_with: tuple[int, ...] = field(default=())
    protocol: Protocol = Protocol.TCP

    @property
    def state_label(self) -> str:
        """As ss(8) has it."""
        is_unconnected = self.protocol is Protocol.UDP and self.state is TcpState.CLOSE
        return "UNCONN" if is_unconnected else self.state.label


def find(pid: int, fd: int, allowing: Container[Refusal] = ()) -> Connection:
    """The connection behind a descriptor. Refused, with the reason, where there is none that can be passed.
    `allowing`: what the user takes all the same."""
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
                         process.holders({inode})[inode], iouring.of(pid, links), allowing)
    finally:
        os.close(pidfd)
    if isinstance(found, str):
        raise Refused(f"descriptor {fd} of process {pid} {found}")
    if found.obstacle is not None:
        raise found.obstacle.refused(f"descriptor {fd} of process {pid}")
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
    with contextlib.ExitStack() as stack:
        for one in sorted(by_process) if pid is None else [pid] * (pid in by_process):
            try:
                path = process.network_namespace(one)
                identity = netns.identity(path)
                if identity not in networks:
                    with netns.enter(path):
                        networks[identity] = stack.enter_context(contextlib.closing(_Network.seen_here(wanted)))
                pidfd = syscalls.pidfd_open(one)
            except KernelError:  # it has exited
                continue
            try:
                program = _Program(one, process.name(one), pidfd, iouring.of(one))
            except Refused:  # it has exited
                os.close(pidfd)
                continue
            try:
                for inode, numbers in by_process[one].items():
                    entry = networks[identity].sockets.get(inode)
                    if entry is not None:
                        yield _listed(program, entry, tuple(numbers), holding[inode], networks[identity])
            finally:
                os.close(pidfd)


@dataclass
class _Network:
    """A network namespace: the sockets in it by inode, and which addresses are local, as far as that was asked."""

    sockets: dict[int, sockdiag.Known]
    local: dict[IPAddress, bool] = field(default_factory=dict)
    tracking: conntrack.Tracking | None = None

    @classmethod
    def seen_here(cls, inodes: Container[int]) -> _Network:
        """The calling thread's."""
        return cls(sockdiag.known(inodes), tracking=conntrack.Tracking() if conntrack.knows_any() else None)

    def close(self) -> None:
        if self.tracking is not None:
            self.tracking.close()


@dataclass(frozen=True)
class _Program:
    pid: int
    name: str
    pidfd: int
    rings: tuple[iouring.Ring, ...]


def _listed(program: _Program, entry: sockdiag.Known, numbers: tuple[int, ...], holding: set[int],
            network: _Network) -> Connection:
    """Of what the kernel tells of all sockets at once; only one that may be passed is looked at by itself."""
    pid = program.pid
    others = tuple(sorted(holding - {pid})) if len(holding) > 1 else ()
    if entry.protocol is Protocol.UDP:
        obstacle = obstacles.to_datagrams(entry.flow, others)
    else:
        obstacle = obstacles.in_kernels_list(entry.state, entry.flow, entry.options, entry.upper, entry.is_signed,
                                             others)
    if obstacle is None:
        obstacle = obstacles.in_rings(program.rings, entry.inode)
    if obstacle is None and entry.flow is not None:
        try:
            with syscalls.borrow_known(program.pidfd, numbers[0], entry.flow) as sock:
                obstacle = obstacles.INSIDE[entry.protocol](sock)
        except (KernelError, OSError):  # ENOTSOCK: it has become something else
            obstacle = Obstacle(Refusal.NOT_ALLOWED, "may not be taken, or was closed just now")
    if obstacle is None and entry.flow is not None:
        peer = entry.flow.peer.address
        if peer not in network.local:
            with netns.enter(process.network_namespace(pid)):
                network.local[peer] = routing.is_local(peer)
        if network.local[peer]:
            obstacle = obstacles.local_peer(entry.flow)
    if obstacle is None and network.tracking is not None:
        obstacle = obstacles.translated(entry.flow, network.tracking)
    return Connection(pid=pid, process_name=program.name, descriptors=numbers, inode=entry.inode,
                      state=entry.state, flow=entry.flow, unread=entry.unread, unacknowledged=entry.unacknowledged,
                      cookie=entry.cookie, obstacle=obstacle, shared_with=others, protocol=entry.protocol)


def _examine(pid: int, pidfd: int, inode: int, numbers: tuple[int, ...], holding: set[int],
             rings: tuple[iouring.Ring, ...], allowing: Container[Refusal]) -> Connection | str:
    """A TCP or UDP socket as a Connection; for anything else, what it is. Refused where it cannot be had."""
    try:
        sock = syscalls.borrow_socket(pidfd, numbers[0])
    except KernelError as error:
        if error.errno == errno.EPERM:
            raise Refused(f"descriptor {numbers[0]} of process {pid} may not be taken", refusal=Refusal.NOT_ALLOWED,
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
            return _examine_datagrams(sock, pid, inode, numbers, tuple(sorted(holding - {pid})), rings)
        if protocol not in (socket.IPPROTO_TCP, _IPPROTO_MPTCP):
            return f"is a socket of IP protocol {protocol}, not a TCP connection"
        if protocol == _IPPROTO_MPTCP:
            raise obstacles.MPTCP.refused(f"descriptor {numbers[0]} of process {pid}")
        info = tcpinfo.read(sock)
        listening = bool(sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN))
        flow: Flow | None = None
        if not listening and info.state is not TcpState.CLOSE:
            try:
                flow = tcpinfo.flow_of(sock)
            except (KernelError, ValueError):
                flow = None
        others = tuple(sorted(holding - {pid}))
        with netns.enter(process.network_namespace(pid)):
            is_signed = obstacles.is_signed(flow)
            translated = obstacles.translated(flow)
        obstacle = (obstacles.in_kernels_list(info.state, flow, info.options, obstacles.upper_protocol(sock), is_signed,
                                              others, allowing)
                    or obstacles.in_rings(rings, inode) or obstacles.inside(sock) or translated)
        return Connection(
            pid=pid, process_name=process.name(pid), descriptors=numbers, inode=inode, state=info.state, flow=flow,
            unread=0 if listening else tcpinfo.unread_bytes(sock),
            unacknowledged=0 if listening else _unacknowledged(sock, info.state),
            cookie=tcpinfo.cookie(sock), obstacle=obstacle, shared_with=others)


def _unacknowledged(sock: socket.socket, state: TcpState) -> int:
    """Without our FIN."""
    count = tcpinfo.unacknowledged_bytes(sock)
    return count - 1 if count and state in tcp.FIN_QUEUED_STATES else count


def _examine_datagrams(sock: socket.socket, pid: int, inode: int, numbers: tuple[int, ...], others: tuple[int, ...],
                       rings: tuple[iouring.Ring, ...]) -> Connection:
    flow: Flow | None = None
    with contextlib.suppress(KernelError, ValueError):
        flow = tcpinfo.flow_of(sock)
    with netns.enter(process.network_namespace(pid)):
        translated = obstacles.translated(flow)
    obstacle = (obstacles.to_datagrams(flow, others) or obstacles.in_rings(rings, inode)
                or obstacles.inside_datagrams(sock) or translated)
    return Connection(
        pid=pid, process_name=process.name(pid), descriptors=numbers, inode=inode,
        state=TcpState.CLOSE if flow is None else TcpState.ESTABLISHED, flow=flow,
        unread=datagrams.queue_memory(sock), unacknowledged=tcpinfo.bytes_below(sock), cookie=tcpinfo.cookie(sock),
        obstacle=obstacle, shared_with=others, protocol=Protocol.UDP)


def refuse_local_peer(connection: Connection) -> None:
    """Refused where the peer is on the origin's own host: its packets never pass the hooks that hold and forward."""
    if connection.flow is None:
        return
    with netns.enter(process.network_namespace(connection.pid)):
        if routing.is_local(connection.flow.peer.address):
            raise obstacles.local_peer(connection.flow).refused(f"the connection {connection.flow}")

"""From a process to its connections, each passable or with the reason why not.

`list`, `pass`, `--dry-run` and `check` share it, so what `list` calls passable is what `pass` accepts. Nothing is
touched: descriptors are copied (pidfd_getfd), looked at and closed. What only the stopped, held connection shows (the
queues' contents) is looked at again by the pass itself.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from .core import tcp
from .core.endpoint import Flow
from .core.errors import KernelError, Refused
from .core.tcp import TcpState
from .kernel import netns, process, routing, syscalls, tcpinfo

_SO_PROTOCOL, _SO_DOMAIN, _SO_ACCEPTCONN, _SO_ZEROCOPY = 38, 39, 30, 60
_TCP_ULP = 31
_IPPROTO_MPTCP = 262


@dataclass(frozen=True)
class Connection:
    """A TCP socket of a process. `why_not` is None where it can be passed; `hint` then is what could be done about
    it."""

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
    """Every TCP socket of the process, or of all processes that may be looked at."""
    pids = [pid] if pid is not None else sorted(process.processes())
    by_process: dict[int, dict[int, list[int]]] = {}
    for one in pids:
        try:
            links = process.descriptors(one)
        except Refused:
            if pid is not None:
                raise
            continue
        by_inode = by_process.setdefault(one, {})
        for number, link in links.items():
            inode = process.socket_inode(link)
            if inode is not None:
                by_inode.setdefault(inode, []).append(number)
    wanted = {inode for found in by_process.values() for inode in found}
    holding = process.holders(wanted)
    for one, found in by_process.items():
        if not found:
            continue
        try:
            pidfd = syscalls.pidfd_open(one)
        except KernelError:
            continue
        try:
            for inode, numbers in found.items():
                try:
                    result = _examine(one, pidfd, inode, tuple(numbers), holding[inode])
                except (KernelError, Refused):
                    continue
                if isinstance(result, Connection):
                    yield _but_for_a_local_peer(result)
        finally:
            os.close(pidfd)


def _examine(pid: int, pidfd: int, inode: int, numbers: tuple[int, ...], holding: set[int]) -> Connection | str:
    """A TCP socket as a Connection; for anything else, what it is. Refused where it cannot be had."""
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
            return "is a UDP socket, not a TCP connection"
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
        why_not, hint = _obstacle(sock, info, listening, flow, others)
        return Connection(
            pid=pid, process_name=process.name(pid), descriptors=numbers, inode=inode, state=info.state, flow=flow,
            unread=0 if listening else tcpinfo.unread_bytes(sock),
            unacknowledged=0 if listening else tcpinfo.unacknowledged_bytes(sock),
            cookie=tcpinfo.cookie(sock), why_not=why_not, hint=hint, shared_with=others)


def _obstacle(sock: socket.socket, info: tcpinfo.TcpInfo, listening: bool, flow: Flow | None,
              others: tuple[int, ...]) -> tuple[str | None, str]:
    """The first thing that forbids the pass, as what the descriptor is, and what to do about it."""
    if listening:
        return "is a listening socket, which has no peer", ""
    if info.state not in tcp.PASSABLE_STATES or flow is None:
        return f"is in state {info.state.label}", "only established and half-closed (CLOSE-WAIT) connections are passed"
    if others:
        return (f"is shared with process {', '.join(map(str, others[:4]))}",
                "every process that could use the connection would have to give it up")
    if tcpinfo.has_urgent_data(sock):
        return "has urgent data waiting, which cannot be carried", "try again once the program has read it"
    if info.options & tcp.OPT_USEC_TS:
        return "uses microsecond timestamps, which cannot be carried", ""
    if ulp := _upper_protocol(sock):
        return f"has the kernel protocol {ulp!r} on top, which cannot be carried", ""
    if sock.getsockopt(socket.SOL_SOCKET, _SO_ZEROCOPY):
        return "uses MSG_ZEROCOPY, whose completions would be lost", ""
    if flow.local.address.is_loopback or flow.peer.address.is_loopback:
        return "is a loopback connection, which no other host can continue", ""
    if flow.peer.address.is_multicast or flow.peer.address.is_link_local:
        return f"has the peer {flow.peer.address}, which has a meaning on its own link only", ""
    return None, ""


def _upper_protocol(sock: socket.socket) -> str:
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).split(b"\0")[0].decode("ascii", "replace")
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.ENOTCONN):
            return ""
        raise


def _but_for_a_local_peer(connection: Connection) -> Connection:
    if connection.why_not is None:
        try:
            refuse_local_peer(connection)
        except Refused as error:
            return replace(connection, why_not=error.message, hint=error.hint)
    return connection


def refuse_local_peer(connection: Connection) -> None:
    """Refused where the peer is on the origin's own host: its packets never pass the hooks that hold and forward."""
    flow = connection.flow
    if flow is None:
        return
    with netns.enter(process.network_namespace(connection.pid)):
        if routing.is_local(flow.peer.address):
            raise Refused(f"the peer {flow.peer} is on the origin host itself",
                          hint="its packets cannot be sent on to another host")

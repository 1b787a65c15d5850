"""Into a descriptor that a program has: whatever TCP socket that is becomes the connection (in_place.py). What it was
connected to until then hears nothing of its end, so it should be one that waits for nothing: made for this, or to a
host that has gone.
"""

from __future__ import annotations

import os
import socket

from ..core.endpoint import Flow
from ..core.errors import KernelError, Refused
from ..core.tcp import TcpState
from ..kernel import process, tcpinfo
from . import Ground, in_place
from .in_place import IntoProgram, ProgramSocket, named

_SO_PROTOCOL, _SO_DOMAIN = 38, 39


class ToDescriptor(IntoProgram):
    """Nothing is done to the program before the freeze."""

    def __init__(self, found: ProgramSocket) -> None:
        super().__init__(f"pid:{found.program.pid}:{found.descriptor}", frozenset({found.program.pid}))
        self._found = found

    def arrange(self, flow: Flow, ground: Ground) -> None:
        in_place.refuse_prologue(ground)
        ground.admit(self.takers())
        self._take(self._found, ground.journal)

    def discard(self, pass_id: str) -> None:
        """A socket that was not emptied yet goes on as it was."""
        if self._taken is not None and self._taken.is_emptied:
            super().discard(pass_id)
        self._taken = None


def is_tcp(pid: int, descriptor: int) -> bool:
    """A TCP socket; Refused where the process has no such descriptor."""
    link = process.descriptors(pid).get(descriptor)
    if link is None:
        raise Refused(f"{named(pid)} has no descriptor {descriptor}", hint=f"ls -l /proc/{pid}/fd")
    if process.socket_inode(link) is None:
        return False
    with in_place.borrow(pid, descriptor) as sock:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN) in (socket.AF_INET, socket.AF_INET6) \
            and sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL) == socket.IPPROTO_TCP


def at(pid: int, descriptor: int, flow: Flow) -> ToDescriptor:
    """Refused, with the reason, where this TCP socket cannot become this connection."""
    program = in_place.check_program(pid)
    what = f"descriptor {descriptor} of {named(pid)}"
    inode = process.socket_inode(process.descriptors(pid).get(descriptor, ""))
    if inode is None:
        raise Refused(f"{named(pid)} has closed descriptor {descriptor}")
    with in_place.borrow(pid, descriptor) as sock:
        family = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
        if tcpinfo.read(sock).state is TcpState.LISTEN:
            raise Refused(f"{what} listens", hint=f"--into accept:{pid}")
        if family == socket.AF_INET and flow.ip_version == 6:
            raise Refused(f"{what} is an IPv4 socket, and the connection is IPv6")
        if family == socket.AF_INET6 and flow.ip_version == 4 and _is_ipv6_only(sock):
            raise Refused(f"{what} is an IPv6 socket that takes no IPv4 (IPV6_V6ONLY), and the connection is IPv4")
        found = ProgramSocket(program, descriptor, inode, tcpinfo.cookie(sock))
    sharing = process.holders({inode})[inode] - {pid, os.getpid()}
    if sharing:
        raise Refused(f"{what} is shared with process {', '.join(map(str, sorted(sharing)[:6]))}",
                      hint="every process that could use it would have to stand still")
    return ToDescriptor(found)


def _is_ipv6_only(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))
    except OSError as error:
        raise KernelError("getsockopt(IPV6_V6ONLY)", error.errno or 0, error.strerror or "") from None

"""A connected UDP socket: read its state without changing it, do the steps that re-create it, end it
(net/ipv4/udp.c, net/core/datagram.c).

The receive queue is read by looking: SO_PEEK_OFF leads from datagram to datagram, and each look shows one of them, with
its boundaries. A program that is killed meanwhile leaves nothing but the options that it put there.

A datagram without bytes is shown once only: the kernel passes over those that were looked at (`peeked`,
__skb_try_recv_from_queue). So behind others one is missed that was looked at before, by the program itself or by a pass
that was undone. At the head it is seen all the same, without an offset.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator

from ..core.datagram import LONGEST, Datagram, DatagramState
from ..core.datagramplan import Deafen, Deliver, Hear
from ..core.datagramplan import Step as DatagramStep
from ..core.endpoint import Flow
from ..core.errors import KernelError, Refused
from ..core.options import OptionValue
from . import tcpinfo
from .rawdatagram import build_datagram, build_refusal
from .rawpacket import Injector
from .repair import Restorer
from .syscalls import check, failing, libc

_SO_ATTACH_FILTER, _SO_DETACH_FILTER, _SO_GET_FILTER, _SO_PEEK_OFF, _SO_MEMINFO = 26, 27, 26, 42, 55
_RMEM_ALLOC = 0  # linux/sock_diag.h, SK_MEMINFO_RMEM_ALLOC
_IP_RECVTTL, _IP_RECVTOS, _IPV6_RECVHOPLIMIT, _IPV6_RECVTCLASS = 12, 13, 51, 66
_IP_TOS, _IP_TTL, _IPV6_HOPLIMIT, _IPV6_TCLASS = 1, 2, 52, 67
_UDP, _UDP_GRO = 17, 104  # linux/udp.h
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)  # struct sock_filter: BPF_RET | BPF_K, 0 bytes of the packet
_ANCILLARY_BYTES = 512
_CORK_TIMEOUT_S = 0.05
_LOOK_AGAIN_S = 0.0002
_ARRIVES_S = 1.0
_TOLD_S = 0.05


# -- reading ----------------------------------------------------------------------------------------------------------

def read_state(sock: socket.socket, options: dict[str, OptionValue], nonblocking: bool) -> DatagramState:
    """The state of a held connection whose program is stopped. Refused where it turns out that it cannot be carried."""
    flow = tcpinfo.flow_of(sock)
    if has_error(sock):
        raise Refused("an error waits at the socket, which cannot be carried", hint="try again once it has been read")
    try:
        return DatagramState(flow, tuple(_queue(sock, flow)), options, nonblocking)
    except ValueError as error:
        raise Refused(f"the connection's state cannot be carried: {error}") from None


def has_error(sock: socket.socket) -> bool:
    """An error that the program has not been told (SO_ERROR, or its error queue): any look would take it away."""
    poller = select.poll()
    poller.register(sock, 0)
    return any(events & select.POLLERR for _number, events in poller.poll(0))


def is_connected(sock: socket.socket) -> bool:
    try:
        tcpinfo.flow_of(sock)
        return True
    except (KernelError, ValueError):
        return False


def queue_memory(sock: socket.socket) -> int:
    """Of the receive queue, in bytes as the kernel counts them: what comes or is read changes it."""
    with failing("getsockopt(SO_MEMINFO)"):
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
    return int(struct.unpack_from("=I", data, 4 * _RMEM_ALLOC)[0])


def has_corked(sock: socket.socket) -> bool:
    """The program has begun a datagram and not finished it (UDP_CORK, MSG_MORE). What is under way to the wire counts
    as well (sk_wmem_alloc), but not for long."""
    deadline = time.monotonic() + _CORK_TIMEOUT_S
    while tcpinfo.bytes_below(sock):
        if time.monotonic() > deadline:
            return True
        time.sleep(_LOOK_AGAIN_S)
    return False


def _queue(sock: socket.socket, flow: Flow) -> Iterator[Datagram]:
    wanted = [(socket.IPPROTO_IP, _IP_RECVTTL, 1), (socket.IPPROTO_IP, _IP_RECVTOS, 1)]
    if sock.family == socket.AF_INET6:
        wanted += [(socket.IPPROTO_IPV6, _IPV6_RECVHOPLIMIT, 1), (socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)]
    with _options_for_now(sock, [*wanted, (socket.SOL_SOCKET, _SO_PEEK_OFF, -1)]):
        head = _look(sock, flow)
        if head is not None and not head[0].payload:
            yield from head
        with failing("setsockopt(SO_PEEK_OFF)"):
            sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
        while (found := _look(sock, flow)) is not None:
            yield from found


@contextlib.contextmanager
def _options_for_now(sock: socket.socket, wanted: list[tuple[int, int, int]]) -> Iterator[None]:
    with failing("getsockopt of what a look shows"):
        before = [(level, number, sock.getsockopt(level, number)) for level, number, _value in wanted]
    try:
        with failing("setsockopt of what a look shows"):
            for level, number, value in wanted:
                sock.setsockopt(level, number, value)
        yield
    finally:
        with failing("setsockopt of what a look shows"):
            for level, number, value in before:
                sock.setsockopt(level, number, value)


def _look(sock: socket.socket, flow: Flow) -> list[Datagram] | None:
    """The next datagram; several where the kernel has put them together (UDP_GRO); None where there is none."""
    try:
        with failing("recvmsg(MSG_PEEK)"):
            payload, ancillary, flags, _address = sock.recvmsg(LONGEST[6] + 1, _ANCILLARY_BYTES,
                                                               socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except KernelError as error:
        if error.errno == errno.EAGAIN:
            return None
        raise
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        raise Refused("the kernel showed only a part of a datagram that waits")
    said = {(level, kind): int.from_bytes(data[:4], sys.byteorder) for level, kind, data in ancillary}
    if flow.ip_version == 4:
        hops, traffic_class = said.get((0, _IP_TTL)), said.get((0, _IP_TOS))
    else:
        hops, traffic_class = said.get((41, _IPV6_HOPLIMIT)), said.get((41, _IPV6_TCLASS))
    if hops is None or traffic_class is None:
        raise Refused("the kernel does not tell what the headers of a datagram that waits said")
    size = said.get((_UDP, _UDP_GRO)) or len(payload) or 1
    return [Datagram(payload[at:at + size], max(1, hops), traffic_class)
            for at in range(0, max(1, len(payload)), size)]


# -- restoring --------------------------------------------------------------------------------------------------------

def has_filter(sock: socket.socket) -> bool:
    return _filter_length(sock, None, 0) > 0


def is_deaf(sock: socket.socket) -> bool:
    """It has the filter of a dormant one. Needs no privilege."""
    if _filter_length(sock, None, 0) != 1:
        return False
    buffer = ctypes.create_string_buffer(len(_DROP_ALL))
    return _filter_length(sock, buffer, 1) == 1 and buffer.raw == _DROP_ALL


def _filter_length(sock: socket.socket, buffer: ctypes.Array[ctypes.c_char] | None, room: int) -> int:
    """In instructions of 8 bytes, as `room` is, which Python's getsockopt does not know (net/core/filter.c,
    sk_get_filter)."""
    length = ctypes.c_uint32(room)
    check("getsockopt(SO_GET_FILTER)",
          libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, _SO_GET_FILTER, buffer, ctypes.byref(length)))
    return length.value


class DatagramRestorer:
    """Does the steps of core/datagramplan.py on one socket. `injector`: a hand for packets, asked for when needed.
    `notes`: what could not be carried and does no harm."""

    def __init__(self, sock: socket.socket, flow: Flow, *, transparent: bool, injector: Callable[[], Injector]) -> None:
        self.notes: list[str] = []
        self._sock, self._flow = sock, flow
        self._injector = injector
        self._common = Restorer(sock, transparent=transparent, inject=lambda _segment: None)

    def run(self, steps: list[DatagramStep]) -> None:
        """Do them in order; KernelError (or Refused) names the call that failed."""
        self._common.reports = self.notes
        for step in steps:
            match step:
                case Deafen():
                    self._deafen()
                case Hear():
                    if is_deaf(self._sock):
                        with failing("setsockopt(SO_DETACH_FILTER)"):
                            self._sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
                case Deliver(datagram):
                    self._deliver(datagram)
                case _:
                    self._common.do(step)

    def _deafen(self) -> None:
        program = ctypes.create_string_buffer(_DROP_ALL)
        with failing("setsockopt(SO_ATTACH_FILTER)"):
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER,
                                  struct.pack("HL", 1, ctypes.addressof(program)))

    def _deliver(self, datagram: Datagram) -> None:
        """It has come before the next one is made."""
        flow, before = self._flow, queue_memory(self._sock)
        for packet in build_datagram(flow.peer, flow.local, datagram.payload, hops=datagram.hops,
                                     traffic_class=datagram.traffic_class):
            self._injector().hand_over(flow, packet)
        _until(lambda: queue_memory(self._sock) > before, "a datagram that waited did not reach the restored socket")


def _until(holds: Callable[[], bool], problem: str, within_s: float = _ARRIVES_S) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            raise Refused(problem)
        time.sleep(_LOOK_AGAIN_S)


# -- the end ----------------------------------------------------------------------------------------------------------

def end(sock: socket.socket, flow: Flow, injector: Injector) -> None:
    """The old endpoint can neither hear nor speak any more, whatever rules stand: the program's next operation fails
    with ECONNREFUSED, as where the peer's port is closed; later, what it sends fails with EPIPE, and nothing comes.

    What waits is the destination's now: it is taken out. Disconnected, a socket that was bound would hear anybody; so
    its peer is its own address from now on. There is no end of stream to show: a socket that is shut down for reading
    is readable for ever, and a program that does not block would spin (net/core/datagram.c, datagram_poll)."""
    _drain(sock)
    injector.hand_over(flow, build_refusal(flow))
    with contextlib.suppress(Refused):  # a kernel that does not take it: then the program is not told
        _until(lambda: has_error(sock), "", _TOLD_S)
    _turn_away(sock)


def retire(sock: socket.socket) -> None:
    """As `end`, of a socket whose program knows nothing of the connection, and is told nothing."""
    _drain(sock)
    _turn_away(sock)


def _drain(sock: socket.socket) -> None:
    while not _is_empty(sock):
        pass


def _turn_away(sock: socket.socket) -> None:
    with failing("setsockopt(SO_REUSEADDR)"):  # or it would be in the way where the connection comes home
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    with failing("connect to itself"):
        sock.connect(sock.getsockname())


def _is_empty(sock: socket.socket) -> bool:
    """Take one datagram out, if there is one."""
    try:
        with failing("recv"):
            sock.recv(1, socket.MSG_DONTWAIT)
    except KernelError as error:
        return error.errno == errno.EAGAIN  # an error that was waiting is gone with it
    return False

"""struct tcp_info and the two queue ioctls: what the kernel tells of a connection without repair mode (linux/tcp.h)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import select
import socket
import struct
import termios
from dataclasses import dataclass

from ..core.endpoint import Flow
from ..core.errors import KernelError
from ..core.state import Congestion
from ..core.tcp import TcpState
from .syscalls import failing, libc

SIOCINQ = termios.FIONREAD
SIOCOUTQ = termios.TIOCOUTQ
_SIOCOUTQNSD = 0x894B  # linux/sockios.h
_SO_COOKIE, _SO_MEMINFO = 57, 55
_SK_MEMINFO_RMEM_ALLOC, _SK_MEMINFO_WMEM_ALLOC = 0, 2  # linux/sock_diag.h

_SO_PEEK_OFF = 42
_TCP_AO_INFO, _TCP_AO_INFO_BYTES = 40, 64  # linux/tcp.h, struct tcp_ao_info_opt

_HEAD = struct.Struct("=8B24I")
_DATA_SEGMENTS = struct.Struct("=48x2I")  # behind it: tcpi_data_segs_in, _out (Linux 4.6)
_PATH_MTU = struct.Struct("=60xI")
_OUT_OF_ORDER = struct.Struct("=224xI")  # tcpi_rcv_ooopack (Linux 5.4)


@dataclass(frozen=True)
class TcpInfo:
    """The fields we use; times in microseconds unless named otherwise. Data segments count from when this host has the
    connection."""

    state: TcpState
    options: int
    snd_wscale: int
    rcv_wscale: int
    rto_us: int
    snd_mss: int
    unacked: int
    last_data_sent_ms: int
    last_data_recv_ms: int
    rtt_us: int
    rttvar_us: int
    snd_ssthresh: int
    snd_cwnd: int
    total_retrans: int
    data_segments_in: int
    data_segments_out: int


def read(sock: socket.socket) -> TcpInfo:
    with failing("getsockopt(TCP_INFO)"):
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(data) < _HEAD.size + _DATA_SEGMENTS.size:
        raise KernelError("getsockopt(TCP_INFO)", 0, "the kernel's answer is too short")
    fields = _HEAD.unpack_from(data)
    segments_in, segments_out = _DATA_SEGMENTS.unpack_from(data, _HEAD.size)
    scales, words = fields[6], fields[8:]
    return TcpInfo(state=TcpState(fields[0]), options=fields[5], snd_wscale=scales & 15, rcv_wscale=scales >> 4,
                   rto_us=words[0], snd_mss=words[2], unacked=words[4], last_data_sent_ms=words[9],
                   last_data_recv_ms=words[11], rtt_us=words[15], rttvar_us=words[16], snd_ssthresh=words[17],
                   snd_cwnd=words[18], total_retrans=words[23],
                   data_segments_in=segments_in, data_segments_out=segments_out)


def path_mtu(sock: socket.socket) -> int:
    """Bytes, as the connection knows it by now (tcpi_pmtu)."""
    with failing("getsockopt(TCP_INFO)"):
        return int(_PATH_MTU.unpack_from(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))[0])


def learnt(sock: socket.socket) -> Congestion:
    """What the socket knows of its path, by now: an idle one knows less."""
    info = read(sock)
    return Congestion(info.snd_cwnd, info.snd_ssthresh, info.rtt_us, info.rttvar_us,
                      info.rto_us).after(info.last_data_sent_ms * 1000)


def _ioctl(sock: socket.socket, name: str, request: int) -> int:
    with failing(name):
        return int(struct.unpack("=i", fcntl.ioctl(sock.fileno(), request, b"\0\0\0\0"))[0])


def unread_bytes(sock: socket.socket) -> int:
    """rcv_nxt - copied_seq, without the peer's FIN; stops at an urgent mark."""
    return _ioctl(sock, "ioctl(SIOCINQ)", SIOCINQ)


def unacknowledged_bytes(sock: socket.socket) -> int:
    """write_seq - snd_una: in flight and unsent. Our FIN counts as one as long as it is not acknowledged."""
    return _ioctl(sock, "ioctl(SIOCOUTQ)", SIOCOUTQ)


def unsent_bytes(sock: socket.socket) -> int:
    """write_seq - snd_nxt. Our FIN counts as one as long as it was not sent."""
    return _ioctl(sock, "ioctl(SIOCOUTQNSD)", _SIOCOUTQNSD)


def first_unread(sock: socket.socket, count: int) -> bytes:
    """The first bytes of the receive queue, which stay there. b"" where there are none, or the program has a mark of
    its own for looking at them (SO_PEEK_OFF), which would move."""
    with failing("getsockopt(SO_PEEK_OFF)"):
        if sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF) != -1:
            return b""
    if not unread_bytes(sock):  # a look at an empty queue would take away an error that is the program's to read
        return b""
    try:
        return sock.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:  # the program has read it since
        return b""


def cookie(sock: socket.socket) -> int:
    """The socket's own number, never used twice since boot (SO_COOKIE, Linux 4.12)."""
    with failing("getsockopt(SO_COOKIE)"):
        return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))[0])


def bytes_below(sock: socket.socket) -> int:
    """Bytes of this socket that are in qdiscs, drivers or packet queues (sk_wmem_alloc), by their memory."""
    return _memory(sock, _SK_MEMINFO_WMEM_ALLOC)


def has_gap(sock: socket.socket) -> bool:
    """Something lies in the out-of-order queue, as far as that can be told: no interface does. Segments came out of
    order at some time, and the socket has memory for what arrived, of which nothing can be read. False where there is
    something to read, too."""
    with failing("getsockopt(TCP_INFO)"):
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if len(data) < _OUT_OF_ORDER.size or not _OUT_OF_ORDER.unpack_from(data)[0]:
        return False
    return _memory(sock, _SK_MEMINFO_RMEM_ALLOC) > 0 and not unread_bytes(sock)


def _memory(sock: socket.socket, index: int) -> int:
    with failing("getsockopt(SO_MEMINFO)"):
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 64)
    return int(struct.unpack_from("=I", data, 4 * index)[0])


def has_urgent_data(sock: socket.socket) -> bool:
    """Urgent data is waiting: no repair interface carries it, and it would leave a silent hole."""
    return _polls(sock, select.POLLPRI)


def reads_end(sock: socket.socket) -> bool:
    """Behind what is in the receive queue the program reads the end of the stream: the peer's FIN has arrived, or the
    program has shut down for reading (net/ipv4/tcp.c, tcp_poll)."""
    return _polls(sock, select.POLLRDHUP)


def _polls(sock: socket.socket, event: int) -> bool:
    """Others come unasked: POLLHUP once both directions have ended, POLLERR."""
    poller = select.poll()
    poller.register(sock, event)
    return any(found & event for _number, found in poller.poll(0))


def is_authenticated(sock: socket.socket) -> bool:
    """The connection has keys for TCP-AO (Linux 6.7)."""
    return _knows_ao() and _ask_about_ao(sock) != errno.ENOENT


@functools.cache
def _knows_ao() -> bool:
    with failing("socket"), socket.socket() as sock:
        return _ask_about_ao(sock) not in (errno.ENOPROTOOPT, errno.EOPNOTSUPP)


def _ask_about_ao(sock: socket.socket) -> int:
    """The kernel's errno for it: ENOENT of a connection without keys, 0 of one with some."""
    answer, size = ctypes.create_string_buffer(_TCP_AO_INFO_BYTES), ctypes.c_uint32(_TCP_AO_INFO_BYTES)
    failed = libc.getsockopt(sock.fileno(), socket.IPPROTO_TCP, _TCP_AO_INFO, answer, ctypes.byref(size))
    return ctypes.get_errno() if failed else 0


def flow_of(sock: socket.socket) -> Flow:
    """The connection's addresses. KernelError where the socket is not connected."""
    with failing("getpeername"):
        return Flow.of_socket(sock)

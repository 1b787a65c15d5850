"""TCP_REPAIR: read the state of a held connection, and do the steps that re-create it (net/ipv4/tcp.c).

Repair mode is not a freeze: a socket in it still takes and acknowledges data, and its timers still send. So nothing is
read before the packets are held and the program is stopped, and the origin's socket spends as little time in it as
reading takes: 0.05 ms with empty queues, 8 ms with 6 MB each way. `in_repair` always puts the queue selector
back to none before it leaves, since a program that ran with it set would write into its own receive queue.

A socket in repair that is closed for the last time sends nothing: until the commit, the destination may die freely.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

from ..core import tcp
from ..core.errors import KernelError, Refused
from ..core.options import OptionValue
from ..core.refusals import Refusal
from ..core.restoreplan import (
    AllowAnyReuse,
    BeTransparent,
    Bind,
    BindToDevice,
    Connect,
    EnterRepair,
    FillQueue,
    ForceBuffers,
    InjectSegment,
    LeaveRepair,
    LimitWindow,
    QueueFin,
    RecallPath,
    SetMaxSegment,
    SetNegotiated,
    SetOption,
    SetSequence,
    SetTimestamp,
    SetWindow,
    ShutRead,
    Step,
    WriteUnsent,
)
from ..core.state import ConnectionState, Negotiated, Window
from ..core.tcp import TcpState
from . import sockopt, tcpinfo
from .syscalls import failing

# linux/tcp.h
TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS = 19, 20, 21, 22
TCP_TIMESTAMP, TCP_REPAIR_WINDOW, TCP_MAXSEG, TCP_WINDOW_CLAMP = 24, 29, 2, 10
REPAIR_ON, REPAIR_OFF_PROBE, REPAIR_OFF_SILENT = 1, 0, -1
_NO_QUEUE, _RECV_QUEUE, _SEND_QUEUE = 0, 1, 2
_QUEUES = {"receive": _RECV_QUEUE, "send": _SEND_QUEUE}
_OPT_MSS, _OPT_WINDOW, _OPT_SACK_PERM, _OPT_TIMESTAMP = 2, 3, 4, 8
_WINDOW = struct.Struct("=5I")

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_IP_TRANSPARENT, _IPV6_TRANSPARENT = 19, 75
_PEEK_SLACK = 1 << 20  # the retransmit queue's head may be one partly acknowledged skb longer than SIOCOUTQ says
_CHUNK = 1 << 20
_WRITE_TIMEOUT_S = 5
_ACKNOWLEDGED_TIMEOUT_S, _LOOK_AGAIN_S = 0.05, 0.0002


def _set(sock: socket.socket, name: str, number: int, value: int | bytes) -> None:
    with failing(f"setsockopt({name})"):
        sock.setsockopt(socket.IPPROTO_TCP, number, value)


def _get(sock: socket.socket, name: str, number: int) -> int:
    with failing(f"getsockopt({name})"):
        return sock.getsockopt(socket.IPPROTO_TCP, number) & 0xFFFFFFFF


def set_repair(sock: socket.socket, value: int) -> None:
    """REPAIR_ON; REPAIR_OFF_PROBE (ESTABLISHED sends a window probe); REPAIR_OFF_SILENT. Needs CAP_NET_ADMIN over the
    socket's network namespace."""
    _set(sock, "TCP_REPAIR", TCP_REPAIR, value)


def is_in_repair(sock: socket.socket) -> bool:
    """Needs no privilege."""
    return bool(_get(sock, "TCP_REPAIR", TCP_REPAIR))


@contextlib.contextmanager
def in_repair(sock: socket.socket, leave: int = REPAIR_OFF_SILENT) -> Iterator[None]:
    """Repair mode for the block. SO_REUSEADDR, which leaving it clears, is put back."""
    reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    set_repair(sock, REPAIR_ON)
    try:
        yield
    finally:
        _set(sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _NO_QUEUE)
        set_repair(sock, leave)
        with failing("setsockopt(SO_REUSEADDR)"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def send_window_probe(sock: socket.socket) -> None:
    """Make an ESTABLISHED socket send one segment at snd_una - 1, which also carries an ACK that is owed."""
    with in_repair(sock, leave=REPAIR_OFF_PROBE):
        pass


def has_usec_timestamps() -> bool:
    """This kernel can count timestamps in microseconds, as an odd clock tells it to (Linux 6.7, 614e8316aa4c)."""
    with failing("socket"), socket.socket() as sock, in_repair(sock):
        _set(sock, "TCP_TIMESTAMP", TCP_TIMESTAMP, 1)
        return bool(tcpinfo.read(sock).options & tcp.OPT_USEC_TS)


# -- reading ----------------------------------------------------------------------------------------------------------

def sequences(sock: socket.socket) -> tuple[int, int]:
    """(rcv_nxt, write_seq): what must not have moved between the reading and the offer. Enters and leaves repair."""
    with in_repair(sock):
        return _sequence(sock, _RECV_QUEUE), _sequence(sock, _SEND_QUEUE)


def window_edges(sock: socket.socket) -> tuple[int, int]:
    """(rcv_wup, snd_una). Enters and leaves repair."""
    with in_repair(sock):
        snd_una = tcp.add(_sequence(sock, _SEND_QUEUE), -tcpinfo.unacknowledged_bytes(sock))
        return _read_window(sock).rcv_wup, snd_una


def owes_ack(sock: socket.socket) -> bool:
    """The peer has sent what no segment of ours has acknowledged. Enters and leaves repair."""
    with in_repair(sock):
        return _sequence(sock, _RECV_QUEUE) != _read_window(sock).rcv_wup


def _read_window(sock: socket.socket) -> Window:
    with failing("getsockopt(TCP_REPAIR_WINDOW)"):
        return Window(*_WINDOW.unpack(sock.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, _WINDOW.size)))


def _sequence(sock: socket.socket, queue: int) -> int:
    _set(sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, queue)
    return _get(sock, "TCP_QUEUE_SEQ", TCP_QUEUE_SEQ)


def read_state(sock: socket.socket, options: dict[str, OptionValue], nonblocking: bool,
               ts_recent: int | None, last_tsval: int | None = None) -> ConnectionState:
    """The state of a held connection whose program is stopped. `options` were read before, since repair hides
    SO_REUSEADDR. `last_tsval`, of the last segment that left: a paced one bears the time at which it may leave, which
    is ahead of the clock (net/ipv4/tcp_output.c, tcp_wstamp_ns; 11 ms seen at 6 MB/s). Refused where the state turns
    out to be one that cannot be carried."""
    flow = tcpinfo.flow_of(sock)
    info, learnt = tcpinfo.read(sock), tcpinfo.learnt(sock)
    shut_read = info.state not in tcp.FIN_RECEIVED_STATES and tcpinfo.reads_end(sock)
    peek_offset = options.get("SO_PEEK_OFF", -1)
    if peek_offset != -1:  # it would shift what is peeked
        with failing("setsockopt(SO_PEEK_OFF)"):
            sock.setsockopt(socket.SOL_SOCKET, 42, -1)
    try:
        with in_repair(sock):
            # Before the send queue is selected: while it is, what a timer sends (pacing, small queues) is counted as
            # sent and never leaves (net/ipv4/tcp_output.c, tcp_write_xmit: "skip network transmission").
            unsent = tcpinfo.unsent_bytes(sock)
            fin_outstanding = int(info.state in tcp.FIN_QUEUED_STATES and info.state is not TcpState.FIN_WAIT2)
            fin_unsent = bool(fin_outstanding and unsent)  # nothing can be unsent in front of a FIN that was sent
            rcv_nxt, write_seq = _sequence(sock, _RECV_QUEUE), _sequence(sock, _SEND_QUEUE)
            unread, outstanding = tcpinfo.unread_bytes(sock), tcpinfo.unacknowledged_bytes(sock)
            outgoing = _peek(sock, _SEND_QUEUE, outstanding - fin_outstanding, _PEEK_SLACK)
            received = _peek(sock, _RECV_QUEUE, unread, 0)
            mss_clamp = _get(sock, "TCP_MAXSEG", TCP_MAXSEG)
            timestamp = _get(sock, "TCP_TIMESTAMP", TCP_TIMESTAMP)
            if last_tsval is not None and tcp.distance(last_tsval, timestamp) > 0:
                timestamp = last_tsval
            timestamp = timestamp & ~1 | bool(info.options & tcp.OPT_USEC_TS)
            window = _read_window(sock)
    finally:
        if peek_offset != -1 and isinstance(peek_offset, int):
            with failing("setsockopt(SO_PEEK_OFF)"):
                sock.setsockopt(socket.SOL_SOCKET, 42, peek_offset)
    has = info.options
    timestamps = bool(has & tcp.OPT_TIMESTAMPS)
    try:
        return ConnectionState(
            flow=flow, tcp_state=info.state, rcv_nxt=rcv_nxt, received=received, write_seq=write_seq,
            outgoing=outgoing, unsent=unsent - fin_unsent, fin_unsent=fin_unsent, shut_read=shut_read,
            negotiated=Negotiated(mss_clamp, bool(has & tcp.OPT_WSCALE), info.snd_wscale, info.rcv_wscale,
                                  bool(has & tcp.OPT_SACK), timestamps, bool(has & tcp.OPT_ECN)),
            window=window, timestamp=timestamp if timestamps else None, ts_recent=ts_recent if timestamps else None,
            congestion=learnt,
            options=options, nonblocking=nonblocking)
    except ValueError as error:
        raise Refused(f"the connection's state cannot be carried: {error}") from None


def _peek(sock: socket.socket, queue: int, wanted: int, slack: int) -> bytes:
    """The last `wanted` bytes of a queue. After a partial acknowledgement the peek of the send queue starts at the head
    of an skb whose first bytes are acknowledged already (SIOCOUTQ 700, peeked 1000): the end is what counts."""
    if not wanted:
        return b""
    _set(sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, queue)
    buffer = bytearray(wanted + slack)
    with failing("recv(MSG_PEEK) in repair"):
        got = sock.recv_into(buffer, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if not wanted <= got <= len(buffer):
        raise Refused(f"the kernel showed {got} bytes of a queue that holds {wanted}")
    return bytes(memoryview(buffer)[got - wanted:got])


# -- restoring --------------------------------------------------------------------------------------------------------

class Restorer:
    """Does the steps of `core.restoreplan` on one socket. `inject` delivers a segment of the peer's to it;
    `transparent` says that the local address is not this host's own. `reports` collects what was harmless."""

    def __init__(self, sock: socket.socket, *, transparent: bool, inject: Callable[[InjectSegment], None]) -> None:
        self.sock = sock
        self.reports: list[str] = []
        self._transparent = transparent
        self._inject = inject

    def run(self, steps: list[Step]) -> None:
        """Do them in order; KernelError (or Refused) names the call that failed."""
        for step in steps:
            self.do(step)

    def do(self, step: Step) -> None:
        sock = self.sock
        match step:
            case AllowAnyReuse():
                with failing("setsockopt(SO_REUSEADDR)"):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            case EnterRepair():
                set_repair(sock, REPAIR_ON)
            case ForceBuffers(receive, send):
                for name, number, size in (("SO_RCVBUFFORCE", _SO_RCVBUFFORCE, receive),
                                           ("SO_SNDBUFFORCE", _SO_SNDBUFFORCE, send)):
                    with failing(f"setsockopt({name})"):
                        sock.setsockopt(socket.SOL_SOCKET, number, min(size, (1 << 30) - 1))
            case BeTransparent():
                self._be_transparent()
            case SetMaxSegment(mss):
                _set(sock, "TCP_MAXSEG", TCP_MAXSEG, mss)
            case LimitWindow(size):
                _set(sock, "TCP_WINDOW_CLAMP", TCP_WINDOW_CLAMP, size)
            case Bind(local):
                with failing(f"bind({local})"):
                    sock.bind(self._address(str(local.address), local.port))
            case SetSequence(queue, sequence):
                _set(sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _QUEUES[queue])
                _set(sock, "TCP_QUEUE_SEQ", TCP_QUEUE_SEQ, struct.pack("=I", sequence))
                _set(sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _NO_QUEUE)
            case Connect(peer):
                with failing(f"connect({peer})"):
                    sock.connect(self._address(str(peer.address), peer.port))
            case SetNegotiated():
                self._set_negotiated(step)
            case SetTimestamp(value):
                _set(sock, "TCP_TIMESTAMP", TCP_TIMESTAMP, struct.pack("=I", value))
                if value & 1 and not tcpinfo.read(sock).options & tcp.OPT_USEC_TS:
                    raise Refused("this kernel has no microsecond timestamps", refusal=Refusal.USEC_TIMESTAMPS)
            case RecallPath():
                self._recall(step)
            case FillQueue(queue, data):
                self._fill(_QUEUES[queue], data)
            case SetWindow(window):
                _set(sock, "TCP_REPAIR_WINDOW", TCP_REPAIR_WINDOW,
                     _WINDOW.pack(window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd, window.rcv_wup))
            case InjectSegment():
                self._inject(step)
            case SetOption(name, value):
                report = sockopt.write_or_report(sock, name, value)
                self.reports += [report] if report else []
            case LeaveRepair(probe):
                set_repair(sock, REPAIR_OFF_PROBE if probe else REPAIR_OFF_SILENT)
            case QueueFin(sent):
                self._queue_fin(sent)
            case ShutRead():
                with failing("shutdown(SHUT_RD)"):
                    sock.shutdown(socket.SHUT_RD)
            case BindToDevice(name):
                sockopt.write(sock, "SO_BINDTODEVICE", name)
            case WriteUnsent(data):
                self._write(data)

    def _address(self, address: str, port: int) -> tuple[str, int]:
        mapped = self.sock.family == socket.AF_INET6 and ":" not in address
        return (f"::ffff:{address}" if mapped else address), port

    def _be_transparent(self) -> None:
        if not self._transparent:
            return
        with failing("setsockopt(IP_TRANSPARENT)"):
            if self.sock.family == socket.AF_INET6:
                self.sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            else:
                self.sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)

    def _set_negotiated(self, step: SetNegotiated) -> None:
        pairs = [(_OPT_MSS, step.mss_clamp)]
        if step.wscale is not None:
            pairs.append((_OPT_WINDOW, step.wscale[0] | step.wscale[1] << 16))
        if step.sack:
            pairs.append((_OPT_SACK_PERM, 0))
        if step.timestamps:
            pairs.append((_OPT_TIMESTAMP, 0))
        _set(self.sock, "TCP_REPAIR_OPTIONS", TCP_REPAIR_OPTIONS, b"".join(struct.pack("=II", *pair) for pair in pairs))

    def _recall(self, step: RecallPath) -> None:
        """Refused where one of those bytes stays: they are not the stream's, and must not leave."""
        with self._growing():
            self._fill(_SEND_QUEUE, bytes(step.bytes_))
            if step.clock is not None:  # at the last moment: the echo is so much older
                _set(self.sock, "TCP_TIMESTAMP", TCP_TIMESTAMP, struct.pack("=I", step.clock))
            self._inject(step.segment)
            self._await_acknowledged()

    @contextlib.contextmanager
    def _growing(self) -> Iterator[None]:
        """Under reno, which every kernel has, and which lets the window grow by what is acknowledged. The one that the
        socket has begins anew afterwards, with that window and that round trip. Where a route forbids another (EPERM),
        it sees it all itself."""
        with failing("getsockopt(TCP_CONGESTION)"):
            usual = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")
        is_free = True
        try:
            _set(self.sock, "TCP_CONGESTION", socket.TCP_CONGESTION, b"reno")
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            is_free = False
        yield
        if is_free:
            _set(self.sock, "TCP_CONGESTION", socket.TCP_CONGESTION, usual)

    def _await_acknowledged(self) -> None:
        deadline = time.monotonic() + _ACKNOWLEDGED_TIMEOUT_S
        while tcpinfo.unacknowledged_bytes(self.sock):
            if time.monotonic() > deadline:
                raise Refused("the destination's kernel does not take a segment that was made for the connection",
                              hint="does a firewall there drop packets on the loopback interface? "
                                   "--congestion restart needs no such segment")
            time.sleep(_LOOK_AGAIN_S)

    def _fill(self, queue: int, data: bytes) -> None:
        """send() in repair appends to the chosen queue. One call makes one skb, which may be too large to allocate."""
        _set(self.sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, queue)
        view, chunk = memoryview(data), _CHUNK
        while view:
            try:
                with failing("send in repair"):
                    view = view[self.sock.send(view[:chunk]):]
            except KernelError as error:
                if error.errno not in (errno.ENOMEM, errno.ENOBUFS) or chunk < 2:
                    raise
                chunk //= 2
        _set(self.sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _NO_QUEUE)

    def _queue_fin(self, sent: bool) -> None:
        """shutdown() sends a FIN even in repair, unless the send queue is selected."""
        if sent:
            _set(self.sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _SEND_QUEUE)
        with failing("shutdown(SHUT_WR)"):
            self.sock.shutdown(socket.SHUT_WR)
        if sent:
            _set(self.sock, "TCP_REPAIR_QUEUE", TCP_REPAIR_QUEUE, _NO_QUEUE)

    def _write(self, data: bytes) -> None:
        """The unsent bytes go into the send queue at once: its buffer was made large enough for all of them. Only where
        the kernel is short of memory for all of TCP must they wait for acknowledgements."""
        view = memoryview(data)
        poller = select.poll()
        poller.register(self.sock, select.POLLOUT)
        while view:
            with failing("send of the unsent bytes"):
                try:
                    view = view[self.sock.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL):]
                except BlockingIOError:
                    if not poller.poll(_WRITE_TIMEOUT_S * 1000):
                        raise


def written_since(sock: socket.socket, state: ConnectionState) -> int:
    """How many of the state's unsent bytes are in the restored socket's send queue already, its FIN counted."""
    return tcp.distance(sequences(sock)[1], state.snd_nxt)


def end_silently(sock: socket.socket) -> None:
    """End an endpoint without a packet: no FIN, no RST, even with a full send queue; the program's next operation on it
    fails with ECONNABORTED."""
    set_repair(sock, REPAIR_ON)
    try:
        with failing("connect(AF_UNSPEC)"):
            _disconnect(sock)
    finally:
        set_repair(sock, REPAIR_OFF_SILENT)  # in CLOSE nothing can be sent; left in repair, the program would see EPERM


def end_as_eof(sock: socket.socket) -> None:
    """As `end_silently`, but the program reads a clean end of stream: the pending error is taken away and both
    directions are shut down, which answers ENOTCONN and takes effect (inet_shutdown)."""
    end_silently(sock)
    sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _disconnect(sock: socket.socket) -> None:
    from .syscalls import check, libc
    check("connect(AF_UNSPEC)", libc.connect(sock.fileno(), struct.pack("=H14x", socket.AF_UNSPEC), 16))

"""From a state to the ordered steps that re-create it: order is data, `kernel.repair` knows only how to do one step.

The order and its reasons (kernel = net/ipv4/tcp.c unless another file is named):

dormant, in repair, nothing leaves the host:
  1. SO_REUSEADDR before repair: after it, a bind beside a listener fails with EADDRINUSE.
  2. Buffers large enough for both queues; they get their own sizes back once their queue is filled.
  3. Transparent where the address is not the host's: it binds and connects (IP_FREEBIND only binds).
  4. MSS before connect: later, the send MSS stays at 524 (tcp_sync_mss runs from connect). And where no window scale
     was negotiated, a window that needs none: connect chooses the scale by it (tcp_output.c, tcp_connect_init), and no
     handshake takes that back.
  5. Sequence numbers: legal only in CLOSE.
  6. Connect: in repair, no SYN; then the negotiated options (legal while nothing was sent), then the timestamp clock,
     since connect takes its unit from the route. A socket that is bound to a device is bound to none from here on until
     all the rest is done: segments that are made here come by the loopback device, and it would not hear them.
  7. What was learnt of the path, which has no setter either: window and round trip begin where they were (core/recall).
  8. The queues: received bytes; sent bytes, which go into the retransmit queue. Unsent bytes are not written here.
  9. The window, checked by the kernel against rcv_nxt, so after the receive queue.
 10. Our FIN, if it was sent: shutdown() with the send queue selected puts it into the retransmit queue, unsent
     (tcp_output.c, tcp_write_xmit). And a segment of the peer's, made here: it carries ts_recent, which has no setter,
     the acknowledgement of our FIN if that came (FIN_WAIT2), and the peer's FIN if that came. Which of the two comes
     first decides the state: LAST_ACK is the peer's first, CLOSING is ours. To a FIN behind ours the stack answers at
     once (tcp_input.c, tcp_fin): only a rule keeps that from leaving the host.
active, after the commit:
 11. The clock again, with the time that passed at the origin; only then may a segment leave the host. Then repair off:
     silent (-1), or with a probe (0) where the peer waits for an acknowledgement.
 12. The unsent bytes: earlier than the final repair-off they can hang. In front of them, how they are to be sent
     (TCP_NODELAY, TCP_CORK); behind them our FIN, if it waits there. A peer's FIN has been received by then: CLOSING,
     in which ours was never on the wire, becomes LAST_ACK. The peer has not seen ours when it sends its own, so that it
     is the peer that waits at the end (RFC 9293 3.6, TIME-WAIT).
 13. The options that repair overrides or that act at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from . import tcp
from .endpoint import Endpoint, Flow
from .options import OptionValue, When, applying
from .recall import Recall, recall
from .state import ConnectionState, Window
from .tcp import TcpState

_LARGEST_WINDOW = 65535  # as on the wire
_BUFFER_SLACK = 1 << 20  # skbs cost more than their bytes: truesize is up to twice the payload, plus one chunk

#: By IP_TOS, and by ForceBuffers: to be written though a new socket has the value.
_CHANGED_BY_OTHERS = frozenset({"SO_PRIORITY", "SO_RCVBUF", "SO_BUF_LOCK"})


@dataclass(frozen=True)
class SetOption:
    name: str
    value: OptionValue


@dataclass(frozen=True)
class ForceBuffers:
    """Bytes that each queue must be able to hold while it is filled."""

    receive: int
    send: int


@dataclass(frozen=True)
class AllowAnyReuse:
    pass


@dataclass(frozen=True)
class EnterRepair:
    pass


@dataclass(frozen=True)
class BeTransparent:
    """Only where the local address is not the host's own; the executor knows."""


@dataclass(frozen=True)
class SetMaxSegment:
    mss: int


@dataclass(frozen=True)
class LimitWindow:
    """The largest window that may be announced, in bytes (TCP_WINDOW_CLAMP)."""

    size: int


@dataclass(frozen=True)
class Bind:
    local: Endpoint


@dataclass(frozen=True)
class SetSequence:
    queue: str  # "receive" | "send"
    sequence: int


@dataclass(frozen=True)
class Connect:
    peer: Endpoint


@dataclass(frozen=True)
class SetNegotiated:
    """TCP_REPAIR_OPTIONS; a window scale of None was not negotiated."""

    mss_clamp: int
    wscale: tuple[int, int] | None  # what we shift what the peer announces by, and what we announce by
    sack: bool
    timestamps: bool


@dataclass(frozen=True)
class SetTimestamp:
    """The TSval clock: in milliseconds, even; in microseconds, odd (Linux 6.7, 614e8316aa4c)."""

    value: int


@dataclass(frozen=True)
class FillQueue:
    queue: str  # "receive" | "send"
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class SetWindow:
    window: Window


@dataclass(frozen=True)
class InjectSegment:
    """A segment of the peer's that never was on the wire: see 10 above."""

    sequence: int
    acknowledgement: int
    window: int  # as on the wire: scaled
    timestamp: int | None
    fin: bool
    echo: int = 0  # TSecr


@dataclass(frozen=True)
class RecallPath:
    """Bytes that were acknowledged long ago are put into the send queue as sent ones, and `segment` acknowledges them
    when the clock shows `clock`: see core/recall.py. None of them is ever on any wire."""

    bytes_: int
    clock: int | None
    segment: InjectSegment


@dataclass(frozen=True)
class QueueFin:
    """Our FIN, behind what is in the send queue. `sent`: as one that was sent, into the retransmit queue, in repair."""

    sent: bool


@dataclass(frozen=True)
class ShutRead:
    """The program has shut down for reading."""


@dataclass(frozen=True)
class BindToDevice:
    """By name; to none where it is empty. What SO_BINDTODEVICE does, once more: see 6 above."""

    name: str


@dataclass(frozen=True)
class LeaveRepair:
    probe: bool


@dataclass(frozen=True)
class WriteUnsent:
    data: bytes = field(repr=False)


Step = (SetOption | ForceBuffers | AllowAnyReuse | EnterRepair | BeTransparent | SetMaxSegment | LimitWindow | Bind
        | SetSequence | Connect | SetNegotiated | SetTimestamp | RecallPath | FillQueue | SetWindow | InjectSegment
        | QueueFin | ShutRead | BindToDevice | LeaveRepair | WriteUnsent)


def _options(state: ConnectionState, when: When, fresh: Mapping[str, OptionValue]) -> list[Step]:
    return [SetOption(option.name, state.options[option.name])
            for option in applying(state.flow.socket_family, when) if option.name in state.options
            and (fresh.get(option.name) != state.options[option.name] or option.name in _CHANGED_BY_OTHERS)]


def later_timestamp(timestamp: int, elapsed_ms: int) -> int:
    """The TSval clock `elapsed_ms` after it showed `timestamp`, in the same unit, and never behind what was sent: what
    it showed lacks bit 0, and the time may lack a millisecond."""
    if timestamp & 1:
        return tcp.add(timestamp, (elapsed_ms + 2) * 1000)
    return tcp.add(timestamp, elapsed_ms + 2) & ~1


def dormant_steps(state: ConnectionState, fresh: Mapping[str, OptionValue] | None = None) -> list[Step]:
    """Everything up to a connection that is complete and silent, in repair. `fresh`: the options of a new socket of
    this host, where they are known: what the connection has in common with it needs no step."""
    fresh = fresh or {}
    negotiated, window, fin = state.negotiated, state.window, state.fin_received
    recalled = recall(state.congestion, negotiated) or Recall(0, None)
    steps: list[Step] = [AllowAnyReuse(), EnterRepair(),
                         ForceBuffers(2 * len(state.received) + _BUFFER_SLACK,
                                      2 * (len(state.outgoing) + recalled.bytes_) + _BUFFER_SLACK),
                         BeTransparent(), *_options(state, When.BEFORE_BIND, fresh),
                         SetMaxSegment(min(negotiated.mss_clamp, tcp.MAX_MSS)),
                         *([] if negotiated.wscale else [LimitWindow(tcp.MAX_UNSCALED_WINDOW)]), Bind(state.flow.local),
                         SetSequence("receive", state.copied_seq),
                         SetSequence("send", tcp.add(state.first_outgoing, -recalled.bytes_)),
                         Connect(state.flow.peer),
                         SetNegotiated(negotiated.mss_clamp,
                                       (negotiated.snd_wscale, negotiated.rcv_wscale) if negotiated.wscale else None,
                                       negotiated.sack, negotiated.timestamps)]
    device = str(state.options.get("SO_BINDTODEVICE", ""))
    if device:
        steps.append(BindToDevice(""))
    if state.timestamp is not None:
        steps.append(SetTimestamp(later_timestamp(state.timestamp, 0)))
    if recalled.bytes_:
        steps.append(_recall_path(state, recalled))
    if state.received:
        steps.append(FillQueue("receive", state.received))
    if state.sent:
        steps.append(FillQueue("send", state.sent))
    # The FIN is not in yet: rcv_nxt is one less, and so must be what is checked against it; the right edge stays.
    rcv_wup = window.rcv_wup if tcp.distance(tcp.add(state.rcv_nxt, -fin), window.rcv_wup) >= 0 \
        else tcp.add(window.rcv_wup, -1)
    dormant_window = Window(window.snd_wl1, window.snd_wnd, window.max_window,
                            tcp.add(window.rcv_wnd, tcp.distance(window.rcv_wup, rcv_wup)), rcv_wup)
    steps.append(SetWindow(dormant_window))
    fin_sent = state.fin_queued and not state.fin_unsent
    if fin_sent and state.tcp_state is not TcpState.LAST_ACK:
        steps.append(QueueFin(sent=True))
    if state.ts_recent is not None or fin or state.tcp_state is TcpState.FIN_WAIT2:
        # rcv_wup, not rcv_nxt: with an acknowledgement owed, a segment at rcv_nxt leaves ts_recent alone (tcp_input.c,
        # tcp_replace_ts_recent).
        steps.append(InjectSegment(sequence=tcp.add(state.rcv_nxt, -1) if fin else rcv_wup,
                                   acknowledgement=state.snd_una,
                                   window=min(window.snd_wnd >> negotiated.snd_wscale, 65535),
                                   timestamp=state.ts_recent, fin=bool(fin)))
    if fin_sent and state.tcp_state is TcpState.LAST_ACK:
        steps.append(QueueFin(sent=True))
    if state.shut_read:
        steps.append(ShutRead())
    if device:
        steps.append(BindToDevice(device))
    steps += _options(state, When.CONNECTED, fresh)
    return steps


def _recall_path(state: ConnectionState, recalled: Recall) -> RecallPath:
    """Nothing is in the receive queue yet: the segment is right behind what the program has read. It announces the
    largest window that there is, whatever the peer's was, until SetWindow: the size of segments is bound to half of the
    largest window heard of (net/ipv4/tcp_output.c, tcp_bound_to_half_wnd), and would stay so small."""
    clock = None if state.timestamp is None else later_timestamp(state.timestamp, 0)
    echo = 0 if clock is None else recalled.echo(clock)
    return RecallPath(recalled.bytes_, clock, InjectSegment(state.copied_seq, state.first_outgoing, _LARGEST_WINDOW,
                                                            state.ts_recent, fin=False, echo=echo))


def clock_steps(state: ConnectionState, elapsed_ms: int) -> list[Step]:
    """Still in repair, before a segment may leave: the TSval clock, with the time that passed since the state was read,
    by the origin's clock, so that it is not behind what the origin sent last."""
    return [] if state.timestamp is None else [SetTimestamp(later_timestamp(state.timestamp, elapsed_ms))]


def activation_steps(state: ConnectionState, written: int | None = None) -> list[Step]:
    """From dormant to alive. `written`: None for a dormant connection; for one that an interrupted activation left
    alive, how many of the unsent bytes it wrote, one more with the FIN behind them."""
    steps: list[Step] = []
    if written is None:
        steps.append(LeaveRepair(probe=state.owes_ack and state.tcp_state is TcpState.ESTABLISHED))
    steps += _options(state, When.ALIVE, {})
    unsent = state.unsent_bytes[written or 0:]
    if unsent:
        steps.append(WriteUnsent(unsent))
    if state.fin_unsent and (written or 0) <= state.unsent:
        steps.append(QueueFin(sent=False))
    steps += _options(state, When.RUNNING, {})
    return steps


def describe(flow: Flow, steps: list[Step]) -> list[str]:
    """The plan as lines for --dry-run: names and numbers, never payload."""
    return [f"{flow}: {step!r}" for step in steps]

"""The connection state: everything the kernel knows of one endpoint that must move.

    receive queue                                      send queue
    copied_seq          rcv_nxt                        snd_una        snd_nxt        write_seq
       |<--- received --->|<-- window -->|                |<--- sent --->|<-- unsent -->|
       what the program    what the peer                  in flight,      not yet on
       has not read yet    may still send                 not acked       the wire

    copied_seq = rcv_nxt - len(received) - fin_received
    snd_una = write_seq - len(outgoing) - fin_outstanding
    snd_nxt = write_seq - unsent - fin_unsent

A FIN takes one sequence number behind the last byte. `fin_received` is 1 once the peer's has arrived: `rcv_nxt` stands
behind it. `fin_queued` is 1 once the program has shut down for writing: `write_seq` stands behind our FIN then, which
waits like a byte (`fin_unsent`), is in flight, or is acknowledged (FIN_WAIT2, where it is not outstanding any more).
As in CRIU's images, `rcv_nxt` and `write_seq` count a FIN, and the lengths of the queues do not.
A `ConnectionState` validates itself when made, because it may come from another host: what passes is bounded and
consistent, though it may still be a lie (who may tell it is decided elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from . import tcp
from .endpoint import Flow
from .options import BUFFERS, ON_THE_WIRE, OptionValue
from .tcp import TcpState

MAX_CARRIED = 1 << 28  # bytes of both queues and of the application's state, which a pass carries at most
MAX_QUEUE = 1 << 30  # bytes; the kernel's own limit (tcp_rmem, tcp_wmem) is far below


@dataclass(frozen=True)
class Negotiated:
    """What both sides agreed upon in the handshake. `mss_clamp`: the largest segment the peer takes, bytes."""

    mss_clamp: int
    wscale: bool
    snd_wscale: int
    rcv_wscale: int
    sack: bool
    timestamps: bool
    ecn: bool = False


@dataclass(frozen=True)
class Window:
    """struct tcp_repair_window (linux/tcp.h): bytes, unscaled, and sequence numbers."""

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int


@dataclass(frozen=True)
class Congestion:
    """What the sender had learnt of the path, from TCP_INFO: segments, and times in microseconds. All 0 where the path
    is another one (`NOTHING_LEARNT`)."""

    snd_cwnd: int
    snd_ssthresh: int
    rtt_us: int
    rttvar_us: int
    rto_us: int

    def after(self, idle_us: int) -> Congestion:
        """The same when nothing was sent for so long: a window that is not used says less and less, and halves with
        every retransmission time-out, as the kernel has it at the next sending (RFC 2861 3, net/ipv4/tcp_output.c
        tcp_cwnd_restart)."""
        halvings = min(idle_us // self.rto_us, 32) if self.rto_us else 0
        floor = min(self.snd_cwnd, tcp.INITIAL_WINDOW)
        return replace(self, snd_cwnd=max(self.snd_cwnd >> halvings, floor))


    def __str__(self) -> str:
        return f"a window of {self.snd_cwnd} segments, a round trip of {self.rtt_us / 1000:.1f} ms"


NOTHING_LEARNT = Congestion(0, 0, 0, 0, 0)


@dataclass(frozen=True)
class ConnectionState:
    """See the module's drawing. `timestamp`: the TSval clock, in milliseconds where it is even, in microseconds where
    odd; `ts_recent`: the peer's last TSval, the TSecr of our next segment; both None where timestamps were not
    negotiated. `fin_unsent`: our FIN was not sent yet. `shut_read`: the program has shut down for reading, which no
    state of TCP tells."""

    flow: Flow
    tcp_state: TcpState
    rcv_nxt: int
    received: bytes = field(repr=False)
    write_seq: int
    outgoing: bytes = field(repr=False)
    unsent: int
    negotiated: Negotiated
    window: Window
    timestamp: int | None
    ts_recent: int | None
    congestion: Congestion
    options: Mapping[str, OptionValue]
    nonblocking: bool = False
    fin_unsent: bool = False
    shut_read: bool = False

    def __post_init__(self) -> None:
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        negotiated, window = self.negotiated, self.window
        numbers = (self.rcv_nxt, self.write_seq, window.snd_wl1, window.snd_wnd, window.max_window, window.rcv_wnd,
                   window.rcv_wup, self.timestamp or 0, self.ts_recent or 0)
        checks = [
            (self.tcp_state in tcp.PASSABLE_STATES, f"state {self.tcp_state.name} cannot be passed"),
            (all(0 <= number < tcp.MODULUS for number in numbers), "a number is outside 0..2^32-1"),
            (len(self.received) <= MAX_QUEUE and len(self.outgoing) <= MAX_QUEUE, "a queue is over 1 GiB"),
            (0 <= self.unsent <= len(self.outgoing), "more bytes unsent than are in the send queue"),
            (not self.outgoing or self.tcp_state is not TcpState.FIN_WAIT2, "bytes in front of an acknowledged FIN"),
            (not self.fin_unsent or bool(self.fin_outstanding), "no FIN is there that could be unsent"),
            (not self.unsent or self.fin_unsent == bool(self.fin_queued), "bytes unsent in front of a sent FIN"),
            (tcp.MIN_MSS <= negotiated.mss_clamp <= 65535, f"an MSS of {negotiated.mss_clamp} is out of bounds"),
            (max(negotiated.snd_wscale, negotiated.rcv_wscale) <= tcp.MAX_WSCALE
             and min(negotiated.snd_wscale, negotiated.rcv_wscale) >= 0, "a window scale is over 14 (RFC 7323 2.3)"),
            (negotiated.wscale or negotiated.snd_wscale == negotiated.rcv_wscale == 0,
             "a window scale that was not negotiated"),
            ((self.timestamp is not None) == (self.ts_recent is not None) == negotiated.timestamps,
             "timestamps are present if and only if they were negotiated"),
            (tcp.distance(self.rcv_nxt, window.rcv_wup) >= 0, "rcv_wup is past rcv_nxt"),
            (tcp.distance(tcp.add(self.rcv_nxt, window.rcv_wnd), window.snd_wl1) >= 0, "snd_wl1 is past the window"),
        ]
        return [text for holds, text in checks if not holds]

    @property
    def fin_received(self) -> int:
        return 1 if self.tcp_state in tcp.FIN_RECEIVED_STATES else 0

    @property
    def fin_queued(self) -> int:
        return 1 if self.tcp_state in tcp.FIN_QUEUED_STATES else 0

    @property
    def fin_outstanding(self) -> int:
        """Our FIN is not acknowledged."""
        return 1 if self.fin_queued and self.tcp_state is not TcpState.FIN_WAIT2 else 0

    @property
    def snd_una(self) -> int:
        return tcp.add(self.write_seq, -len(self.outgoing) - self.fin_outstanding)

    @property
    def first_outgoing(self) -> int:
        """The sequence number at which the send queue begins: that of our FIN, where that is all that there was."""
        return tcp.add(self.write_seq, -len(self.outgoing) - self.fin_queued)

    @property
    def snd_nxt(self) -> int:
        return tcp.add(self.write_seq, -self.unsent - self.fin_unsent)

    @property
    def copied_seq(self) -> int:
        return tcp.add(self.rcv_nxt, -len(self.received) - self.fin_received)

    @property
    def sent(self) -> bytes:
        """The part of the send queue that is in flight."""
        return self.outgoing[:len(self.outgoing) - self.unsent]

    @property
    def unsent_bytes(self) -> bytes:
        return self.outgoing[len(self.outgoing) - self.unsent:]

    @property
    def owes_ack(self) -> bool:
        """Data arrived that no segment of ours has acknowledged yet."""
        return self.rcv_nxt != self.window.rcv_wup


def fitted(state: ConnectionState, own: Mapping[str, OptionValue], ipv6_socket: bool) -> ConnectionState:
    """The state for a socket that a program has set up already: it keeps the options that are the program's affair
    (`own`), and its family (`ipv6_socket`), in which an IPv4 connection is v4-mapped."""
    flow = replace(state.flow, mapped=ipv6_socket and state.flow.ip_version == 4)
    return replace(state, flow=flow, options=fitted_options(state.options, own))


def fitted_options(carried: Mapping[str, OptionValue], own: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
    """Those of a socket that has some of its `own`."""
    options = dict(carried)
    for name, value in own.items():
        wanted = options.get(name)
        if name in BUFFERS and isinstance(value, int) and isinstance(wanted, int):
            options[name] = max(value, wanted)
        elif name not in ON_THE_WIRE or wanted is None:
            options[name] = value
    return options

"""What the sender had learnt of the path, given back to a restored connection without a packet.

A new socket believes in a round trip of nothing and a time-out of 3 s (no handshake gave it a sample), and in a window
of ten segments. None of this has a setter. But a socket learns from acknowledgements, and in repair it may be given
some that never were on a wire:

    send queue in repair                              acknowledged at once, by a segment made here
       |<--- bytes_, sent and acknowledged long ago --->|<--- really in flight --->|
       first - bytes_                                 first = SND.UNA

- The window grows by what is acknowledged, in slow start (RFC 5681 3.1): as many segments as are missing.
- The acknowledgement echoes a timestamp that is one round trip old: the socket takes its sample, and with it the
  retransmission time-out, the tail-loss probe and the pace (RFC 7323 4.1; net/ipv4/tcp_input.c tcp_ack_update_rtt:
  bytes restored in repair are sampled by timestamps only). Without timestamps the window alone comes back.

What the bytes are does not matter: the peer has had that part of the stream, and these leave the queue before anything
may leave the host. The threshold of slow start is not given back, as nothing sets it: a connection that is restored
probes for more by doubling, from where it was, until a loss or a growing delay.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import tcp
from .state import Congestion, Negotiated

MAX_BYTES = 1 << 22  # of one window: what is to be acknowledged must first be put into the queue


@dataclass(frozen=True)
class Recall:
    """`bytes_` are acknowledged; `rtt_us`: the age of the timestamp that is echoed, None without timestamps."""

    bytes_: int
    rtt_us: int | None

    def echo(self, clock: int) -> int:
        """What the clock showed then; an odd one ticks in microseconds (restoreplan.SetTimestamp)."""
        if self.rtt_us is None:
            return 0
        return tcp.add(clock, -(self.rtt_us if clock & 1 else max((self.rtt_us + 500) // 1000, 1)))


def recall(learnt: Congestion, negotiated: Negotiated) -> Recall | None:
    """What it takes; None where nothing was learnt, or nothing that differs from a new socket's."""
    segment = negotiated.mss_clamp - (tcp.TIMESTAMP_OPTION if negotiated.timestamps else 0)
    missing = max(learnt.snd_cwnd - tcp.INITIAL_WINDOW, 0)
    bytes_ = min(missing * segment, MAX_BYTES)
    if negotiated.timestamps and learnt.rtt_us:
        return Recall(max(bytes_, 1), learnt.rtt_us)
    return Recall(bytes_, None) if bytes_ else None

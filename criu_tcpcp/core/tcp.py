"""TCP's numbers: states, sequence arithmetic, the bounds that a foreign state must keep (RFC 9293, RFC 7323)."""

from __future__ import annotations

import enum

MODULUS = 1 << 32

#: Bits of tcpi_options (linux/tcp.h), which CRIU's images use as opt_mask.
OPT_TIMESTAMPS, OPT_SACK, OPT_WSCALE, OPT_ECN, OPT_ECN_SEEN, OPT_SYN_DATA, OPT_USEC_TS = 1, 2, 4, 8, 16, 32, 64

INITIAL_WINDOW = 10  # segments (RFC 6928; TCP_INIT_CWND, include/net/tcp.h)
TIMESTAMP_OPTION = 12  # bytes of every segment, with its padding (RFC 7323 appendix A)
MAX_WSCALE = 14  # RFC 7323 2.3
MAX_UNSCALED_WINDOW = 65535
MIN_MSS, MAX_MSS = 48, 32767  # TCP_MIN_SND_MSS - options; TCP_MAXSEG refuses more (net/ipv4/tcp.c, MAX_TCP_WINDOW)


class TcpState(enum.IntEnum):
    """include/net/tcp_states.h"""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12

    @property
    def label(self) -> str:
        """As ss writes it."""
        return {1: "ESTAB", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 7: "UNCONN"}.get(self, self.name.replace("_", "-"))


#: The peer's FIN has arrived.
FIN_RECEIVED_STATES = frozenset({TcpState.CLOSE_WAIT, TcpState.CLOSING, TcpState.LAST_ACK})
#: The program has shut down for writing: our FIN stands at the end of the send queue, or was sent already.
FIN_QUEUED_STATES = frozenset({TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.CLOSING, TcpState.LAST_ACK})
#: The states that can be passed: the connection is there for both sides, and a program may have it.
PASSABLE_STATES = FIN_RECEIVED_STATES | FIN_QUEUED_STATES | {TcpState.ESTABLISHED}


def add(sequence: int, count: int) -> int:
    """Sequence number `count` (may be negative) further on."""
    return (sequence + count) % MODULUS


def distance(later: int, earlier: int) -> int:
    """How far `later` is past `earlier`, -2^31..2^31-1 (RFC 9293 3.4)."""
    return (later - earlier + (1 << 31)) % MODULUS - (1 << 31)

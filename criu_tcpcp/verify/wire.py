"""The view of one stream of captured packets: what each end has sent and acknowledged so far, as plain integers.

    capture point ---> Wire.step(packet)  ->  Step  (the packet, placed: absolute numbers, direction, host)
                       assertions look at Step and Wire: the state *before* the packet
                       Wire.advance(step)           the state after it

"Passed" is the end that moves (at the origin first, then at the destination), "peer" the other. Numbers are unwrapped
(`seq.unwrap`); what an end sends and what the other acknowledges share one number line per end:

      first        acked                sent_end
        |------------|---------------------|----->        RFC 9293 3.3.1: acked = SND.UNA, sent_end = SND.NXT,
         acknowledged   outstanding                       as far as the packets at this capture point show
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from ..core.endpoint import Flow
from .packet import ACK, RST, SYN, Options, Packet, Role
from .seq import RangeSet, unwrap

Identity = tuple[int, int, int, int, int, int | None]
RECENT = 64  # acknowledgements that may be on their way to a sender at once
RECENT_ON_LONG_PATHS = 4096


@dataclass(frozen=True)
class Negotiated:
    """What the handshake settled, None where it is not known. `mss`: what the peer announced, the bound of the passed
    end's segments (RFC 9293 3.7.1); `window_scale`: the shift of the passed end's windows (RFC 7323 2.2)."""

    mss: int | None = None
    window_scale: int | None = None
    timestamps: bool | None = None
    sack: bool | None = None
    ecn: bool | None = None

    def or_else(self, other: Negotiated) -> Negotiated:
        """Ours where it is known, else the other's."""
        missing = {item.name: getattr(other, item.name) for item in fields(self) if getattr(self, item.name) is None}
        return replace(self, **missing)


class Recent:
    """The last so many of some numbers."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._order: deque[int] = deque()
        self._known: set[int] = set()

    def add(self, number: int) -> None:
        """One that is greater than all before."""
        self._order.append(number)
        self._known.add(number)
        if len(self._order) > self._count:
            self._known.remove(self._order.popleft())

    def __contains__(self, number: int) -> bool:
        return number in self._known


@dataclass
class Side:
    """One end's half of the connection. `from_start`: its SYN was seen, so nothing that it sent came earlier."""

    first: int | None = None
    sent_end: int | None = None
    acked: int | None = None
    recently_acked: Recent = field(default_factory=lambda: Recent(RECENT))
    from_start: bool = False
    tsvals: set[int] = field(default_factory=set)
    ranges: RangeSet = field(default_factory=RangeSet)
    syn: Packet | None = None

    @property
    def reference(self) -> int | None:
        return self.sent_end if self.sent_end is not None else self.acked


@dataclass(frozen=True, slots=True)
class Step:
    """A packet in its place. `start`..`end` is the sequence space it takes, `ack` what it acknowledges (None without
    ACK); `handshake`: a SYN before anything else was said; `probe`: keep-alive or window probe at SND.UNA-1
    (RFC 9293 3.8.4, 3.8.6.1), with or without a byte. Its sender's SND.UNA may be one of a moment ago: later
    acknowledgements were still on their way."""

    packet: Packet
    from_peer: bool
    host: Role
    start: int
    end: int
    ack: int | None
    handshake: bool
    probe: bool

    @property
    def data_start(self) -> int:
        return self.start + (self.packet.flags & SYN != 0)

    @property
    def data_end(self) -> int:
        return self.data_start + self.packet.payload_len


def identity(packet: Packet) -> Identity:
    """By what a packet is known again at another capture point."""
    return (packet.seq, packet.ack, packet.flags, packet.window, packet.payload_len, packet.options.tsval)


class Wire:
    """State of one stream of packets of one flow. `hosts` maps Ethernet sources to the passed end's hosts; where a
    router hides them, `senders` does what `identity` makes of the packets. `recent`: how many acknowledgements may be
    on their way."""

    def __init__(self, flow: Flow, hosts: Mapping[bytes, Role], roles: Mapping[str, Role],
                 senders: Mapping[Identity, Role] | None = None, recent: int = RECENT) -> None:
        self.peer = Side(recently_acked=Recent(recent))
        self.passed = Side(recently_acked=Recent(recent))
        self._peer_end = flow.peer
        self._hosts = hosts
        self._roles = roles
        self._senders = senders or {}
        self._established = False

    def step(self, packet: Packet) -> Step:
        from_peer = packet.src == self._peer_end
        ours, theirs = (self.peer, self.passed) if from_peer else (self.passed, self.peer)
        start = unwrap(ours.reference, packet.seq)
        ack = unwrap(theirs.reference, packet.ack) if packet.flags & ACK else None
        probe = (packet.payload_len <= 1 and start + 1 in ours.recently_acked
                 and packet.sequence_length == packet.payload_len)
        handshake = bool(packet.flags & SYN) and not self._established
        return Step(packet, from_peer, self._host(packet, from_peer), start, start + packet.sequence_length, ack,
                    handshake, probe)

    def _host(self, packet: Packet, from_peer: bool) -> Role:
        if from_peer:
            return Role.PEER
        role = self._roles.get(packet.capture, Role.UNKNOWN)
        if role in (Role.ORIGIN, Role.DESTINATION):
            return role
        told = self._hosts.get(packet.ether_src) if packet.ether_src is not None else None
        return told if told is not None else self._senders.get(identity(packet), Role.UNKNOWN)

    def advance(self, step: Step) -> int:
        """Take the step into account; return how many payload bytes were not seen before. The numbers of a RST, or of
        a SYN after the handshake, say nothing about the stream; nor do an empty segment's beyond the data, or an
        acknowledgement by the passed end of what the peer did not send."""
        packet = step.packet
        if packet.flags & RST or (packet.flags & SYN and not step.handshake):
            return 0
        ours, theirs = (self.peer, self.passed) if step.from_peer else (self.passed, self.peer)
        if step.handshake:
            ours.syn, ours.from_start = packet, True
        elif not packet.flags & SYN:
            self._established = True
        if ours.first is None:
            ours.first = step.start
        if ours.sent_end is None or (step.end > ours.sent_end and step.end > step.start):
            ours.sent_end = step.end
        if step.ack is not None and (theirs.acked is None or step.ack > theirs.acked):
            invented = not step.from_peer and theirs.from_start and step.ack > (theirs.sent_end or 0)
            if not invented:
                theirs.acked = step.ack
                theirs.recently_acked.add(step.ack)
        if packet.options.tsval is not None:
            ours.tsvals.add(packet.options.tsval)
        new = ours.ranges.add(step.data_start, step.data_end) if not step.probe else 0
        if step.end > step.data_end:            # FIN
            ours.ranges.add(step.data_end, step.end)
        return new

    def negotiated(self) -> Negotiated:
        """What the SYNs of both ends say; all None unless both were seen."""
        if self.passed.syn is None or self.peer.syn is None:
            return Negotiated()
        passed, peer = self.passed.syn.options, self.peer.syn.options
        scaled = passed.window_scale is not None and peer.window_scale is not None
        default_mss = 536 if self.passed.syn.ip_version == 4 else 1220          # RFC 9293 3.7.1
        return Negotiated(
            mss=peer.mss if peer.mss is not None else default_mss,
            window_scale=passed.window_scale if scaled else 0,
            timestamps=_both(passed, peer), sack=passed.sack_permitted and peer.sack_permitted,
            ecn=_ecn(self.passed.syn, self.peer.syn))


def _both(passed: Options, peer: Options) -> bool:
    return passed.tsval is not None and peer.tsval is not None


def _ecn(one: Packet, other: Packet) -> bool | None:
    """RFC 3168 6.1.1: the SYN carries ECE and CWR, the SYN-ACK only ECE. None for accurate ECN (RFC 9768), whose
    flags are a counter afterwards."""
    syn, syn_ack = (other, one) if one.flags & ACK else (one, other)
    bits = 0x1C0        # AE, CWR, ECE
    if syn.flags & bits == bits and syn_ack.flags & bits not in (0, 0x40):
        return None
    return syn.flags & 0xC0 == 0xC0 and syn_ack.flags & bits == 0x40

"""The assertions about packets, 1 to 8: small classes that are shown one packet at a time, in order.

Each `see(step, wire)` compares one packet with the state before it and yields violations; `end(wire)` yields what only
the whole capture can tell. `not_checked` says, in words, what an assertion could not look at: nothing passes silently.
The packets of the *passed* end are judged; the peer is unmodified, so of its packets only RST, SYN and FIN matter.

A packet that breaks one assertion is judged by the others as far as that makes sense: a RST, or a SYN after the
handshake, is only that (the rest of its header means something else).
"""

from __future__ import annotations

from collections.abc import Iterator

from .judgement import Assertion, Expectations, PassedAssertion, Turn, Violation
from .packet import FIN, RST, SYN, Packet, Role
from .seq import MODULUS, ByteStore, difference, unwrap
from .wire import Negotiated, Step, Wire


class ControlFlags(Assertion):
    """1. No RST, no SYN after the handshake; a FIN only where an application asked for one."""

    number = 1

    def __init__(self, expect: Expectations) -> None:
        super().__init__(expect)
        self._fins: dict[bool, Packet] = {}

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet = step.packet
        if packet.flags & RST:
            yield self.fail(f"RST from the {'peer' if step.from_peer else step.host}, seq {packet.seq}", packet)
        elif packet.flags & SYN and not step.handshake:
            yield self.fail(f"SYN after the handshake, seq {packet.seq}", packet)
        elif packet.flags & FIN and step.from_peer not in self._fins:
            self._fins[step.from_peer] = packet
            asked = self.expect.fin_peer if step.from_peer else self.expect.fin_passed
            if asked is False:
                yield self.fail(f"FIN at seq {packet.seq + packet.payload_len}, which no application asked for", packet)

    def end(self, wire: Wire) -> Iterator[Violation]:
        for from_peer, packet in self._fins.items():
            if (self.expect.fin_peer if from_peer else self.expect.fin_passed) is None:
                self.not_checked.append(f"1: whether an application asked for the FIN of the "
                                        f"{'peer' if from_peer else 'passed end'} (packet {packet.number})")
        yield from ()


class OneOwner(Assertion):
    """2. No packet from the origin after the destination's first.

    Of a connection that was passed there and back, each turn counts: the speaker changes at most as often as it was
    passed, from the origin to the destination first."""

    number = 2

    def __init__(self, expect: Expectations) -> None:
        super().__init__(expect)
        self._changes = 0
        self.turns: list[Turn] = []
        self.seen: set[Role] = set()

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        self.seen.add(step.host)
        if step.host not in (Role.ORIGIN, Role.DESTINATION):
            return
        owner = self.turns[-1].host if self.turns else Role.ORIGIN
        if step.host is not owner:
            if self._changes == self.expect.passes:
                since = f" {(step.packet.time_ns - self.turns[-1].packet.time_ns) / 1e6:.3f} ms" if self.turns else ""
                often = f" of its last turn ({self.expect.passes} passes)" if self.expect.passes != 1 else ""
                yield self.fail(f"the {step.host} sent{since} after the {owner}'s first packet{often}", step.packet)
                return
            self._changes += 1
        elif self.turns:
            return
        self.turns.append(Turn(step.host, step.packet))


class Sequence(PassedAssertion):
    """3. SEQ never beyond what was sent; a byte at one sequence number never differs between transmissions.

    A segment that begins beyond everything seen leaves a gap. On a path that may lose (`strict` false) it is judged at
    the end: the gap was filled later, or acknowledged by the peer (then the capture missed it, which is noted), or
    those bytes were never sent. At an egress, or on a loss-free path, a gap that is filled later counts as well.
    A FIN closes the number line: nothing may lie beyond it, and it does not move (RFC 9293 3.10.4). A packet without
    payload lies at SND.NXT, a probe at SND.UNA-1; lower than that is a stale state."""

    number = 3

    def __init__(self, expect: Expectations, store: ByteStore, strict: bool) -> None:
        super().__init__(expect)
        self._cut = 0
        self._store = store
        self._strict = strict
        self._gaps: list[tuple[int, int, Packet]] = []
        self._fin: int | None = None

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet, passed = step.packet, wire.passed
        if step.probe:
            return
        if passed.sent_end is not None and step.start > passed.sent_end:
            self._gaps.append((passed.sent_end, step.start, packet))
        if not step.end - step.start and passed.acked is not None and step.start < passed.acked - 1:
            yield self.fail(f"seq {packet.seq} lies {passed.acked - step.start} below SND.UNA "
                            f"{passed.acked % MODULUS}; a probe is at SND.UNA-1", packet)
        if packet.flags & FIN:
            if self._fin is not None and step.end != self._fin:
                yield self.fail(f"the FIN moved from seq {(self._fin - 1) % MODULUS} to {(step.end - 1) % MODULUS}",
                                packet)
            self._fin = step.end if self._fin is None else self._fin
        elif self._fin is not None and step.end > self._fin - (step.end > step.start):
            yield self.fail(f"seq {packet.seq} + {packet.payload_len} lies beyond the FIN at "
                            f"{(self._fin - 1) % MODULUS}", packet)
        self._cut += packet.payload_len - len(packet.payload)
        wrong = self._store.add(step.data_start, packet.payload)
        if wrong is not None:
            yield self.fail(f"the byte at seq {wrong % MODULUS} differs from the one sent before", packet)

    def end(self, wire: Wire) -> Iterator[Violation]:
        if self._cut:
            self.not_checked.append(f"3: {self._cut} payload bytes of the passed end, which the snap length cut off, "
                                    "were not compared")
        for start, stop, packet in self._gaps:
            filled = wire.passed.ranges.covers(start, stop)
            known = wire.passed.acked is not None and wire.passed.acked >= stop
            if not filled and known:
                self.not_checked.append(f"3: {stop - start} bytes at seq {start % MODULUS}: acknowledged by the peer, "
                                        "but not in the capture")
            elif self._strict or not filled:
                yield self.fail(f"seq {packet.seq} lies {stop - start} beyond what was sent, {start % MODULUS}", packet)


class Acknowledgement(PassedAssertion):
    """4. ACK never decreases and never exceeds what the peer sent (RFC 9293 3.10.7.4, 3.4).

    In a capture that begins in the middle, the first acknowledgement seen is taken as covered."""

    number = 4

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        if step.ack is None:
            yield self.fail("a segment without ACK after the handshake", step.packet)
            return
        acked, sent = wire.peer.acked, wire.peer.sent_end
        if acked is not None and step.ack < acked:
            yield self.fail(f"ack {step.packet.ack} is {acked - step.ack} less than the one before, "
                            f"{acked % MODULUS}", step.packet)
        if sent is not None:
            bound = sent if wire.peer.from_start or acked is None else max(sent, acked)
            if step.ack > bound:
                yield self.fail(f"ack {step.packet.ack} is {step.ack - bound} more than the peer sent, "
                                f"{bound % MODULUS}", step.packet)


class RightEdge(PassedAssertion):
    """5. The right edge, ACK + (window << scale), never shrinks (RFC 9293 3.8.6); after a zero window it reopens."""

    number = 5

    def __init__(self, expect: Expectations, scale: int | None) -> None:
        super().__init__(expect)
        self._scale = scale
        self._edge: int | None = None
        self._zero: Packet | None = None
        self._finished = False
        if scale is None:
            self.not_checked.append("5: the right edge: the window scale is not known (no handshake in the capture)")

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet = step.packet
        if packet.flags & FIN:
            self._finished = True
        if packet.window:
            self._zero = None
        elif self._zero is None:
            self._zero = packet
        if self._scale is None or step.ack is None:
            return
        edge = step.ack + (packet.window << self._scale)
        if self._edge is not None and edge < self._edge:
            yield self.fail(f"the right edge went back by {self._edge - edge}: ack {packet.ack} + "
                            f"{packet.window << self._scale} < {self._edge % MODULUS}", packet)
        self._edge = edge if self._edge is None else max(edge, self._edge)

    def end(self, wire: Wire) -> Iterator[Violation]:
        if self._zero is not None and not self._finished:
            yield self.fail("the window went to zero and did not reopen", self._zero)


class Timestamps(PassedAssertion):
    """6. TSval never decreases; TSecr is a value that the peer sent; both are there if and only if negotiated
    (RFC 7323 3.2, 5.3).

    TSecr 0 counts as "not sent" unless the peer's clock really passed through 0. In a capture that begins in the
    middle, a TSecr older than the peer's first captured TSval cannot be judged."""

    number = 6

    def __init__(self, expect: Expectations, negotiated: bool | None,
                 peer_tsvals: frozenset[int] = frozenset()) -> None:
        super().__init__(expect)
        self._negotiated = negotiated
        self._peer_tsvals = peer_tsvals
        self._tsval: int | None = None
        self._peer_first: int | None = None
        self._unknown = 0
        if negotiated is None:
            self.not_checked.append("6: whether timestamps belong there (no handshake in the capture)")

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        if step.from_peer and self._peer_first is None:
            self._peer_first = step.packet.options.tsval
        if step.handshake and not step.from_peer:
            self._tsval = step.packet.options.tsval
        yield from super().see(step, wire)

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet = step.packet
        tsval, tsecr = packet.options.tsval, packet.options.tsecr
        if tsval is None or tsecr is None:
            if self._negotiated:
                yield self.fail("no timestamp, though negotiated", packet)
            return
        if self._negotiated is False:
            yield self.fail(f"a timestamp ({tsval}), though not negotiated", packet)
            return
        if self._tsval is not None and difference(tsval, self._tsval) < 0:
            yield self.fail(f"TSval {tsval} is {-difference(tsval, self._tsval)} less than the one before", packet)
        else:
            self._tsval = tsval
        if tsecr in wire.peer.tsvals or tsecr in self._peer_tsvals:
            return
        if tsecr and not wire.peer.from_start and (self._peer_first is None
                                                   or difference(tsecr, self._peer_first) < 0):
            self._unknown += 1
            return
        yield self.fail(f"TSecr {tsecr} was never sent by the peer", packet)

    def end(self, wire: Wire) -> Iterator[Violation]:
        if self._unknown:
            self.not_checked.append(f"6: TSecr of {self._unknown} packets: older than the capture")
        yield from ()


class SegmentSize(PassedAssertion):
    """7. Payload <= negotiated MSS, options included (RFC 9293 3.7.1: the MSS counts no options, the sender must make
    room for them); SACK only if negotiated, blocks inside received data (RFC 2018 3, 4; RFC 2883 for the first)."""

    number = 7

    def __init__(self, expect: Expectations, negotiated: Negotiated) -> None:
        super().__init__(expect)
        self._mss, self._sack = negotiated.mss, negotiated.sack
        self._super = 0
        if self._mss is None:
            self.not_checked.append("7: payload against the MSS: it is not known (no handshake in the capture)")
        if self._sack is None:
            self.not_checked.append("7: whether SACK was negotiated (no handshake in the capture)")

    def judge(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet = step.packet
        size = packet.payload_len + packet.options.length
        if self._mss is not None and packet.payload_len and size > self._mss:
            if self.expect.offload:
                self._super += 1
            else:
                yield self.fail(f"payload {packet.payload_len} + options {packet.options.length} > MSS {self._mss}",
                                packet)
        if packet.options.sack and self._sack is False:
            yield self.fail("SACK blocks, though not negotiated", packet)
        for index, block in enumerate(packet.options.sack):
            yield from self._block(step, wire, index, block)

    def _block(self, step: Step, wire: Wire, index: int, block: tuple[int, int]) -> Iterator[Violation]:
        peer = wire.peer
        left = unwrap(peer.reference, block[0])
        right = left + difference(block[1], block[0])
        text = f"SACK block {block[0]}-{block[1]}"
        if right <= left:
            yield self.fail(f"{text} is empty", step.packet)
        elif peer.sent_end is not None and right > peer.sent_end:
            yield self.fail(f"{text} ends {right - peer.sent_end} beyond what the peer sent", step.packet)
        elif peer.from_start and peer.first is not None and left <= peer.first:
            yield self.fail(f"{text} begins before the peer's first byte", step.packet)
        elif index > 0 and step.ack is not None and left < step.ack:
            yield self.fail(f"{text} lies below ack {step.packet.ack} and is not the first block", step.packet)

    def end(self, wire: Wire) -> Iterator[Violation]:
        if self._super:
            self.not_checked.append(f"7: the MSS of {self._super} super-packets (captured before segmentation)")
        yield from ()

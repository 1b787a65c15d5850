"""Whether the next segment of the other end fits all that it, and we, have said before.

The judge is shown every packet that leaves us (`sent`) and every one that comes (`see`); `see` raises `Violation` for
the first that no honest endpoint sends. It neither answers nor remembers what an endpoint has to: `tcp` does that.

What is certain of the other end, though packets may be lost both ways:

  known_ack   it has processed an acknowledgement of ours up to here: it has echoed a timestamp that we sent with it, or
              acknowledged a byte that we sent with it. Its SND.UNA is not lower; what lies below is not sent again.
  ts floor    it echoes the timestamp of a segment that begins at or before its last acknowledgement (RFC 7323 4.3).
              When it acknowledges more than before, byte `acked` has come, in a segment of that kind: an older
              timestamp than that byte was first sent with is stale. Not while it has holes: Linux ignores the timestamp
              of a segment that fills one, if its acknowledgement is older than its successors' (net/ipv4/tcp_input.c,
              tcp_ack: old_ack).

A path that keeps the order of packets (`ordered`) makes three rules sharp that are not true of packets that overtake
each other: acknowledgement, right edge and TSval never go back. A path that loses nothing (`lossless`) makes a gap in
the sequence numbers a lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from criu_tcpcp.verify.packet import ACK, CWR, ECE, FIN, RST, SYN, URG, IcmpError, Packet
from criu_tcpcp.verify.seq import MODULUS, ByteStore, difference, unwrap

DEFAULT_MSS = 536  # RFC 9293 3.7.1


class Violation(Exception):
    """`rule`: a word for it; `packet`: what broke it, None where it is something that did not come."""

    def __init__(self, rule: str, reason: str, packet: Packet | IcmpError | None = None) -> None:
        super().__init__(f"{rule}: {reason}" + (f" [{packet}]" if packet is not None else ""))
        self.rule, self.reason, self.packet = rule, reason, packet


@dataclass(frozen=True)
class Path:
    """What is promised of the way to us."""

    ordered: bool = True
    lossless: bool = False


@dataclass
class _Stamp:
    """One TSval of ours: the lowest sequence number, and the lowest acknowledgement, that it was sent with."""

    tsval: int
    start: int
    ack: int | None


class Judge:
    """See the module. Sequence numbers are unwrapped (verify.seq); timestamps are as on the wire."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or Path()
        # what we sent
        self._our_syn: Packet | None = None
        self._our_first: int | None = None
        self._our_end: int | None = None
        self._our_ack: int | None = None
        self._our_edge: int | None = None
        self._stamps: dict[int, _Stamp] = {}
        self._pieces: deque[tuple[int, int | None, int | None]] = deque()  # of new bytes: end, TSval, acknowledgement
        # what came
        self.their_syn: Packet | None = None
        self._first: int | None = None
        self._sent_end: int | None = None
        self._acked: int | None = None
        self._edge: int | None = None
        self._tsval: int | None = None
        self._tsecr: int | None = None
        self._holes = False
        self._fin: int | None = None
        self._store = ByteStore()
        self._known_ack: int | None = None
        self._measure: Packet | None = None
        #: The other end may close: after this many bytes of its, or (-1) anywhere; None: it may not.
        self.fin_after: int | None = None

    # -- what both have agreed upon, once both SYNs are there ----------------------------------------------------------

    @property
    def timestamps(self) -> bool:
        return self._both(lambda packet: packet.options.tsval is not None)

    @property
    def sack(self) -> bool:
        return self._both(lambda packet: packet.options.sack_permitted)

    @property
    def their_scale(self) -> int:
        """What the windows that they announce are shifted by."""
        return (self.their_syn.options.window_scale or 0) if self._scaled and self.their_syn is not None else 0

    @property
    def our_scale(self) -> int:
        return (self._our_syn.options.window_scale or 0) if self._scaled and self._our_syn is not None else 0

    @property
    def _scaled(self) -> bool:
        return self._both(lambda packet: packet.options.window_scale is not None)

    def _both(self, has: Callable[[Packet], bool]) -> bool:
        return all(packet is not None and has(packet) for packet in (self._our_syn, self.their_syn))

    @property
    def numbers(self) -> dict[str, int | None]:
        """Where things stood, for a report: as on the wire."""
        known = {"sent_end": self._sent_end, "acked": self._acked, "right_edge": self._edge, "our_end": self._our_end,
                 "our_ack": self._our_ack, "our_right_edge": self._our_edge, "known_ack": self._known_ack}
        return {name: value % MODULUS if value is not None else None for name, value in known.items()} | {
            "tsval": self._tsval, "tsecr": self._tsecr}

    # -- what leaves us ------------------------------------------------------------------------------------------------

    def sent(self, packet: Packet) -> None:
        start = unwrap(self._our_end, packet.seq)
        end = start + packet.sequence_length
        if packet.flags & SYN and self._our_syn is None:
            self._our_syn, self._our_first = packet, start
        ack = unwrap(self._sent_end, packet.ack) if packet.flags & ACK else None
        if ack is not None:
            scale = 0 if packet.flags & SYN else self.our_scale
            self._our_ack = max(ack, self._our_ack or ack)
            self._our_edge = max(ack + (packet.window << scale), self._our_edge or 0)
        tsval = packet.options.tsval
        if tsval is not None:
            stamp = self._stamps.get(tsval)
            if stamp is None:
                self._stamps[tsval] = _Stamp(tsval, start, ack)
            else:
                stamp.start = min(start, stamp.start)
                stamp.ack = min(ack, stamp.ack) if ack is not None and stamp.ack is not None else None
        if self._our_end is None or end > self._our_end:
            self._our_end = end
            self._pieces.append((end, tsval, ack))

    # -- what comes ----------------------------------------------------------------------------------------------------

    def see(self, packet: Packet) -> None:
        """Raises Violation."""
        self._ip_header(packet)
        if self._handshake(packet):
            return
        self._flags(packet)
        start = unwrap(self._sent_end, packet.seq)
        ack = unwrap(self._our_end, packet.ack)
        self._timestamp(packet, ack)
        self._acknowledgement(packet, ack)
        self._sequence(packet, start, self._learn(packet, ack))
        self._content(packet, start)
        self._right_edge(packet, ack)
        self._size(packet)
        self._sack(packet, ack)
        self._note(packet, start, ack)

    def _note(self, packet: Packet, start: int, ack: int) -> None:
        self._sent_end = max(start + packet.sequence_length, self._sent_end or 0)
        # Blocks, or, from one that does not tell them, the same acknowledgement again.
        self._holes = bool(packet.options.sack) or (ack == self._acked and not packet.payload_len and not self.sack)
        self._acked = max(ack, self._acked or 0)
        while self._pieces and self._pieces[0][0] <= self._acked:
            self._pieces.popleft()

    def _ip_header(self, packet: Packet) -> None:
        if packet.fragment:
            raise Violation("fragment", "a fragmented segment", packet)
        if packet.ecn or packet.flags & (ECE | CWR):
            raise Violation("ecn", f"ECN field {packet.ecn}, flags {packet.flags:#x}, though we did not negotiate ECN",
                            packet)
        if packet.flags & SYN:
            return
        measure = self._measure = self._measure or packet
        for name, here, there in (("TTL", packet.ttl, measure.ttl), ("TOS", packet.tos, measure.tos),
                                  ("DF", packet.df, measure.df)):
            if here != there:
                raise Violation("ip-header", f"{name} {int(here)}, was {int(there)}", packet)

    def _handshake(self, packet: Packet) -> bool:
        """Whether the packet belongs to it: the other end's SYN, or the same once more while nothing followed it."""
        if packet.flags & RST:
            raise Violation("rst", "the other end resets the connection", packet)
        first = self.their_syn
        if first is None:
            self._first_word(packet)
            return True
        if not packet.flags & SYN:
            return False
        if packet.seq != first.seq or self._sent_end != self._first or packet.options.mss != first.options.mss:
            raise Violation("syn", "a SYN after the handshake", packet)
        return True

    def _first_word(self, packet: Packet) -> None:
        ours, options = self._our_syn, packet.options
        if not packet.flags & SYN:
            raise Violation("syn", "the first segment is not a SYN", packet)
        if packet.payload_len or packet.flags & (FIN | URG):
            raise Violation("syn", "a SYN that carries more than that", packet)
        if packet.flags & ACK:
            if ours is None or unwrap(self._our_end, packet.ack) != self._our_end:
                raise Violation("ack", f"the SYN is not acknowledged by {packet.ack}", packet)
            self._acked = self._our_end
            for there, here, name in ((options.tsval, ours.options.tsval, "timestamps"),
                                      (options.window_scale, ours.options.window_scale, "a window scale"),
                                      (options.sack_permitted or None, ours.options.sack_permitted or None, "SACK")):
                if there is not None and here is None:
                    raise Violation("syn", f"{name}, though we did not offer it", packet)
            if options.tsval is not None and options.tsecr not in self._stamps:
                raise Violation("tsecr", f"TSecr {options.tsecr} was never sent by us", packet)
            self._tsecr = options.tsecr
        elif ours is not None:
            raise Violation("syn", "a SYN that acknowledges nothing", packet)
        self.their_syn = packet
        self._first = self._sent_end = unwrap(None, packet.seq) + 1
        self._tsval = options.tsval

    def _flags(self, packet: Packet) -> None:
        if not packet.flags & ACK:
            raise Violation("ack", "a segment without ACK", packet)
        if packet.flags & URG:
            raise Violation("urgent", "urgent data, which nobody sends here", packet)

    def _timestamp(self, packet: Packet, ack: int) -> None:
        tsval, tsecr = packet.options.tsval, packet.options.tsecr
        if tsval is None or tsecr is None:
            if self.timestamps:
                raise Violation("timestamp", "no timestamp, though negotiated", packet)
            return
        if not self.timestamps:
            raise Violation("timestamp", "a timestamp, though not negotiated", packet)
        if self._tsval is not None and difference(tsval, self._tsval) < 0 and self._path.ordered:
            raise Violation("tsval", f"TSval {tsval} is {-difference(tsval, self._tsval)} less than the one before",
                            packet)
        self._echo(packet, tsecr, ack)
        if self._tsval is None or difference(tsval, self._tsval) > 0:
            self._tsval = tsval

    def _echo(self, packet: Packet, tsecr: int, ack: int) -> None:
        stamp = self._stamps.get(tsecr)
        if stamp is None:
            raise Violation("tsecr", f"TSecr {tsecr} was never sent by us", packet)
        if stamp.start > ack:
            raise Violation("tsecr", f"TSecr {tsecr} was sent with seq {stamp.start % MODULUS} and later ones only, "
                            f"which ack {packet.ack} has not reached (RFC 7323 4.3)", packet)
        if not self._path.ordered:
            return
        if self._tsecr is not None and difference(tsecr, self._tsecr) < 0:
            raise Violation("tsecr", f"TSecr {tsecr} is older than the one before, {self._tsecr}", packet)
        advances = self._acked is not None and ack > self._acked and not self._holes and not packet.options.sack
        floor = self._pieces[0][1] if self._pieces and advances else None
        if floor is not None and difference(tsecr, floor) < 0:
            raise Violation("tsecr", f"TSecr {tsecr} is older than byte {(self._acked or 0) % MODULUS}, which it "
                            f"acknowledges and which was first sent at {floor} (RFC 7323 4.3)", packet)
        self._tsecr = tsecr
        while self._stamps and difference(next(iter(self._stamps)), tsecr) < 0:
            del self._stamps[next(iter(self._stamps))]

    def _acknowledgement(self, packet: Packet, ack: int) -> None:
        if self._our_end is not None and ack > self._our_end:
            raise Violation("ack", f"ack {packet.ack} is {ack - self._our_end} more than we sent", packet)
        if self._acked is not None and ack < self._acked and self._path.ordered:
            raise Violation("ack", f"ack {packet.ack} is {self._acked - ack} less than the one before", packet)

    def _learn(self, packet: Packet, ack: int) -> int:
        """Up to where the other end knew, when it sent this, that we have everything. What an earlier packet tells is
        not certain where that may have been sent later."""
        stamp = self._stamps.get(packet.options.tsecr) if packet.options.tsecr is not None else None
        known = [self._known_ack if self._path.ordered else None, stamp.ack if stamp is not None else None]
        for end, _tsval, carried in self._pieces:
            if end > ack:
                break
            known.append(carried)
        self._known_ack = max((one for one in known if one is not None), default=None)
        return self._known_ack or 0

    def _sequence(self, packet: Packet, start: int, una: int) -> None:
        end, sent = start + packet.payload_len, self._sent_end
        if sent is None or self._our_ack is None or self._our_edge is None:
            raise Violation("sequence", "a segment though we have acknowledged nothing", packet)
        if start > sent and self._path.lossless:
            raise Violation("sequence", f"seq {packet.seq} lies {start - sent} beyond what was sent, {sent % MODULUS}",
                            packet)
        if start + 1 < una:
            what = "sends again" if packet.payload_len else "says"
            raise Violation("sequence", f"it {what} seq {packet.seq}, though it knows that we have everything up to "
                            f"{una % MODULUS}", packet)
        if packet.payload_len > 1 and start < una:
            raise Violation("sequence", f"it sends again bytes from seq {packet.seq}, though it knows that we have "
                            f"everything up to {una % MODULUS}", packet)
        if not packet.payload_len and not packet.flags & FIN and start < sent and start + 1 > self._our_ack \
                and self._path.ordered:
            raise Violation("sequence", f"a segment without payload at seq {packet.seq}: neither at SND.NXT, "
                            f"{sent % MODULUS}, nor a probe before {self._our_ack % MODULUS}", packet)
        if end > self._our_edge and not (packet.payload_len == 1 and start == self._our_edge):
            raise Violation("window", f"it sends {end - self._our_edge} bytes beyond the window, which ends at "
                            f"{self._our_edge % MODULUS}", packet)
        self._end_of_stream(packet, start)

    def _end_of_stream(self, packet: Packet, start: int) -> None:
        end = start + packet.payload_len
        if self._fin is not None:
            if end > self._fin - 1 and packet.payload_len:
                raise Violation("fin", f"bytes behind the FIN at {(self._fin - 1) % MODULUS}", packet)
            if packet.flags & FIN and end + 1 != self._fin:
                raise Violation("fin", f"the FIN has moved from {(self._fin - 1) % MODULUS} to {end % MODULUS}", packet)
        elif packet.flags & FIN:
            count = end - (self._first or 0)
            if self.fin_after is None or self.fin_after not in (-1, count):
                raise Violation("fin", f"a FIN after {count} bytes, which nobody asked for", packet)
            if end + 1 < (self._sent_end or 0):
                raise Violation("fin", f"a FIN at {end % MODULUS}, before bytes that came already", packet)
            self._fin = end + 1

    def _content(self, packet: Packet, start: int) -> None:
        wrong = self._store.add(start, packet.payload)
        if wrong is not None:
            raise Violation("bytes", f"the byte at seq {wrong % MODULUS} differs from the one that came before", packet)

    def _right_edge(self, packet: Packet, ack: int) -> None:
        edge = ack + (packet.window << self.their_scale)
        if self._edge is not None and edge < self._edge and self._path.ordered:
            raise Violation("right-edge", f"the window's right edge goes back by {self._edge - edge}: ack {packet.ack} "
                            f"+ {packet.window << self.their_scale} < {self._edge % MODULUS}", packet)
        self._edge = max(edge, self._edge or 0)

    def _size(self, packet: Packet) -> None:
        mss = self._our_syn.options.mss if self._our_syn is not None else None
        mss = mss if mss is not None else DEFAULT_MSS
        if packet.payload_len and packet.payload_len + packet.options.length > mss:
            raise Violation("mss", f"payload {packet.payload_len} + options {packet.options.length} > MSS {mss}",
                            packet)

    def _sack(self, packet: Packet, ack: int) -> None:
        if packet.options.sack and not self.sack:
            raise Violation("sack", "SACK blocks, though not negotiated", packet)
        for index, (left, right) in enumerate(packet.options.sack):
            low = unwrap(self._our_end, left)
            high = low + difference(right, left)
            text = f"SACK block {left}-{right}"
            if high <= low:
                raise Violation("sack", f"{text} is empty", packet)
            if high > (self._our_end or 0):
                raise Violation("sack", f"{text} ends {high - (self._our_end or 0)} beyond what we sent", packet)
            if low <= (self._our_first or 0):
                raise Violation("sack", f"{text} begins before our first byte", packet)
            if index and low < ack:  # the first may tell of a duplicate (RFC 2883)
                raise Violation("sack", f"{text} lies below ack {packet.ack} and is not the first block", packet)

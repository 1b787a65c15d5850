"""What a capture says about time and repetition: the peer's stall, counts, and retransmissions (assertion 9 on the
wire)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from .judgement import Assertion, Expectations, Violation
from .packet import RST, Packet, Role
from .wire import Step, Wire

_MIN_RTO_NS = 200_000_000       # Linux: TCP_RTO_MIN, include/net/tcp.h


@dataclass
class Counts:
    """`packets` per sending host; the rest per direction: `passed` (towards the peer) and `peer`. A tail-loss probe
    is a retransmission too, and counted in both. `probes`: keep-alive and window probes. `bytes`: payload bytes, each
    counted once."""

    packets: dict[str, int] = field(default_factory=dict)
    retransmissions: dict[str, int] = field(default_factory=lambda: {"passed": 0, "peer": 0})
    tail_loss_probes: dict[str, int] = field(default_factory=lambda: {"passed": 0, "peer": 0})
    probes: dict[str, int] = field(default_factory=lambda: {"passed": 0, "peer": 0})
    resets: dict[str, int] = field(default_factory=lambda: {"passed": 0, "peer": 0})
    bytes: dict[str, int] = field(default_factory=lambda: {"passed": 0, "peer": 0})

    def to_json(self) -> dict[str, dict[str, int]]:
        return asdict(self)


@dataclass(frozen=True)
class Stall:
    """`answer_ns`: the longest time between a data segment of the peer (its first transmission) and the first packet
    of the passed end that acknowledges all of it; an answer carries that acknowledgement too.
    `silence_ns`: the longest time in which the passed end sent nothing at all while the peer had data outstanding.
    What is still open when the capture ends is counted up to its last packet. `gap_ns`: the longest time between two
    packets of the passed end, outstanding data or not: for a stream towards the peer. `at_ns`: when `longest_ns`
    began, 0 if there was none."""

    answer_ns: int = 0
    silence_ns: int = 0
    gap_ns: int = 0
    at_ns: int = 0

    @property
    def longest_ns(self) -> int:
        return max(self.answer_ns, self.silence_ns)


class StallMeter:
    """Computes `Stall` from packets in order. Probes (no new data) are not data segments."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, int]] = deque()        # end of a peer's data segment, when it was sent
        self._outstanding_since: int | None = None
        self._last_passed: int | None = None
        self._last: int = 0
        self._answer = (0, 0)
        self._silence = (0, 0)
        self._gap = 0

    def see(self, step: Step, wire: Wire) -> None:
        now = self._last = step.packet.time_ns
        if step.from_peer:
            sent = wire.peer.sent_end
            if step.packet.payload_len and not step.probe and (sent is None or step.data_end > sent):
                self._waiting.append((step.data_end, now))
                if self._outstanding_since is None:
                    self._outstanding_since = now
            return
        self._note_silence(now)
        if self._last_passed is not None:
            self._gap = max(self._gap, now - self._last_passed)
        self._last_passed = now
        while step.ack is not None and self._waiting and self._waiting[0][0] <= step.ack:
            _, since = self._waiting.popleft()
            self._answer = max(self._answer, (now - since, since))
        self._outstanding_since = max(self._waiting[0][1], now) if self._waiting else None

    def _note_silence(self, now: int) -> None:
        if self._outstanding_since is not None:
            self._silence = max(self._silence, (now - self._outstanding_since, self._outstanding_since))

    def result(self) -> Stall:
        self._note_silence(self._last)
        if self._waiting:
            self._answer = max(self._answer, (self._last - self._waiting[0][1], self._waiting[0][1]))
        return Stall(self._answer[0], self._silence[0], self._gap, max(self._answer, self._silence)[1])


class _Sender:
    """One direction's recovery state, as far as the capture shows it."""

    def __init__(self) -> None:
        self.flight: deque[tuple[int, int, bool]] = deque()     # end, time of the last transmission, sent once
        self.last_activity: int | None = None                  # the last data sent, or progress of acknowledgement
        self.last_sent: tuple[int, int | None] | None = None   # the last new data: when, and SND.UNA then
        self.rtt_min_ns = 0
        self._measured = False
        self.probed = False

    def acknowledged(self, ack: int, now: int) -> None:
        """Progress: take an RTT sample, unless something was sent twice of what is acknowledged (Karn; RFC 6298 2, 3;
        Linux: net/ipv4/tcp_input.c, tcp_clean_rtx_queue)."""
        sample: int | None = None
        clean = True
        while self.flight and self.flight[0][0] <= ack:
            _, sent, once = self.flight.popleft()
            sample, clean = now - sent, clean and once
        if sample is not None and clean:
            self.rtt_min_ns = min(self.rtt_min_ns, sample) if self._measured else sample
            self._measured = True
        self.last_activity, self.probed = now, False


class Retransmissions(Assertion):
    """9, as far as packets tell: on a loss-free path nothing is retransmitted, except at most one tail-loss probe.

    A tail-loss probe (RFC 8985 7.3) repeats the end of a burst: it ends at SND.NXT, begins above SND.UNA (more than
    that segment was outstanding), comes after more than 2 SRTT + 2 jiffies of silence, and is the only one since the
    last progress. The first of the two jiffies may be nearly over when the timer is set, and the burst may be captured
    a little late, so that three quarters of one are sure (measured: probes after 3.7 to 8.1 ms with HZ=250). The
    sender's SRTT is not known (a new owner begins to measure anew): the shortest round trip that the capture shows
    stands for it, a lower bound, which can only turn a violation into a probe. An acknowledgement that was captured
    may not have reached the sender yet, for as long as a pass holds it: of what is repeated although it was
    acknowledged, silence and SND.UNA are those of its sending.
    Everything else that repeats bytes, or fills a gap, is a retransmission: called RTO where SND.UNA's segment comes
    after at least 200 ms of silence."""

    number = 9

    def __init__(self, expect: Expectations, counts: Counts) -> None:
        super().__init__(expect)
        self._counts = counts
        self._senders = {False: _Sender(), True: _Sender()}
        if not expect.loss_free:
            self.not_checked.append("9: retransmissions are counted, not judged (the path is not said to be loss-free)")

    def see(self, step: Step, wire: Wire) -> Iterator[Violation]:
        packet, now = step.packet, step.packet.time_ns
        sender, receiver = self._senders[step.from_peer], self._senders[not step.from_peer]
        ours, theirs = (wire.peer, wire.passed) if step.from_peer else (wire.passed, wire.peer)
        if step.ack is not None and (theirs.acked is None or step.ack > theirs.acked):
            receiver.acknowledged(step.ack, now)
        if not packet.payload_len or step.probe or packet.flags & RST:
            return
        direction = "peer" if step.from_peer else "passed"
        if ours.sent_end is None or step.data_start >= ours.sent_end:
            sender.flight.append((step.data_end, now, True))
            sender.last_activity, sender.probed = now, False
            sender.last_sent = (now, ours.acked if ours.acked is not None else ours.first)
            return
        silence = now - sender.last_activity if sender.last_activity is not None else 0
        una = ours.acked if ours.acked is not None else ours.first
        if una is not None and step.data_start < una and sender.last_sent is not None:
            silence, una = now - sender.last_sent[0], sender.last_sent[1]
        burst = una is not None and step.data_start > una
        patience = 2 * sender.rtt_min_ns + self.expect.jiffy_ns * 3 // 4
        self._counts.retransmissions[direction] += 1
        sender.flight = deque((end, sent, once and end <= step.data_start) for end, sent, once in sender.flight)
        sender.last_activity = now
        if step.end == ours.sent_end and burst and silence > patience and not sender.probed:
            sender.probed = True
            self._counts.tail_loss_probes[direction] += 1
        elif self.expect.loss_free:
            kind = "RTO: " if step.data_start == una and silence >= _MIN_RTO_NS else ""
            yield self.fail(f"{kind}the {'peer' if step.from_peer else 'passed end'} retransmitted "
                            f"{packet.payload_len} bytes at seq {packet.seq} after {silence / 1e6:.3f} ms of silence",
                            packet)


class Tally:
    """Fills what needs no judgement into `Counts`."""

    def __init__(self) -> None:
        self.counts = Counts()
        self._packets: Counter[Role] = Counter()

    def see(self, step: Step, new_bytes: int) -> None:
        direction = "peer" if step.from_peer else "passed"
        self._packets[step.host] += 1
        self.counts.bytes[direction] += new_bytes
        self.counts.probes[direction] += step.probe
        self.counts.resets[direction] += bool(step.packet.flags & RST)

    def result(self) -> Counts:
        self.counts.packets = {str(role): number for role, number in sorted(self._packets.items())}
        return self.counts


def order(packets: list[Packet]) -> list[Packet]:
    """Packets of several captures in time order; packets of one capture at the same instant stay in file order."""
    return sorted(packets, key=lambda packet: packet.time_ns)

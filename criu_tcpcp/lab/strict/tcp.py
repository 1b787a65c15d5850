"""A small, honest TCP endpoint without I/O: RFC 9293, timestamps and window scaling (RFC 7323), SACK as a receiver.

    tcp = Tcp(Settings(local, remote, ...))
    tcp.connect(now)
    while ...: send tcp.take(); tcp.receive(packet, now); tcp.tick(now) at tcp.deadline(); tcp.write / read / close

It behaves as a plain stack does: it acknowledges every second segment or after a delay, at once what is out of order;
answers what is not acceptable with an acknowledgement (RFC 9293 3.10.7.4); never takes back a window that it has
announced; sends again after a time (RFC 6298), or three duplicate acknowledgements (RFC 5681, 6582); probes a closed
window. Everything that it sends and gets goes by its `Judge` first, whose Violation `receive` passes on.

    send    snd_una ---- snd_nxt ---- end of `_outgoing`        receive    read ---- rcv_nxt ---- right edge
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from criu_tcpcp.core.endpoint import Endpoint
from criu_tcpcp.verify.packet import ACK, FIN, PSH, SYN, Options, Packet
from criu_tcpcp.verify.seq import MODULUS, difference, unwrap

from .judge import DEFAULT_MSS, Judge, Path, Violation

_MAX_RTO_S, _MIN_RTO_S, _FIRST_RTO_S = 60.0, 0.2, 1.0
_DUPLICATES = 3
_TIMESTAMP_LENGTH = 12


@dataclass(frozen=True)
class Settings:
    """`window_scale`: None does not offer it. `buffer`: bytes that may wait for the reader; the window is what is left
    of it. `ack_delay_s`: how long an acknowledgement may wait for a second segment. `flight`: most bytes in flight."""

    local: Endpoint
    remote: Endpoint
    iss: int = 0
    tsval: int = 0  # what the timestamp clock says at time 0
    timestamps: bool = True
    sack: bool = True
    window_scale: int | None = 7
    mss: int = 1460
    buffer: int = 1 << 18
    ack_delay_s: float = 0.04
    flight: int = 1 << 16
    path: Path = field(default_factory=Path)


class State(enum.Enum):
    CLOSED = "closed"
    LISTEN = "listen"
    SYN_SENT = "syn-sent"
    SYN_RECEIVED = "syn-received"
    OPEN = "open"


class Tcp:
    """See the module. All numbers of the sequence spaces are unwrapped."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.judge = Judge(settings.path)
        self.state = State.CLOSED
        self.inbox = bytearray()
        self.fin_received = False
        self.counts = dict.fromkeys(("sent", "received", "sent_again", "out_of_order", "duplicates", "probes_sent",
                                     "probes_received", "zero_windows_sent", "zero_windows_received",
                                     "sacks_received"), 0)
        self._packets: list[Packet] = []
        # sending
        iss = settings.iss + MODULUS
        self._iss = self._snd_una = self._snd_nxt = iss
        self._outgoing = bytearray()  # from snd_una on (behind the SYN)
        self._closing = False
        self._fin_position: int | None = None  # of our FIN, once it was sent
        self._snd_wnd = self._max_wnd = 0
        self._wl1, self._wl2 = 0, 0
        self._mss = DEFAULT_MSS
        self._cwnd, self._ssthresh = 0, settings.flight
        self._duplicates = 0
        self._recover: int | None = None
        self._srtt: float | None = None
        self._rttvar = 0.0
        self._rto_s = _FIRST_RTO_S
        self._timed: tuple[int, float] | None = None  # without timestamps: a sequence number, and when it was sent
        self._resend_at: float | None = None
        # receiving
        self._rcv_nxt = 0
        self._right_edge = 0
        self._last_ack_sent = 0
        self._ts_recent = 0
        self._pieces: dict[int, bytes] = {}
        self._fin_at: int | None = None
        self._newest: int = 0
        self._ack_at: float | None = None
        self._unacked_segments = 0

    # -- for the program -----------------------------------------------------------------------------------------------

    def listen(self) -> None:
        self.state = State.LISTEN

    def connect(self, now: float) -> None:
        self.state = State.SYN_SENT
        self._emit_syn(now)

    def write(self, data: bytes, now: float) -> None:
        self._outgoing += data
        self._push(now)

    def close(self, now: float) -> None:
        """A FIN behind what was written."""
        self._closing = True
        self._push(now)

    def read(self, limit: int, now: float) -> bytes:
        data = bytes(self.inbox[:limit])
        del self.inbox[:limit]
        if data and self.state is State.OPEN and not self.fin_received and self._window_opens():
            self._emit_ack(now)
        return data

    @property
    def unacknowledged(self) -> int:
        """Bytes that were written, and not acknowledged yet."""
        return len(self._outgoing)

    @property
    def done(self) -> bool:
        """Both ends have closed, and both FINs are acknowledged."""
        return self.fin_received and self._fin_position is not None and self._snd_una > self._fin_position

    @property
    def gap(self) -> int | None:
        """The sequence number of the first byte that is missing while later ones are there, or None."""
        return self._rcv_nxt % MODULUS if self._pieces else None

    @property
    def rcv_nxt(self) -> int:
        return self._rcv_nxt % MODULUS

    @property
    def snd_una(self) -> int:
        return self._snd_una % MODULUS

    # -- for who moves the packets -------------------------------------------------------------------------------------

    def take(self) -> list[Packet]:
        """What is to be sent now."""
        packets, self._packets = self._packets, []
        return packets

    def deadline(self) -> float | None:
        """When `tick` has something to do."""
        return min((at for at in (self._resend_at, self._ack_at) if at is not None), default=None)

    def tick(self, now: float) -> None:
        if self._ack_at is not None and now >= self._ack_at:
            self._emit_ack(now)
        if self._resend_at is not None and now >= self._resend_at:
            self._time_out(now)

    def receive(self, packet: Packet, now: float) -> None:
        """One packet of the other end's whose checksums are right. Raises Violation."""
        self.counts["received"] += 1
        if self.state in (State.CLOSED, State.LISTEN) and not packet.flags & SYN:
            raise Violation("syn", "a segment of a connection that is not there", packet)
        self.judge.see(packet)
        if packet.flags & SYN:
            self._handshake(packet, now)
        else:
            self._segment(packet, now)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _handshake(self, packet: Packet, now: float) -> None:
        if self.state in (State.OPEN, State.SYN_RECEIVED):
            if packet.flags & ACK:
                self._emit_ack(now)
            else:
                self._emit_syn(now)
            return
        self._rcv_nxt = self._right_edge = self._last_ack_sent = unwrap(None, packet.seq) + 1
        self._newest = self._rcv_nxt
        self._ts_recent = packet.options.tsval or 0
        self._mss = packet.options.mss if packet.options.mss is not None else DEFAULT_MSS
        self._snd_wnd = self._max_wnd = packet.window
        self._wl1, self._wl2 = self._rcv_nxt, self._snd_una
        if self.state is State.LISTEN:
            self.state = State.SYN_RECEIVED
            self._emit_syn(now)
        else:
            self._open(now)
            self._emit_ack(now)

    def _open(self, now: float) -> None:
        self.state = State.OPEN
        self._snd_una = self._snd_nxt = self._iss + 1
        self._resend_at, self._rto_s = None, _FIRST_RTO_S
        if self.judge.timestamps:
            self._mss -= _TIMESTAMP_LENGTH
        self._cwnd = 10 * self._mss
        self._push(now)

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _segment(self, packet: Packet, now: float) -> None:
        start = unwrap(self._rcv_nxt, packet.seq)
        end = start + packet.sequence_length
        if not packet.window:
            self.counts["zero_windows_received"] += 1
        if packet.options.sack:
            self.counts["sacks_received"] += 1
        if self._is_old(packet) or not self._is_acceptable(start, end):
            self.counts["probes_received" if end == start else "duplicates"] += 1
            self._emit_ack(now)
            return
        if packet.options.tsval is not None and start <= self._last_ack_sent:
            self._ts_recent = packet.options.tsval
        ack = unwrap(self._snd_nxt, packet.ack)
        if self.state is State.SYN_RECEIVED:
            if ack != self._iss + 1:
                return
            self._open(now)
        self._acknowledged(packet, start, ack, now)
        if end > start:
            self._take_in(packet, start, now)
        self._push(now)

    def _is_old(self, packet: Packet) -> bool:
        """PAWS (RFC 7323 5.3): only on a path on which packets overtake each other, else the judge has spoken."""
        return packet.options.tsval is not None and difference(packet.options.tsval, self._ts_recent) < 0

    def _is_acceptable(self, start: int, end: int) -> bool:
        """RFC 9293 3.10.7.4, with the window that was announced."""
        window_end = self._right_edge
        if end == start:
            return self._rcv_nxt <= start <= max(window_end, self._rcv_nxt)
        return start < window_end and end > self._rcv_nxt

    def _take_in(self, packet: Packet, start: int, now: float) -> None:
        payload, end = packet.payload, start + packet.payload_len
        if packet.flags & FIN:
            self._fin_at = end
        if start < self._rcv_nxt:
            payload, start = payload[self._rcv_nxt - start:], self._rcv_nxt
        in_order = start == self._rcv_nxt
        filled = bool(self._pieces)
        if payload and len(payload) > len(self._pieces.get(start, b"")):
            self._pieces[start] = payload
        self._newest = start
        self._drain()
        if not in_order:
            self.counts["out_of_order"] += 1
        if self._fin_at == self._rcv_nxt and not self.fin_received:
            self.fin_received = True
            self._rcv_nxt += 1
        self._unacked_segments += 1
        if not in_order or filled or self.fin_received or self._unacked_segments >= 2:
            self._emit_ack(now)
        elif self._ack_at is None:
            self._ack_at = now + self.settings.ack_delay_s

    def _drain(self) -> None:
        """What is in order now goes to the program."""
        while self._pieces:
            start = min(self._pieces)
            if start > self._rcv_nxt:
                return
            payload = self._pieces.pop(start)[self._rcv_nxt - start:]
            self.inbox += payload
            self._rcv_nxt += len(payload)

    # -- what the other end has, and how much it wants -----------------------------------------------------------------

    def _acknowledged(self, packet: Packet, start: int, ack: int, now: float) -> None:
        window = packet.window << self.judge.their_scale
        if ack > self._snd_una:
            self._newly_acknowledged(packet, ack, now)
        elif ack == self._snd_una and not packet.payload_len and not packet.flags & FIN and window == self._snd_wnd \
                and self._snd_nxt > self._snd_una:
            self._duplicates += 1
            if self._duplicates == _DUPLICATES and self._recover is None:
                self._recover = self._snd_nxt
                self._ssthresh = max((self._snd_nxt - self._snd_una) // 2, 2 * self._mss)
                self._cwnd = self._ssthresh
                self._send_again(now)
        if ack >= self._snd_una and (start > self._wl1 or (start == self._wl1 and ack >= self._wl2)):
            self._snd_wnd, self._wl1, self._wl2 = window, start, ack
            self._max_wnd = max(window, self._max_wnd)
            self._set_timer(now, only_if_needed=True)

    def _newly_acknowledged(self, packet: Packet, ack: int, now: float) -> None:
        count = ack - self._snd_una
        del self._outgoing[:count]
        self._snd_una, self._duplicates = ack, 0
        self._cwnd = min(self._cwnd + (count if self._cwnd < self._ssthresh else self._mss * self._mss // self._cwnd),
                         self.settings.flight)
        self._measure(packet, ack, now)
        self._resend_at = None
        self._set_timer(now)
        if self._recover is not None:
            if ack >= self._recover:
                self._recover = None
            else:  # a partial one: the next hole (RFC 6582 3.2)
                self._send_again(now)

    def _measure(self, packet: Packet, ack: int, now: float) -> None:
        """RFC 6298 2, 3."""
        sample: float | None = None
        if self.judge.timestamps and packet.options.tsecr is not None:
            sample = difference(self._clock(now), packet.options.tsecr) / 1000
        elif self._timed is not None and ack >= self._timed[0]:
            sample, self._timed = now - self._timed[1], None
        if sample is None:
            return
        if self._srtt is None:
            self._srtt, self._rttvar = sample, sample / 2
        else:
            self._rttvar = 0.75 * self._rttvar + 0.25 * abs(self._srtt - sample)
            self._srtt = 0.875 * self._srtt + 0.125 * sample
        self._rto_s = min(max(self._srtt + max(4 * self._rttvar, 0.001), _MIN_RTO_S), _MAX_RTO_S)

    # -- sending -------------------------------------------------------------------------------------------------------

    def _push(self, now: float) -> None:
        """Send what the windows allow."""
        if self.state is not State.OPEN:
            return
        written = self._snd_una + len(self._outgoing)
        limit = self._snd_una + min(self._snd_wnd, self._cwnd)
        while self._fin_position is None and self._snd_nxt < written:
            length = min(self._mss, written - self._snd_nxt, limit - self._snd_nxt)
            if length <= 0 or (length < self._mss and length < written - self._snd_nxt
                               and length < self._max_wnd // 2 and self._snd_nxt > self._snd_una):
                break  # a silly window (RFC 9293 3.8.6.2.1): wait for what is in flight
            self._emit_data(self._snd_nxt, length, now)
        if self._closing and self._fin_position is None and self._snd_nxt == written:
            self._fin_position = written
            self._emit(now, FIN | ACK, self._snd_nxt)
            self._snd_nxt += 1
        self._set_timer(now, only_if_needed=True)

    def _emit_data(self, start: int, length: int, now: float) -> None:
        offset = start - self._snd_una
        payload = bytes(self._outgoing[offset:offset + length])
        if self._timed is None and start == self._snd_nxt:
            self._timed = (start + length, now)
        self._emit(now, ACK | PSH, start, payload)
        self._snd_nxt = max(start + length, self._snd_nxt)

    def _send_again(self, now: float) -> None:
        """The first segment that is not acknowledged."""
        self.counts["sent_again"] += 1
        self._timed = None
        length = min(self._mss, len(self._outgoing), self._snd_nxt - self._snd_una)
        if length:
            self._emit_data(self._snd_una, length, now)
        else:
            self._emit(now, FIN | ACK, self._snd_una)

    def _set_timer(self, now: float, *, only_if_needed: bool = False) -> None:
        """It runs while something is in flight, or while a closed window keeps something back."""
        waiting = self._snd_nxt > self._snd_una or (self._outgoing and self._snd_wnd < min(self._mss, self._max_wnd))
        if not waiting:
            self._resend_at = None
        elif self._resend_at is None or not only_if_needed:
            self._resend_at = now + self._rto_s

    def _time_out(self, now: float) -> None:
        self._rto_s = min(self._rto_s * 2, _MAX_RTO_S)
        self._resend_at = now + self._rto_s
        if self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self._emit_syn(now)
        elif self._snd_nxt > self._snd_una:
            self._recover, self._duplicates = self._snd_nxt, 0
            self._ssthresh = max((self._snd_nxt - self._snd_una) // 2, 2 * self._mss)
            self._cwnd = self._mss
            self._send_again(now)
        elif self._snd_wnd:
            self._emit_data(self._snd_nxt, min(self._snd_wnd, self._mss, len(self._outgoing)), now)
        else:  # RFC 9293 3.8.6.1: a segment that must be answered, and carries nothing
            self.counts["probes_sent"] += 1
            self._emit(now, ACK, self._snd_una - 1)

    # -- packets -------------------------------------------------------------------------------------------------------

    def _clock(self, now: float) -> int:
        return (self.settings.tsval + int(now * 1000)) % MODULUS

    def _emit_syn(self, now: float) -> None:
        settings = self.settings
        theirs = self.judge.their_syn
        answer = theirs is not None
        timestamps = settings.timestamps and (theirs is None or theirs.options.tsval is not None)
        options = Options(
            mss=settings.mss,
            window_scale=settings.window_scale if theirs is None or theirs.options.window_scale is not None else None,
            sack_permitted=settings.sack and (theirs is None or theirs.options.sack_permitted),
            tsval=self._clock(now) if timestamps else None,
            tsecr=(self._ts_recent if answer else 0) if timestamps else None)
        if answer:
            self._right_edge = self._rcv_nxt + min(settings.buffer, 0xFFFF)
        self._snd_nxt = self._iss + 1
        self._resend_at = now + self._rto_s
        self._put(SYN | (ACK if answer else 0), self._iss, b"", options, min(settings.buffer, 0xFFFF))

    def _emit_ack(self, now: float) -> None:
        self._emit(now, ACK, self._snd_nxt)

    def _emit(self, now: float, flags: int, start: int, payload: bytes = b"") -> None:
        stamps = self.judge.timestamps
        window = self._announce()
        if not window:
            self.counts["zero_windows_sent"] += 1
        self._put(flags, start, payload, Options(
            tsval=self._clock(now) if stamps else None, tsecr=self._ts_recent if stamps else None,
            sack=self._sack_blocks(self._mss - len(payload))), window)
        self._ack_at, self._unacked_segments = None, 0
        self._last_ack_sent = self._rcv_nxt

    def _put(self, flags: int, start: int, payload: bytes, options: Options, window: int) -> None:
        self.counts["sent"] += 1
        settings = self.settings
        packet = Packet(
            time_ns=0, capture="strict", number=self.counts["sent"], ip_version=settings.local.address.version,
            src=settings.local, dst=settings.remote, seq=start % MODULUS,
            ack=self._rcv_nxt % MODULUS if flags & ACK else 0, flags=flags, window=window, payload=payload,
            payload_len=len(payload), options=options, df=True)
        self.judge.sent(packet)
        self._packets.append(packet)

    def _wanted_edge(self) -> int:
        return self._rcv_nxt + max(self.settings.buffer - len(self.inbox), 0)

    def _window_opens(self) -> bool:
        """Worth an acknowledgement of its own (RFC 9293 3.8.6.2.2)."""
        return self._wanted_edge() - self._right_edge >= min(self.settings.mss, self.settings.buffer // 2)

    def _announce(self) -> int:
        """The window field. The edge moves on by a segment at least, and never back: a window that the scale does not
        divide is rounded up."""
        if self._window_opens():
            self._right_edge = self._wanted_edge()
        unit = 1 << self.judge.our_scale
        field_ = min(-(-max(self._right_edge - self._rcv_nxt, 0) // unit), 0xFFFF)
        self._right_edge = self._rcv_nxt + field_ * unit
        return field_

    def _sack_blocks(self, room: int) -> tuple[tuple[int, int], ...]:
        """As many as `room` bytes of the segment allow, the block with the newest segment first (RFC 2018 4)."""
        if not self._pieces or not self.judge.sack:
            return ()
        most = 3 if self.judge.timestamps else 4
        blocks: list[tuple[int, int]] = []
        for start in sorted(self._pieces):
            end = start + len(self._pieces[start])
            if blocks and start <= blocks[-1][1]:
                blocks[-1] = (blocks[-1][0], max(end, blocks[-1][1]))
            else:
                blocks.append((start, end))
        blocks.sort(key=lambda block: not block[0] <= self._newest < block[1])
        return tuple((low % MODULUS, high % MODULUS) for low, high in blocks[:max(0, min((room - 4) // 8, most))])

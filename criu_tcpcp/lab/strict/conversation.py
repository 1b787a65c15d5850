"""What is said over the strict endpoint: the peer's half of `lab.node`'s `rr` and `stream`, sans I/O.

A conversation is moved by `step(now)`, which reads and writes what can be; `deadline(now)` says when it wants to be
asked again though no packet came. Where nothing moves for `patience_s` while the other end owes something, a Violation
tells what is missing.
"""

from __future__ import annotations

from typing import Any

from ..answering import Pace
from ..streams import Checker, Stream
from .judge import Violation
from .tcp import State, Tcp

_CHUNK = 1 << 16
_MORE = 50_000
_AHEAD = 1 << 17  # bytes that wait for their acknowledgement, before more is written


class Conversation:
    """The half of it that both kinds share: what came, and whether anything still moves."""

    def __init__(self, tcp: Tcp, seed_out: int, seed_in: int, patience_s: float) -> None:
        self.tcp = tcp
        self.sent = 0
        self._out = Stream(seed_out)
        self._checker = Checker(seed_in)
        self._patience_s = patience_s
        self._moved: tuple[int, int, bool] | None = None
        self._moved_at: float | None = None

    @property
    def received(self) -> int:
        return self._checker.offset

    @property
    def done(self) -> bool:
        return self.tcp.done

    def stop(self) -> None:
        """Come to an end."""
        raise NotImplementedError

    def step(self, now: float) -> None:
        raise NotImplementedError

    def deadline(self, now: float) -> float | None:
        """By the pace, or by the patience."""
        wanted = [self._due(now)]
        if self._owed() and self._moved_at is not None:
            wanted.append(self._moved_at + self._patience_s)
        return min((at for at in wanted if at is not None), default=None)

    def report(self) -> dict[str, Any]:
        return {"bytes_sent": self.sent, "bytes_received": self.received, **self.tcp.counts}

    def _due(self, now: float) -> float | None:
        raise NotImplementedError

    def _owed(self) -> bool:
        """The other end has to say something."""
        raise NotImplementedError

    def _take(self, limit: int, now: float) -> None:
        data = self.tcp.read(limit, now)
        self._checker.feed(data)
        if self._checker.wrong:
            raise Violation("stream", f"the bytes are not those of the stream: {self._checker.finish()}")

    def _watch(self, now: float) -> None:
        state = (self.tcp.snd_una, self.tcp.rcv_nxt, self._owed())
        if state != self._moved or self._moved_at is None:
            self._moved, self._moved_at = state, now
        elif self._owed() and now - self._moved_at >= self._patience_s:
            missing = f"the byte at seq {self.tcp.gap} never came, later ones did" if self.tcp.gap is not None \
                else f"{self.tcp.unacknowledged} bytes from seq {self.tcp.snd_una} on are not acknowledged" \
                if self.tcp.unacknowledged else f"nothing came behind seq {self.tcp.rcv_nxt}"
            raise Violation("silence", f"for {self._patience_s:g} s: {missing}")


class RequestResponse(Conversation):
    """Request n is due 1/rate after request n-1 was, or right after its answer if that came later. `stop` asks for an
    orderly end: the request in flight is answered, then both sides close."""

    def __init__(self, tcp: Tcp, *, rate: float, size: int, answer_size: int | None = None, seed: int = 1,
                 patience_s: float = 10.0) -> None:
        super().__init__(tcp, seed, seed + 1, patience_s)
        self.requests = 0
        self._rate, self._size = rate, size
        self._answer_size = size if answer_size is None else answer_size
        self._stopping = self._closed = False
        self._next: float | None = None

    @property
    def answers(self) -> int:
        return self.received // self._answer_size

    def stop(self) -> None:
        self._stopping = True

    def step(self, now: float) -> None:
        tcp = self.tcp
        if tcp.state is State.OPEN:
            self._take(_CHUNK, now)
            if self.received > self.requests * self._answer_size:
                raise Violation("stream", "bytes that were not asked for")
            if self.answers == self.requests and not self._closed:
                self._go_on(now)
        self._watch(now)

    def _go_on(self, now: float) -> None:
        if self._stopping:
            self._closed = True
            self.tcp.judge.fin_after = self.received
            self.tcp.close(now)
        elif self._next is None or now >= self._next:
            self.tcp.write(self._out.read(self.sent, self._size), now)
            self.sent += self._size
            self.requests += 1
            self._next = max((self._next or now) + 1 / self._rate, now)

    def _due(self, now: float) -> float | None:
        return self._next if self.answers == self.requests and not self._closed else None

    def _owed(self) -> bool:
        return self.answers < self.requests or self._closed

    def report(self) -> dict[str, Any]:
        return {"requests": self.requests, "answers": self.answers, **super().report()}


class Streams(Conversation):
    """`send` bytes out and `receive` bytes in at the same time, at `rate` and `read_rate` bytes a second. Each end
    closes behind its last byte. `stop` asks for another end: that, in both directions, _MORE bytes more have arrived
    (the connection is left as it is then)."""

    def __init__(self, tcp: Tcp, *, send: int, receive: int, rate: float | None = None, read_rate: float | None = None,
                 seed: int = 1, seed_in: int | None = None, patience_s: float = 10.0) -> None:
        super().__init__(tcp, seed, seed + 1 if seed_in is None else seed_in, patience_s)
        self._send, self._receive = send, receive
        self._sending, self._reading = Pace(rate), Pace(read_rate)
        self._paced = rate is not None, read_rate is not None
        self._closed = False
        self._enough: tuple[int, int] | None = None
        tcp.judge.fin_after = receive

    def step(self, now: float) -> None:
        tcp = self.tcp
        if tcp.state is State.OPEN:
            if tcp.inbox:
                self._take(self._reading.allowance(now, self.received, len(tcp.inbox)), now)
            room = min(self._send - self.sent, _AHEAD - tcp.unacknowledged)
            if room > 0 and (length := self._sending.allowance(now, self.sent, room)):
                tcp.write(self._out.read(self.sent, length), now)
                self.sent += length
            if self.sent == self._send and not self._closed:
                self._closed = True
                tcp.close(now)
            if tcp.done and self.received + len(tcp.inbox) != self._receive:
                raise Violation("stream", f"{self._receive} bytes were to come, {self.received} came")
        self._watch(now)

    @property
    def _arrived(self) -> int:
        """Of what we sent."""
        return self.sent - self.tcp.unacknowledged

    @property
    def done(self) -> bool:
        if self._enough is not None and self._arrived >= self._enough[0] and self.received >= self._enough[1]:
            return True
        return self.tcp.done and not self.tcp.inbox

    def stop(self) -> None:
        if self._enough is None:
            self._enough = (min(self._arrived + _MORE, self._send), min(self.received + _MORE, self._receive))

    def _due(self, now: float) -> float | None:
        paced = (self._paced[0] and self.sent < self._send and self.tcp.unacknowledged < _AHEAD,
                 self._paced[1] and bool(self.tcp.inbox))
        return now + 0.001 if any(paced) else None

    def _owed(self) -> bool:
        return not self.done and not self.tcp.inbox

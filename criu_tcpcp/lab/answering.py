"""The passed end's half of the load: its state is a few numbers, so an application can hand it over and continue.

- `Responder` answers fixed-size requests: request n is bytes n*size.. of stream `seed`, its answer bytes of stream
  `seed + 1`. It checks every byte of the requests, so a byte lost or repeated by a pass is found where it happens.
- `StreamEnd` sends one stream (`seed + 1`) and receives another (`seed`) at the same time, as far as the socket takes
  and gives, without blocking.

Both hand over with `state()` and continue with `from_state`; neither owns the socket.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Self

from .streams import Checker, Fault, Stream

_CHUNK = 1 << 18


class Responder:
    """Answers requests of `size` bytes with answers of `answer_size` bytes. `received` counts request bytes, `sent`
    answer bytes that the socket took: a partial request, and a partly sent answer, are part of the state."""

    _STATE = struct.Struct("!QIIQQ")

    def __init__(self, seed: int, size: int, answer_size: int | None = None, *, received: int = 0,
                 sent: int = 0) -> None:
        if size <= 0:
            raise ValueError(f"a request of {size} bytes")
        self.seed, self.size = seed, size
        self.answer_size = size if answer_size is None else answer_size
        self.sent = sent
        self._checker = Checker(seed, offset=received)
        self._answers = Stream(seed + 1)

    @property
    def received(self) -> int:
        return self._checker.offset

    @property
    def requests(self) -> int:
        """Requests received completely."""
        return self.received // self.size

    @property
    def wrong(self) -> bool:
        return self._checker.wrong

    @property
    def fault(self) -> Fault | None:
        return self._checker.finish() if self.wrong else None

    def feed(self, data: bytes) -> bytes:
        """Take what the socket gave; return the bytes owed now, as `owed` does."""
        self._checker.feed(data)
        return self.owed()

    def owed(self) -> bytes:
        """Answer bytes that were not sent yet."""
        return self._answers.read(self.sent, self.requests * self.answer_size - self.sent)

    def took(self, count: int) -> None:
        """The socket took `count` of the owed bytes."""
        self.sent += count

    def state(self) -> bytes:
        return self._STATE.pack(self.seed, self.size, self.answer_size, self.received, self.sent)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        seed, size, answer_size, received, sent = cls._STATE.unpack(state)
        return cls(seed, size, answer_size, received=received, sent=sent)


def answer(sock: socket.socket, responder: Responder, *, stop: Callable[[], bool] = lambda: False) -> bool:
    """Answer until the peer's EOF (True) or until `stop()` says so, asked before each read (False). The socket may be
    blocking; nothing is read ahead, so after False the state is complete."""
    while True:
        while owed := responder.owed():
            responder.took(sock.send(owed))
        if stop():
            return False
        data = sock.recv(_CHUNK)
        if not data:
            return True
        responder.feed(data)


class Pace:
    """How many bytes may move now, at `rate` bytes a second (None: any number): a millisecond's worth at a time, since
    a stream of tiny segments has tail-loss probes by itself."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._began: tuple[float, int] | None = None

    def allowance(self, now: float, done: int, left: int) -> int:
        """Of the `left` bytes behind the first `done`, at `now` (time.monotonic); the pace starts with the first
        question."""
        if self.rate is None:
            return min(left, _CHUNK)
        if self._began is None:
            self._began = (now, done)
        since, base = self._began
        quantum = max(int(self.rate / 1000), 1)
        due = base + int(self.rate * (now - since)) + quantum     # a millisecond ahead
        if due - done > self.rate / 10:        # held up for 100 ms: start the pace anew, without a burst
            self._began, due = (now, done), done + quantum
        if due - done < min(left, quantum):
            return 0
        return min(left, due - done, _CHUNK)


class StreamEnd:
    """One end of two streams: sends `send` bytes of stream `seed_out`, receives `receive` bytes of stream `seed_in`.

    `step` never blocks. `rate` (bytes a second) paces what is sent, since an unthrottled stream loses packets by
    itself on a short path; `read_rate` what is read, so that queues fill. After everything was sent, the write side is
    shut down if `close` is true."""

    _STATE = struct.Struct("!QQQQQQ??")

    def __init__(self, seed_out: int, send: int, seed_in: int, receive: int, *, rate: float | None = None,
                 read_rate: float | None = None, close: bool = True, sent: int = 0, received: int = 0,
                 closed: bool = False, sha256: bool = False) -> None:
        self.seed_out, self.send, self.seed_in, self.receive = seed_out, send, seed_in, receive
        self.close, self.sent, self.closed = close, sent, closed
        self.eof = False
        self._checker = Checker(seed_in, offset=received, sha256=sha256)
        self._out = Stream(seed_out)
        self._sending, self._reading = Pace(rate), Pace(read_rate)

    @property
    def received(self) -> int:
        return self._checker.offset

    @property
    def done(self) -> bool:
        """Everything sent, and received (or the other end is finished)."""
        return self.sent >= self.send and (self.eof or self.received >= self.receive)

    @property
    def wrong(self) -> bool:
        return self._checker.wrong

    @property
    def sha256_received(self) -> str | None:
        return self._checker.sha256

    def fault(self) -> Fault | None:
        """The first fault, once no more bytes are expected."""
        return self._checker.finish(self.receive)

    def _may_send(self, now: float) -> int:
        return self._sending.allowance(now, self.sent, self.send - self.sent)

    def _may_read(self, now: float) -> int:
        """At least one byte more than is to come, since behind the last one comes the end."""
        return self._reading.allowance(now, self.received, max(self.receive - self.received, 1))

    def step(self, sock: socket.socket) -> bool:
        """Receive what is there and send what may be sent, without blocking. True if something moved; OSError and
        the like are the caller's."""
        moved = False
        now = time.monotonic()
        if not self.eof and (length := self._may_read(now)):
            try:
                data = sock.recv(length, socket.MSG_DONTWAIT)
                self.eof = not data
                self._checker.feed(data)
                moved = True
            except BlockingIOError:
                pass
        if length := self._may_send(now):
            try:
                self.sent += sock.send(self._out.read(self.sent, length), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                moved = True
            except BlockingIOError:
                pass
        if self.sent >= self.send and self.close and not self.closed:
            sock.shutdown(socket.SHUT_WR)
            self.closed = True
        return moved

    def wait(self, sock: socket.socket, timeout_s: float | None = None, also: int | None = None) -> None:
        """Block until `step` can do something, or until descriptor `also` is readable, or `timeout_s` passed."""
        now = time.monotonic()
        full = not self.eof and not self._may_read(now)
        paced = self.sent < self.send and not self._may_send(now)
        readers: list[socket.socket | int] = [] if self.eof or full else [sock]
        if also is not None:
            readers.append(also)
        limits = [limit for limit in (timeout_s, 0.001 if paced or full else None) if limit is not None]
        select.select(readers, [sock] if self.sent < self.send and not paced else [], [], min(limits, default=None))

    def state(self) -> bytes:
        return self._STATE.pack(self.seed_out, self.send, self.seed_in, self.receive, self.sent, self.received,
                                self.close, self.closed)

    @classmethod
    def from_state(cls, state: bytes, *, rate: float | None = None, read_rate: float | None = None) -> Self:
        seed_out, send, seed_in, receive, sent, received, close, closed = cls._STATE.unpack(state)
        return cls(seed_out, send, seed_in, receive, rate=rate, read_rate=read_rate, close=close, sent=sent,
                   received=received, closed=closed)

"""Messages over a byte stream that is a pair of descriptors: the link's socket at the origin, stdin and stdout in
`serve`."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import deque

from ..core.errors import LinkError, LinkTimeout
from ..core.messages import Decoder, Message, encode

_CHUNK = 1 << 18


class Wire:
    """`reading` and `writing` stay the caller's to close."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading = reading
        self.writing = writing
        os.set_blocking(writing, False)  # else one write of a chunk waits, whatever the time-out
        self._decoder = Decoder()
        self._waiting: deque[Message] = deque()
        self.silent = True  # nothing has arrived yet

    def send(self, message: Message, timeout_s: float = 30) -> None:
        """LinkError where the stream is closed, or takes nothing for `timeout_s`."""
        self.send_raw(encode(message), timeout_s)

    def send_raw(self, data: bytes, timeout_s: float = 30) -> None:
        """What is encoded already; as `send`."""
        view = memoryview(data)
        poller = select.poll()
        poller.register(self.writing, select.POLLOUT)
        deadline = time.monotonic() + timeout_s
        try:
            while view:
                if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
                    raise LinkError("the other side takes no data")
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self.writing, view[:_CHUNK]):]
        except OSError as error:
            raise LinkError(f"the link broke: {error.strerror or error}") from error

    def write_some(self, data: bytes | bytearray) -> int:
        """How many of these bytes the stream takes at once. LinkError where it is closed."""
        try:
            return os.write(self.writing, data[:_CHUNK])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkError(f"the link broke: {error.strerror or error}") from error

    def pending(self) -> bool:
        """A message can be had without reading."""
        return bool(self._waiting)

    def read_available(self) -> None:
        """Take in what has arrived (blocks while nothing has). LinkError at the end of the stream, ProtocolError for
        what is not a message."""
        try:
            data = os.read(self.reading, _CHUNK)
        except BlockingIOError:  # one descriptor for both directions
            return
        except OSError as error:
            raise LinkError(f"the link broke: {error.strerror or error}") from error
        if not data:
            raise LinkError("the other side closed the link")
        self.silent = False
        self._waiting.extend(self._decoder.feed(data))

    def wait(self, timeout_s: float) -> None:
        """Until something has arrived, or the stream has ended; as long as that at most."""
        if not self._waiting:
            poller = select.poll()
            poller.register(self.reading, select.POLLIN)
            poller.poll(timeout_s * 1000)

    def take(self) -> Message | None:
        return self._waiting.popleft() if self._waiting else None

    def receive(self, timeout_s: float | None) -> Message:
        """The next message. LinkTimeout where none came in time (None: no limit)."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(self.reading, select.POLLIN)
        while not self._waiting:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            if not poller.poll(None if left is None else left * 1000):
                raise LinkTimeout("the other side does not answer")
            self.read_available()
        return self._waiting.popleft()

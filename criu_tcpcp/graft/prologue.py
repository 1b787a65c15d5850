"""What a peer that is not there says to a server: its bytes, as the server's window allows, and an acknowledgement for
all that the server answers, which nobody reads.

    text               said, acknowledged                        said, not acknowledged      not said yet
    0                              acked                         said          acked + window     length

Nothing is lost between the two (packets are injected here, and caught here), but a socket may have had no room for
them: what is not acknowledged for `_AGAIN_S` is said again. RFC 9293 3.10.7.4 is all that the server's end relies on.
"""

from __future__ import annotations

import time

from ..core import tcp
from ..core.endpoint import Flow
from ..kernel.interception import Interception
from ..kernel.rawpacket import ACK, FIN, PSH, RST, Injector, Segment

_CHUNK = 1024  # bytes; what every path carries
_AGAIN_S = 0.2
_REST_S, _LONG_S = 0.05, 1.0


class Silence:
    """How long a server says nothing, and whether that is for good: no sign tells of an answer that it is still waiting
    for itself, which the peer would read. So one that was slow before is given twice that time, up to a second; and
    one that has said nothing at all, a second. Times are the caller's."""

    def __init__(self, now: float) -> None:
        self._since, self._slowest, self._has_spoken = now, 0.0, False

    def broken(self, now: float, *, by_word: bool) -> None:
        """`by_word`: the server said something; else it has only taken what it was told."""
        if by_word:
            self._slowest, self._has_spoken = max(self._slowest, now - self._since), True
        self._since = now

    def is_over(self, now: float) -> bool:
        """The conversation is."""
        wanted = min(max(_REST_S, 2 * self._slowest), _LONG_S) if self._has_spoken else _LONG_S
        return now - self._since > wanted


class Speaker:
    """`ours`: the sequence number of the first byte of `text`; `theirs`: of the server's first. It owns `caught`."""

    def __init__(self, flow: Flow, injector: Injector, caught: Interception, ours: int, theirs: int) -> None:
        self._flow, self._injector, self._caught = flow, injector, caught
        self._ours, self._theirs = ours, theirs
        self._text, self._said, self._acked, self._window = b"", 0, 0, _CHUNK
        self._progress_at = time.monotonic()
        self.has_closed = False

    def say(self, text: bytes) -> None:
        self._text = text
        self._progress_at = time.monotonic()

    @property
    def has_said_all(self) -> bool:
        return self._acked == len(self._text)

    def go_on(self) -> int:
        """Take what the server sent since, and say more. Returns how many bytes it answered."""
        before = self._theirs
        for segment in self._caught.taken():
            self._hear(segment)
        answered = tcp.distance(self._theirs, before)
        if answered:
            self._injector.deliver_bare(self._flow, ACK, tcp.add(self._ours, self._said), self._theirs)
        if self._acked < self._said and time.monotonic() - self._progress_at > _AGAIN_S:
            self._said, self._progress_at = self._acked, time.monotonic()
        while not self.has_closed and self._said < min(len(self._text), self._acked + self._window):
            end = min(len(self._text), self._said + _CHUNK, self._acked + self._window)
            self._injector.deliver_bare(self._flow, ACK | PSH, tcp.add(self._ours, self._said), self._theirs,
                                        self._text[self._said:end])
            self._said = end
        return answered

    def _hear(self, segment: Segment) -> None:
        if segment.flags & (RST | FIN):
            self.has_closed = True
        acked = tcp.distance(segment.acknowledgement, self._ours)
        if segment.flags & ACK and self._acked <= acked <= len(self._text):
            if acked > self._acked:
                self._acked, self._progress_at = acked, time.monotonic()
                self._said = max(self._said, acked)
            self._window = segment.window
        end = tcp.add(segment.sequence, segment.length)
        if tcp.distance(segment.sequence, self._theirs) <= 0 < tcp.distance(end, self._theirs):
            self._theirs = end

    @property
    def next_sequence(self) -> int:
        """Of the next byte: what a reset must have."""
        return tcp.add(self._ours, self._acked)

    def close(self) -> None:
        self._caught.close()

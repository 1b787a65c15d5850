"""The hold: the peer's packets wait in the kernel while nobody owns the connection, and go to whoever owns it then.

Made before the freeze, since a table, a queue and a grace period take milliseconds to make. All of it belongs to this
process: with it the kernel takes the rules away, and drops what still waits (the peer sends that again).

`release` keeps their order: what waits is let go first, then the connection leaves the set, and what slipped into the
queue behind the look-up follows after a grace period. A redirect that is in place by then takes them with it, since
released packets go on behind the hold's chain (kernel/rules.py).
"""

from __future__ import annotations

import time

from .core.endpoint import Flow
from .kernel.grace import GracePeriod
from .kernel.nfqueue import ACCEPT, DROP, PacketQueue
from .kernel.rules import Hold


class Holding:
    """Of one connection. `queues`: packets wait; otherwise this kernel can only drop them."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._queue = PacketQueue()
        try:
            self._hold = Hold(flow.ip_version, self._queue.number)
        except BaseException:
            self._queue.close()
            raise
        self._grace = GracePeriod()
        self._started: float | None = None
        self._ended: float | None = None
        self.queues = self._hold.queues

    def fileno(self) -> int:
        """Readable while `collect` has something to do."""
        return self._queue.fileno()

    def collect(self) -> None:
        """Take note of what came: the queue's messages must not fill their buffer."""
        self._queue.collect()

    def begin(self) -> None:
        """When this returns, no packet of the peer's is on its way to the socket any more."""
        self._started = time.monotonic()
        self._hold.add(self._flow)
        self._grace.wait()

    def silence(self) -> None:
        """Nothing leaves this host for the connection."""
        self._hold.silence(self._flow)

    def unsilence(self) -> None:
        self._hold.unsilence(self._flow)

    def release(self, onward: bool) -> None:
        """Let go of what waits, in its order, and of what comes; dropped if not `onward`. Done again, it does
        nothing."""
        verdict = ACCEPT if onward else DROP
        while self._queue.release(verdict):
            pass
        self._ended = time.monotonic()
        self._hold.remove(self._flow)
        self._queue.release(verdict)
        self._grace.wait()  # packets that were past the set's look-up are in the queue now
        self._queue.release(verdict)

    @property
    def began(self) -> float | None:
        """When the hold began, by time.monotonic."""
        return self._started

    @property
    def duration_ms(self) -> float | None:
        """How long packets were held, once they are released."""
        if self._started is None or self._ended is None:
            return None
        return (self._ended - self._started) * 1000

    @property
    def packets(self) -> int:
        """How many waited, and were released."""
        return self._queue.released

    def close(self) -> None:
        self._hold.close()
        self._queue.close()
        self._grace.close()

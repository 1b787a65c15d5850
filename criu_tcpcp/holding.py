"""The hold: the peer's packets wait in the kernel while nobody owns the connection, and go to whoever owns it then.

Made before the freeze, since a table, a queue and a grace period take milliseconds to make. All of it belongs to this
process: with it the kernel takes the rules away, and drops what still waits (the peer sends that again).

`release` keeps their order: what waits is let go first, and the connection leaves the set at an instant at which
nothing waits (kernel/rules.py, `gate`). A peer that sends without a pause may leave no such instant: after `PATIENCE_S`
the hold ends all the same, and what slipped into the queue meanwhile follows. A redirect that is in place by then takes
all of them with it, since released packets go on behind the hold's chain.
"""

from __future__ import annotations

import contextlib
import time

from .core.endpoint import Flow
from .kernel.grace import GracePeriod
from .kernel.nfqueue import ACCEPT, DROP, PacketQueue
from .kernel.rawpacket import Injector
from .kernel.rules import MARK, Hold, Silence

PATIENCE_S = 0.02
_READS = 4  # of the queue between two knocks: what was noted as arrived may reach the queue some microseconds later


def end_in_order(hold: Hold, queue: PacketQueue, injector: Injector, flow: Flow, verdict: int) -> None:
    """What waits gets the verdict, and what comes does not wait any more. A knock that finds that something arrived
    since the one before only says so: what arrived is let go before the next. Two at a time, since the second comes
    sooner than any question whether the hold has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for _ in range(2):
            injector.knock(flow)
            for _ in range(_READS):
                queue.release(verdict)
        if not hold.is_held(flow):
            return
    hold.remove(flow)
    queue.release(verdict)


class Holding:
    """Of one connection. `queues`: packets wait; otherwise this kernel can only drop them."""

    def __init__(self, flow: Flow, inside: tuple[Silence, Flow] | None = None) -> None:
        """`inside`: where the program is behind another namespace than this one, what silences it there; it is ours."""
        self._flow = flow
        self._inside = inside
        self._queue = PacketQueue()
        with contextlib.ExitStack() as undo:
            undo.callback(self._queue.close)
            self._injector = Injector(flow.ip_version, MARK)
            undo.callback(self._injector.close)
            self._hold = Hold(flow.ip_version, self._queue.number, flow.protocol)
            undo.pop_all()
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
        if self._inside is None:
            self._hold.silence(self._flow)
        else:
            self._inside[0].add(self._inside[1])

    def unsilence(self) -> None:
        if self._inside is None:
            self._hold.unsilence(self._flow)
        else:
            self._inside[0].remove(self._inside[1])

    def release(self, onward: bool) -> None:
        """Let go of what waits, in its order, and of what comes; dropped if not `onward`. Done again, it does
        nothing."""
        verdict = ACCEPT if onward else DROP
        end_in_order(self._hold, self._queue, self._injector, self._flow, verdict)
        self._ended = time.monotonic()
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
        self._injector.close()
        self._grace.close()
        if self._inside is not None:
            self._inside[0].close()

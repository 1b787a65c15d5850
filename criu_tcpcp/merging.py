"""Two ways that become one: the new owner's host gets the peer's packets directly while some are still on their way
over the old owner's, where they were held. TCP would take what comes directly for a loss of the rest, and the peer
would send it again.

So this host holds them too, from before it takes the connection until the last is here: what continues the stream goes
on at once, what is ahead of it waits for the rest (core/reorder.py), `MISSING_S` at most; and no word of that host's
about the pass means that it may still hold some, `LASTS_S` at most: a busy one lets go late. That is so where the local
address is the destination's own, as when a connection comes home; by the divert, packets come one way only. UDP has no
numbers: there the packets that came over the old owner's host are told by their hops, and what comes directly waits
until that host has said its last word.

A thread does it, since whoever sends the peer on may not wait for the journal. All of it belongs to this process: if it
dies, the kernel removes the rules and drops what waits, which the peer sends again.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time

from .core.endpoint import Flow
from .core.errors import KernelError
from .core.reorder import Order
from .holding import end_in_order
from .kernel.nfqueue import ACCEPT, PacketQueue
from .kernel.rawpacket import Injector
from .kernel.rules import MARK, Hold

#: Longer than a busy host takes to let go of what it held (10 ms and more, where all its processors are taken), and
#: much shorter than a peer waits for an acknowledgement (RTO, 200 ms at least): what is lost for good delays the rest
#: by this.
MISSING_S = 0.04
LASTS_S = 0.25


class Merging:
    """Of one connection. Made at staging: a table and a queue take milliseconds."""

    def __init__(self, flow: Flow, missing_s: float = MISSING_S, lasts_s: float = LASTS_S) -> None:
        self._flow = flow
        self._missing_s, self._lasts_s = missing_s, lasts_s
        self._thread: threading.Thread | None = None
        with contextlib.ExitStack() as parts:
            self._queue = PacketQueue()
            parts.callback(self._queue.close)
            self._injector = Injector(flow.ip_version, MARK)
            parts.callback(self._injector.close)
            self._hold = Hold(flow.ip_version, self._queue.number, flow.protocol)
            parts.callback(self._hold.close)
            self._ended = os.eventfd(0, os.EFD_CLOEXEC)
            parts.callback(os.close, self._ended)
            self._parts = parts.pop_all()

    def begin(self, order: Order) -> None:
        """From here on what comes is put in order. Does nothing where this kernel cannot queue: packets that are
        dropped would be worse than packets out of order."""
        if self._thread is not None or not self._hold.queues:
            return
        self._hold.add(self._flow)
        self._thread = threading.Thread(target=self._run, args=(order,), daemon=True)
        self._thread.start()

    @property
    def is_on(self) -> bool:
        """`close` is to come once the old owner has let go of everything."""
        return self._thread is not None

    @property
    def waiting(self) -> int:
        """How many packets wait for others."""
        return self._queue.waiting

    def _run(self, order: Order) -> None:
        # KernelError: the queue has overflowed, and what it lost is lost.
        with contextlib.suppress(KernelError):
            self._merge(order, time.monotonic() + self._lasts_s)
        end_in_order(self._hold, self._queue, self._injector, self._flow, ACCEPT)

    def _merge(self, order: Order, deadline: float) -> None:
        poller = select.poll()
        for number in (self._ended, self._queue.fileno()):
            poller.register(number, select.POLLIN)
        missing_s = self._lasts_s if order.needs_word else self._missing_s
        missing_since: float | None = None
        while True:
            until = deadline if missing_since is None else min(deadline, missing_since + missing_s)
            ready = [number for number, _events in poller.poll(max(0.0, until - time.monotonic()) * 1000)]
            for number, packet in self._queue.take():
                self._queue.let_go(order.came(number, packet))
            now = time.monotonic()
            ends = now >= deadline or (self._ended in ready and (order.needs_word or not order.waits))
            missing_since = (missing_since or now) if order.waits else None
            if ends or (missing_since is not None and now >= missing_since + missing_s):
                self._queue.let_go(order.give_up())
                missing_since = None
            if ends:
                return

    def close(self) -> None:
        """Packets go their own way again; returns when nothing waits any more."""
        if self._thread is not None:
            os.eventfd_write(self._ended, 1)
            self._thread.join()
        self._parts.close()

"""The destination, as the origin sees it: a link that may break and be made anew, and what is said over it."""

from __future__ import annotations

import math
import os
from dataclasses import replace

from ..core.errors import LinkError
from ..core.messages import Hello, Message, Settled
from ..greeting import TIMEOUT_S, greet
from ..kernel import netns
from ..transport.link import Link, open_link
from ..transport.target import LocalTarget, Target
from ..transport.wire import Wire


class Counterpart:
    """Reached from the network namespace in which this was made, wherever the origin process lives."""

    def __init__(self, target: Target | LocalTarget) -> None:
        self.target = target
        self.hello: Hello | None = None
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._link: Link | None = None
        self._wire: Wire | None = None

    def connect(self, within_s: float = math.inf) -> None:
        """Reach it and greet it. LinkError says why not."""
        target = self.target
        if isinstance(target, Target):
            target = replace(target, timeout_s=min(target.timeout_s, within_s))
        with netns.enter(self._home):
            self._link = open_link(target)
        self._wire = Wire(self._link.fileno(), self._link.fileno())
        self.hello = greet(self._link, self._wire, min(TIMEOUT_S, within_s))

    @property
    def wire(self) -> Wire:
        if self._wire is None:
            raise LinkError("there is no link to the destination")
        return self._wire

    @property
    def is_connected(self) -> bool:
        return self._wire is not None

    @property
    def address(self) -> str | None:
        """The one that SSH reached, if that was the destination's."""
        return self._link.peer_address if self._link is not None else None

    def tell_settled(self, pass_id: str, timeout_s: float) -> None:
        """It keeps its verdict until it hears this, and says that it did; the link may have broken."""
        try:
            self._settle(pass_id, timeout_s)
        except LinkError:
            self.disconnect()
            self.connect()
            self._settle(pass_id, timeout_s)

    def _settle(self, pass_id: str, timeout_s: float) -> None:
        self.wire.send(Settled(pass_id))
        if not isinstance(self.wire.receive(timeout_s), Settled):
            raise LinkError("the destination did not confirm that the pass is settled")

    def ask(self, message: Message, timeout_s: float) -> Message:
        """Its answer. LinkError where none comes."""
        self.wire.send(message)
        return self.wire.receive(timeout_s)

    @property
    def link(self) -> Link:
        if self._link is None:
            raise LinkError("there is no link to the destination")
        return self._link

    def disconnect(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = self._wire = None

    def close(self) -> None:
        self.disconnect()
        os.close(self._home)

"""Fault injection, the only hook for tests.

A point is a side and an action: "origin:fence", "destination:restore", and "resolve:end" or "recovery:activate" for
those that continue what others began; a few lie within an action ("origin:remove address"). Where CRIU_TCPCP_STOP_AT
names one, the process stops itself (SIGSTOP) just before it; the tests then kill whom they like and let it go on. Where
CRIU_TCPCP_FAIL_AT says "origin:fence=EIO", the action fails like a system call with that errno. Both take a list, with
commas; each point counts once for whoever made a `Faults`.
"""

from __future__ import annotations

import errno
import os
import signal

from .core.errors import KernelError


class Faults:
    """See the module."""

    def __init__(self) -> None:
        self._stops = {point for point in os.environ.get("CRIU_TCPCP_STOP_AT", "").split(",") if point}
        pairs = [one.partition("=") for one in os.environ.get("CRIU_TCPCP_FAIL_AT", "").split(",")]
        self._failures = {point: name for point, _, name in pairs if name}

    def stop(self, point: str) -> None:
        if point in self._stops:
            self._stops.remove(point)
            os.kill(os.getpid(), signal.SIGSTOP)

    def fail(self, point: str) -> None:
        if name := self._failures.pop(point, None):
            number = getattr(errno, name)
            raise KernelError(f"{point}, as a test wants it", number, os.strerror(number))

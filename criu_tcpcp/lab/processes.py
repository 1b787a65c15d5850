"""The processes of a lab: to find all of them, however they came about, and to end them.

A process belongs to the lab if it lives in one of its network namespaces, or if its environment names the lab's
directory: that finds also what went on to a namespace of its own (a container). A process that has exited has no
namespace any more, so a zombie whose parent is slow does not count.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from criu_tcpcp.core.errors import KernelError
from criu_tcpcp.kernel import netns


def inside(namespaces: Sequence[os.PathLike[str]]) -> Iterator[int]:
    """Pids of the processes in any of these network namespaces, but for the calling process."""
    identities = set()
    for path in namespaces:
        with contextlib.suppress(KernelError):      # deleted already, or never made
            identities.add(netns.identity(path))
    for pid in _others():
        with contextlib.suppress(KernelError):      # it has exited
            if netns.identity(f"/proc/{pid}/ns/net") in identities:
                yield pid


def of_directory(directory: Path) -> Iterator[int]:
    """Pids of the processes that were started with a run directory under `directory`."""
    mark = b"\0CRIU_TCPCP_RUN_DIR=" + os.fsencode(directory) + b"/"
    for pid in _others():
        with contextlib.suppress(OSError):
            if mark in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                yield pid


def end_all(namespaces: Sequence[os.PathLike[str]], directory: Path, *, timeout_s: float = 10) -> None:
    """SIGKILL everything that belongs to the lab, until there is nothing. It may fork meanwhile: hence the loop."""
    deadline = time.monotonic() + timeout_s
    while members := {*inside(namespaces), *of_directory(directory)}:
        if time.monotonic() > deadline:
            raise RuntimeError(f"processes of the lab do not die: {sorted(members)}")
        _kill_and_wait(members, deadline)


def _kill_and_wait(pids: set[int], deadline: float) -> None:
    with contextlib.ExitStack() as stack:
        waiting = select.poll()
        left = set()
        for pid in pids:
            # By descriptor: a pid could be another process's by the time the signal is sent.
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                waiting.register(descriptor, select.POLLIN)
                left.add(descriptor)
        while left and time.monotonic() < deadline:
            for descriptor, _ in waiting.poll(max(0, deadline - time.monotonic()) * 1000):
                waiting.unregister(descriptor)
                left.discard(descriptor)


def _others() -> Iterator[int]:
    own = str(os.getpid())
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and name != own)

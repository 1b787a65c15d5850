"""What the kernel tells of a process's io_urings (io_uring/fdinfo.c, io_uring_show_fdinfo).

In /proc/PID/fdinfo of a ring stand the files that are registered with it, by number and name, and the kind of each
request that waits for its file to become ready; not of which file. What a worker of the kernel executes stands nowhere:
the worker itself is a thread of the process.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass

from . import process

_LINK = "anon_inode:[io_uring]"
_OP_ACCEPT = 13  # linux/io_uring.h, IORING_OP_ACCEPT
_FILE = re.compile(r" *\d+: socket:\[(\d+)\]")
_REQUEST = re.compile(r" *op=(\d+),")
_TRIES = 50  # the ring is locked while the program submits: nothing is told then


@dataclass(frozen=True)
class Ring:
    """`files`: inodes of the sockets that are registered; `operations`: of the requests that wait for a file;
    `has_thread`: of the kernel, which takes requests without a system call (IORING_SETUP_SQPOLL). `has_busy_worker`: a
    thread of the kernel executes a request of the process's. `is_known`: the kernel told of it."""

    files: frozenset[int]
    operations: tuple[int, ...]
    has_thread: bool
    has_busy_worker: bool
    is_known: bool

    @property
    def accepts(self) -> bool:
        return _OP_ACCEPT in self.operations

    @property
    def is_pending(self) -> bool:
        """A request that may be of a connection."""
        return not self.is_known or self.has_busy_worker or any(one != _OP_ACCEPT for one in self.operations)


def of(pid: int, links: dict[int, str] | None = None) -> tuple[Ring, ...]:
    """The rings of a process; `links`: its descriptors, where they are known."""
    return read(pid, descriptors(process.descriptors(pid) if links is None else links))


def descriptors(links: dict[int, str]) -> tuple[int, ...]:
    """Those of a process that are rings; `links`: what each of its descriptors is."""
    return tuple(number for number, link in links.items() if link == _LINK)


def read(pid: int, numbers: tuple[int, ...]) -> tuple[Ring, ...]:
    """The rings behind these descriptors."""
    busy = bool(numbers) and _has_busy_worker(pid)
    return tuple(_read(pid, number, busy) for number in numbers)


def _read(pid: int, number: int, busy: bool) -> Ring:
    lines: list[str] = []
    for _ in range(_TRIES):
        lines = process.descriptor_lines(pid, number)
        if any(line.startswith("UserFiles:") for line in lines):
            break
    else:
        return Ring(frozenset(), (), False, busy, not lines)  # no line at all: it is closed
    files = (_FILE.fullmatch(line) for line in lines)
    requests = (_REQUEST.match(line) for line in lines)
    return Ring(frozenset(int(one[1]) for one in files if one), tuple(int(one[1]) for one in requests if one),
                any(line.startswith("SqThread:") and line.split()[1] != "-1" for line in lines), busy, True)


def _has_busy_worker(pid: int) -> bool:
    """One that has nothing to do sleeps in io_wq_worker. Where the kernel does not say in what, it is believed idle."""
    with contextlib.suppress(OSError):
        for tid in os.listdir(f"/proc/{pid}/task"):
            if process.thread_name(pid, tid).startswith("iou-wrk-") and process.sleeps_in(pid, tid) not in (
                    "", "0", "io_wq_worker"):
                return True
    return False

"""A descriptor of a stopped program is made to stand for another of its files, with its place in every epoll instance.

What is registered with epoll is the file, under the descriptor's number (fs/eventpoll.c, struct epoll_filefd): a
descriptor that is only replaced (dup3) leaves the old registration where anybody else has the old file, and the new
file has none. So each is taken away, and made again behind the dup3, with the same events and data: EPOLL_CTL_MOD could
not do it for EPOLLEXCLUSIVE.

Each step is one system call of the program's (kernel/injection.py). All can be done again, from the same record, by
whoever continues after a tool that was killed in between: what is done already answers ENOENT or EEXIST.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..core.errors import JournalError, KernelError, Refused
from ..kernel import injection, process
from ..kernel.syscalls import failing
from ..kernel.tracee import Tracee

_EPOLL = "anon_inode:[eventpoll]"
_WATCH = re.compile(r"tfd: *(\d+) events: *([0-9a-f]+) data: *([0-9a-f]+) .*ino:([0-9a-f]+)")  # proc_pid_fdinfo(5)


@dataclass(frozen=True)
class Place:
    """What a descriptor was: `link` as /proc/PID/fd shows it, `flags` as of open(2), `watches` (epoll descriptor,
    events, data) for each instance of the program's that has it."""

    descriptor: int
    link: str
    flags: int
    watches: tuple[tuple[int, int, int], ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Place:
        """Raises JournalError for what `to_json` did not write."""
        try:
            watches = tuple((int(epoll), int(events), int(data)) for epoll, events, data in fields["watches"])
            return cls(int(fields["descriptor"]), str(fields["link"]), int(fields["flags"]), watches)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise JournalError(f"the journal does not say what a descriptor was: {error}") from None


def place_of(pid: int, descriptor: int) -> Place:
    """Refused where the process has no such descriptor."""
    links = process.descriptors(pid)
    if descriptor not in links:
        raise Refused(f"process {pid} ({process.name(pid)}) has no descriptor {descriptor}")
    with failing(f"stat /proc/{pid}/fd/{descriptor}"):
        inode = os.stat(f"/proc/{pid}/fd/{descriptor}").st_ino
    watches = []
    for epoll in (number for number, link in links.items() if link == _EPOLL):
        for tfd, events, data, ino in _WATCH.findall("\n".join(process.descriptor_lines(pid, epoll))):
            if int(tfd) == descriptor and int(ino, 16) == inode:
                watches.append((epoll, int(events, 16), int(data, 16)))
    flags = [int(line.split()[1], 8) for line in process.descriptor_lines(pid, descriptor) if line.startswith("flags:")]
    return Place(descriptor, links[descriptor], sum(flags), tuple(watches))


def put(tracee: Tracee, place: Place, number: int, sock: socket.socket) -> None:
    """What the program has as `number`, and this process as `sock`, takes the place; `number` is free again. Refused
    where another file has it since. KernelError: half done."""
    pid = tracee.pid
    links = process.descriptors(pid)
    mine, there = links.get(number), links.get(place.descriptor)
    if mine != there:
        if there != place.link:
            raise Refused(f"descriptor {place.descriptor} of process {pid} is another file since")
        place = _with_new_watches(place, place_of(pid, place.descriptor))
        for epoll, _events, _data in place.watches:
            _done(injection.watch_no_more(tracee, epoll, place.descriptor), "epoll_ctl(EPOLL_CTL_DEL)", errno.ENOENT)
        _done(injection.duplicate(tracee, number, place.descriptor, place.flags & os.O_CLOEXEC), "dup3")
    for epoll, events, data in place.watches:
        _done(injection.watch(tracee, epoll, place.descriptor, events, data), "epoll_ctl(EPOLL_CTL_ADD)", errno.EEXIST)
    if number != place.descriptor:
        injection.close(tracee, number)
    with failing("fcntl(F_SETFL)"):
        flags = fcntl.fcntl(sock, fcntl.F_GETFL) & ~os.O_NONBLOCK
        fcntl.fcntl(sock, fcntl.F_SETFL, flags | place.flags & os.O_NONBLOCK)


def _with_new_watches(place: Place, now: Place) -> Place:
    """A program that ran in between may have changed them; those that are missing may have been taken away by us."""
    changed = {epoll: (epoll, events, data) for epoll, events, data in (*place.watches, *now.watches)}
    return replace(place, watches=tuple(changed.values()))


def _done(result: int, call: str, *as_good: int) -> None:
    if result < 0 and -result not in as_good:
        raise KernelError(f"{call} of the program", -result, os.strerror(-result))

"""In which network namespace one side of a pass works: that of the program that has the connection, or is to have it.

At the origin that is the process that `--pid` names; at the destination, the one that `--into accept:PID` or `pid:PID`
names, so that a server in a container is passed to like one beside it. Any other way in is looked for where `serve` was
started. The journal keeps the namespace by its identity (kernel/netns.py): whoever settles the pass finds it as long as
it lives, whatever has become of the program, and once it has gone, so have the rules in it. Its identity may then be
another's (the kernel gives the lowest free number, fs/nsfs.c and fs/proc/generic.c): whoever looks there finds nothing
of the connection, and takes nothing away. What holds packets, and sends them on, may be in the host's (outside.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from . import graft
from .core.errors import KernelError, Refused
from .journal import Journal
from .kernel import netns, process

FIELD = "network"


@contextlib.contextmanager
def of_target(into: str, *, guarded: bool) -> Iterator[bool]:
    """The calling thread is where the program that `--into` names is, if it names one; True where that is another
    namespace than before. Refused where this process may not go there, or, `guarded`, nobody may be let in: a policy
    speaks of the addresses and ports of one host."""
    pid = graft.process_in(into)
    if pid is None:
        yield False
        return
    process.identity(pid)
    who = f"process {pid} ({process.name(pid)})"
    try:
        is_other = netns.identity(process.network_namespace(pid)) != netns.own()
    except KernelError as error:
        raise Refused(f"{who} may not be looked at: {error.message}", hint="root is needed there") from None
    if is_other and guarded:
        raise Refused(f"{who} is in another network namespace, and this door leads to that of its host only",
                      hint="a door of its own: `nsenter --net=FILE criu-tcpcp serve --policy ...` as its command")
    with contextlib.ExitStack() as stack:
        if is_other:
            try:
                stack.enter_context(netns.enter(process.network_namespace(pid)))
            except KernelError as error:
                raise Refused(f"{who} is in another network namespace, which cannot be entered: {error.message}",
                              hint="root is needed there") from None
        yield is_other


@contextlib.contextmanager
def of_side(journal: Journal) -> Iterator[None]:
    """The calling thread is where this side of the pass has its rules; where that has gone, it stays where it is."""
    with contextlib.ExitStack() as stack:
        found = find(journal)
        if found is not None:
            stack.callback(os.close, found)
            if netns.identity(f"/proc/self/fd/{found}") != netns.own():  # to enter even that takes CAP_SYS_ADMIN
                stack.enter_context(netns.enter(found))
        yield


def find(journal: Journal) -> int | None:
    """A descriptor of that namespace, the caller's to close; None where it has gone, or nothing was done in it."""
    first = journal.field("intent") or journal.field("staged")
    if first is None or FIELD not in first:
        return None
    device, inode = first[FIELD]
    return netns.find((device, inode))

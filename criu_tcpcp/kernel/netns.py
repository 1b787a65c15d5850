"""Network namespaces: to be in one for a while, and to tell two of them apart.

A network namespace belongs to a *thread* (setns(2)): `enter` moves the calling thread and no other, so that a program
can hold sockets of several hosts at once. What the thread makes meanwhile stays where it was made: a socket keeps its
namespace for life, and a child process inherits that of the thread that forked it. /proc/sys/net shows the namespace
of the thread that looks, /proc/net that of the process's first thread (use /proc/thread-self/net).

A namespace has no name of its own. Its identity is the device and inode number of its nsfs file, whatever path leads
there: /run/netns/NAME (a bind mount) and /proc/PID/ns/net of a process inside are the same file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from criu_tcpcp.core.errors import KernelError

from . import process

_OWN = "/proc/thread-self/ns/net"  # /proc/self/ns/net would be that of the first thread
_CLONE_NEWNET = 0x40000000
# Python has os.setns only from 3.12 on.
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def enter(namespace: str | os.PathLike[str] | int) -> Iterator[None]:
    """The calling thread is in `namespace` (a path, or an open descriptor, which stays open) inside the `with`."""
    back = _open(_OWN)
    try:
        if isinstance(namespace, int):
            _setns(namespace)
        else:
            there = _open(namespace)
            try:
                _setns(there)
            finally:
                os.close(there)
        try:
            yield
        finally:
            _setns(back)
    finally:
        os.close(back)


@contextmanager
def private() -> Iterator[None]:
    """The calling thread is in a new, empty network namespace inside the `with`; it lasts as long as something of
    it."""
    with enter(_OWN):
        if _libc.unshare(_CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise KernelError("unshare(CLONE_NEWNET)", number, os.strerror(number))
        yield


@contextmanager
def private_or_own() -> Iterator[bool]:
    """As `private`, and True, where that is allowed (CAP_SYS_ADMIN); else the thread stays where it is, and False."""
    with ExitStack() as stack:
        try:
            stack.enter_context(private())
            is_private = True
        except KernelError as error:
            if error.errno != errno.EPERM:
                raise
            is_private = False
        yield is_private


def open_own() -> int:
    """A descriptor of the calling thread's namespace, to come back to it by `enter`."""
    return _open(_OWN)


def own() -> tuple[int, int]:
    """The identity of the calling thread's namespace."""
    return identity(_OWN)


def find(wanted: tuple[int, int]) -> int | None:
    """A descriptor of the namespace with this identity, by whatever keeps it alive and may be looked at: the calling
    thread, another process, a mount of its file (ip-netns(8), container engines). None where nothing does."""
    for path in _namespaces():
        try:
            if identity(path) != wanted:
                continue
            descriptor = _open(path)
        except KernelError:  # it has gone, or is not for us
            continue
        status = os.fstat(descriptor)
        if (status.st_dev, status.st_ino) == wanted:
            return descriptor
        os.close(descriptor)
    return None


def _namespaces() -> Iterator[str]:
    yield _OWN
    yield from map(process.network_namespace, process.processes())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        _id, _parent, _device, root, place, *_ = line.split()  # proc_pid_mountinfo(5)
        if root.startswith("net:["):
            yield re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place)


def identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(device, inode) of a namespace file: equal exactly if it is the same namespace, as long as that lives."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise _kernel_error("stat", path, error) from None
    return status.st_dev, status.st_ino


def _open(path: str | os.PathLike[str]) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _kernel_error("open", path, error) from None


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise KernelError("setns", number, os.strerror(number))


def _kernel_error(call: str, path: str | os.PathLike[str], error: OSError) -> KernelError:
    return KernelError(call, error.errno or 0, f"{os.fspath(path)}: {error.strerror}")

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from criu_tcpcp.core.errors import KernelError

_CLONE_NEWNET = 0x40000000
# Python has os.setns only from 3.12 on.
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def enter(namespace: str | os.PathLike[str] | int) -> Iterator[None]:
    """The calling thread is in `namespace` (a path, or an open descriptor, which stays open) inside the `with`."""
    # The thread's own file: /proc/self/ns/net would be that of the first thread.
    back = _open("/proc/thread-self/ns/net")
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
    with enter("/proc/thread-self/ns/net"):
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

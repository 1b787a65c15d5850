"""System calls that Python 3.11 does not offer, and the seam at which an OSError becomes a `KernelError`.

`failing(call)` is that seam: every function of this package wraps what it asks of the kernel in it, so that the floors
above see one class of error, which names the call in the kernel's own words. A wrapper here does one system call.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import socket
from collections.abc import Iterator
from pathlib import Path

from ..core.endpoint import Flow
from ..core.errors import KernelError

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

# The same numbers on every architecture since the tables were unified (asm-generic/unistd.h): x86_64 and aarch64.
_SYS_PIDFD_OPEN = 434
_SYS_PIDFD_GETFD = 438
_SYS_MEMBARRIER = {"x86_64": 324, "aarch64": 283}.get(platform.machine(), -1)
_MEMBARRIER_CMD_GLOBAL = 1  # linux/membarrier.h

_AHEAD = -15  # nice value
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FIRST_OTHER = 3  # behind stdin, stdout and stderr
_DESCRIPTORS = 1 << 20  # fs.nr_open's default: above any limit that was ever set
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15


@contextlib.contextmanager
def failing(call: str) -> Iterator[None]:
    """Turn an OSError of the block into a KernelError that names `call`."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        raise KernelError(call, number, error.strerror or str(error)) from error


def check(call: str, result: int) -> int:
    """The result of a libc call, or the KernelError that its errno stands for (-1)."""
    if result == -1:
        number = ctypes.get_errno()
        raise KernelError(call, number, os.strerror(number))
    return result


def pidfd_open(pid: int) -> int:
    """A descriptor that names the process, whatever becomes of the number (pidfd_open(2), Linux 5.3)."""
    return check("pidfd_open", libc.syscall(_SYS_PIDFD_OPEN, pid, 0))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A copy of the process's descriptor (pidfd_getfd(2), Linux 5.6; needs PTRACE_MODE_ATTACH_REALCREDS).

    The open file description is shared: file status flags that are changed here change there.
    """
    return check("pidfd_getfd", libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))


def borrow_socket(pidfd: int, fd: int) -> socket.socket:
    """The process's descriptor `fd` as a socket of ours; Python must not touch the shared O_NONBLOCK of it. KernelError
    ENOTSOCK where it has become something else."""
    descriptor = pidfd_getfd(pidfd, fd)
    try:
        with failing("getsockopt"):
            return socket.socket(fileno=descriptor)
    except KernelError:
        os.close(descriptor)
        raise


def borrow_known(pidfd: int, fd: int, flow: Flow) -> socket.socket:
    """As `borrow_socket`, for one that is known to be a socket of this flow: a third of the time, and nothing is asked;
    KernelError where the descriptor is not there any more."""
    return socket.socket(flow.socket_family, flow.protocol.socket_type, int(flow.protocol),
                         fileno=pidfd_getfd(pidfd, fd))


def membarrier_global() -> None:
    """Wait for a grace period: 5 to 13 ms on two cores (membarrier(2))."""
    check("membarrier", libc.syscall(_SYS_MEMBARRIER, _MEMBARRIER_CMD_GLOBAL, 0, 0))


def name_process(name: str) -> None:
    """What ps and /proc/PID/comm show: at most 15 bytes."""
    check("prctl(PR_SET_NAME)", libc.prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0))


def go_first(pid: int | None = None) -> None:
    """Let all threads of this process (or another), and what they start, run before ordinary ones (sched(7), SCHED_RR):
    on a busy host a freeze of milliseconds would otherwise last as long as others please. Where that is not allowed, it
    stays as it is."""
    with contextlib.suppress(OSError):  # it has ended
        _schedule(os.SCHED_RR | (os.SCHED_RESET_ON_FORK if pid is not None else 0), 1, pid)


def go_along(pid: int | None = None) -> None:
    """Take `go_first` back."""
    with contextlib.suppress(OSError):
        _schedule(os.SCHED_OTHER, 0, pid)


def go_ahead(pid: int | None = None) -> None:
    """Let all threads of this process (or another) run sooner than ordinary ones, for as long as they like: packets
    that travel through them should not wait long for others, nor keep others from running at all (setpriority(2), and
    of the whole session where sessions are scheduled as groups, sched(7))."""
    go_along(pid)
    directory = Path("/proc", str(pid or "self"))
    with contextlib.suppress(OSError):  # it has ended
        for thread in os.listdir(directory / "task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), _AHEAD)
    with contextlib.suppress(OSError):
        (directory / "autogroup").write_text(f"{_AHEAD}\n")


def _schedule(policy: int, priority: int, pid: int | None = None) -> None:
    for thread in os.listdir(f"/proc/{pid or 'self'}/task"):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))


def forbid_core_dumps() -> None:
    """Payload of a connection is in this process's memory: it must not reach a core file, nor another user's ptrace."""
    check("prctl(PR_SET_DUMPABLE)", libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))


def keep_only(descriptors: set[int]) -> None:
    """Of all that a fork inherits; what it reads and says leads nowhere: it may outlive whoever is there."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(_FIRST_OTHER):
        os.dup2(null, number)
    first = _FIRST_OTHER
    for descriptor in sorted(descriptors):
        os.closerange(first, descriptor)
        first = descriptor + 1
    os.closerange(first, _DESCRIPTORS)


def allow_tracing() -> None:
    """Take `forbid_core_dumps` back, in a child that has no payload."""
    check("prctl(PR_SET_DUMPABLE)", libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0))


@functools.cache
def boot_id() -> str:
    """What changes with every boot of this kernel (random(4)): a journal record of another boot is history."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def rename_no_replace(old: str, new: str) -> None:
    """renameat2(RENAME_NOREPLACE): KernelError EEXIST where `new` is there (Linux 3.15, most file systems)."""
    at_cwd, no_replace = -100, 1
    check("renameat2", libc.renameat2(at_cwd, os.fsencode(old), at_cwd, os.fsencode(new), no_replace))

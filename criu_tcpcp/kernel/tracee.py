"""Stop a process that knows nothing of it, see whether it is quiet, and let it run again (ptrace(2)).

Every thread is seized (no signal is sent, nothing is visible to its parent), interrupted, and waited for; a thread that
is born meanwhile is attached by the kernel (PTRACE_O_TRACECLONE). A seized process runs on by itself when its tracer
dies, so before the offer there is nothing to clean up. After it that would be a second owner: `pin` queues a SIGSTOP
for one thread while it is seized, which takes effect at the instant the tracer is gone; `resume` takes it back unseen.

ptrace belongs to a thread: all methods of a `Tracee` are for the thread that made it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import time
from dataclasses import dataclass

from ..core.errors import KernelError, Refused
from . import process
from .syscalls import check, libc

libc.ptrace.restype = ctypes.c_long
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]

# linux/ptrace.h
_CONT, _DETACH, _SYSCALL, _GETREGSET, _SETREGSET, _SEIZE, _INTERRUPT = 7, 17, 24, 0x4204, 0x4205, 0x4206, 0x4207
_O_TRACESYSGOOD, _O_TRACECLONE = 0x1, 0x8
_EVENT_CLONE, _EVENT_STOP = 3, 128
_NT_PRSTATUS, _NT_ARM_SYSTEM_CALL = 1, 0x404
_WALL = 0x40000000

_SPINS, _PAUSE_S = 4, 0.00003


@dataclass(frozen=True)
class Machine:
    """Where a machine keeps what we look at, in 64-bit words of NT_PRSTATUS. `syscall`: None where the number has a
    register set of its own (aarch64). `epoll_waits`: the calls that end in EINTR when a tracer stops them."""

    words: int
    result: int
    syscall: int | None
    epoll_waits: frozenset[int]


MACHINES = {
    "x86_64": Machine(words=27, result=10, syscall=15, epoll_waits=frozenset({232, 281, 441})),
    "aarch64": Machine(words=34, result=0, syscall=None, epoll_waits=frozenset({22, 441})),  # untested
}

# What a wait that was interrupted holds in its result register (linux/errno.h, include/linux/errno.h): the kernel
# starts the call again, or ends it with EINTR, when the thread goes on.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
_INTERRUPTED = frozenset({-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND, -ERESTART_RESTARTBLOCK, -errno.EINTR})


def ptrace(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    check("ptrace", libc.ptrace(request, tid, address, data))


class Tracee:
    """The threads of one process while they are stopped."""

    def __init__(self, pid: int) -> None:
        machine = MACHINES.get(platform.machine())
        if machine is None:
            raise Refused(f"the registers of a {platform.machine()} process are not known to this tool")
        self.pid = pid
        self._machine = machine
        self._threads: dict[int, bool] = {}  # tid -> is stopped
        self._pinned = False

    def stop(self, timeout_s: float) -> None:
        """Stop every thread. On any error, and past `timeout_s`, all of them run again; then KernelError or Refused. A
        thread in an uninterruptible wait would still stop at the end of that wait: it is let go with this process."""
        deadline = time.monotonic() + timeout_s
        try:
            while self._seize_new_threads() or not all(self._threads.values()):
                self._wait_for_stops(deadline)
        except BaseException:
            self.resume()
            raise
        if not self._threads:
            raise Refused(f"process {self.pid} has exited")

    def _seize_new_threads(self) -> bool:
        """Attach the threads that are not ours yet; False where there are none."""
        try:
            tids = [int(name) for name in os.listdir(f"/proc/{self.pid}/task")]
        except (FileNotFoundError, ProcessLookupError):
            raise Refused(f"process {self.pid} has exited") from None
        before = len(self._threads)
        for tid in tids:
            if tid not in self._threads and self._seize(tid):
                self._threads[tid] = False
        return len(self._threads) > before

    def _seize(self, tid: int) -> bool:
        """False where the thread has ended (a main thread stays in the list as long as there are others)."""
        try:
            ptrace(_SEIZE, tid, 0, _O_TRACECLONE | _O_TRACESYSGOOD)
            with contextlib.suppress(KernelError):  # it ended since, which it reports
                ptrace(_INTERRUPT, tid)
        except KernelError as error:
            if error.errno == errno.ESRCH or process.has_ended(self.pid, tid):
                return False
            if error.errno != errno.EPERM:
                raise
            # The kernel attached this one itself when it was cloned, or someone else traces it.
            if process.tracer_of(tid) != os.getpid():
                if process.has_ended(self.pid, tid):
                    return False
                raise Refused(_why_not_traceable(self.pid, tid)) from None
        return True

    def _wait_for_stops(self, deadline: float) -> None:
        """Take the reports of threads until all known ones are stopped."""
        spins = 0
        while not all(self._threads.values()):
            progress = False
            for tid in [tid for tid, stopped in self._threads.items() if not stopped]:
                progress = self._take_report(tid) or progress
                # The end of a main thread is reported only when all others have ended.
                if spins > _SPINS and tid in self._threads and process.has_ended(self.pid, tid):
                    del self._threads[tid]
                    progress = True
            if progress:
                continue
            if time.monotonic() > deadline:
                slow = {tid: process.run_state(tid) for tid, stopped in self._threads.items() if not stopped}
                raise Refused(f"process {self.pid} could not be stopped in time: "
                              + ", ".join(f"thread {tid} is in state {state}" for tid, state in slow.items()),
                              hint="a thread in state D is in an uninterruptible wait" if "D" in slow.values() else "")
            spins += 1
            if spins > _SPINS:  # most stop within some 20 us, if they are let: this process may have precedence
                time.sleep(_PAUSE_S)

    def _take_report(self, tid: int) -> bool:
        try:
            reported, status = os.waitpid(tid, os.WNOHANG | _WALL)
        except ChildProcessError:
            self._threads.pop(tid, None)
            return True
        if not reported:
            return False
        if not os.WIFSTOPPED(status):
            self._threads.pop(tid, None)
            return True
        event, stop_signal = status >> 16, os.WSTOPSIG(status)
        if event == _EVENT_STOP:
            self._threads[tid] = True
            return True
        try:
            # It goes on behind a clone, or with a signal that was on its way to the program, and stops right after: any
            # other stop has taken the pending one away (kernel/signal.c, ptrace_stop), so it is asked for again.
            ptrace(_INTERRUPT, tid)
            ptrace(_CONT, tid, 0, 0 if event == _EVENT_CLONE else stop_signal)
        except KernelError as error:
            if error.errno != errno.ESRCH:  # killed since: its end is reported
                raise
        return True

    def busy_thread(self) -> str | None:
        """None when every thread waits in the kernel; else which one does not, and why: bytes of the connection may be
        in the program's hands. Stopped threads only."""
        for tid in self._threads:
            number, result = self._syscall(tid)
            if number < 0:
                return f"thread {tid} is running its own code"
            if result not in _INTERRUPTED:
                return f"thread {tid} is returning from system call {number}"
        return None

    def _registers(self, tid: int, kind: int, size: int) -> bytearray:
        data = bytearray(size)
        buffer = (ctypes.c_char * size).from_buffer(data)
        vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), size)
        ptrace(_GETREGSET, tid, kind, ctypes.addressof(vector))
        del buffer
        if vector[1] != size:
            raise Refused(f"process {self.pid} is not a {platform.machine()} process (32-bit?)")
        return data

    def _syscall(self, tid: int) -> tuple[int, int]:
        """(number of the system call that the thread is in, or -1; its result register)."""
        machine = self._machine
        words = struct.unpack(f"={machine.words}q", self._registers(tid, _NT_PRSTATUS, machine.words * 8))
        if machine.syscall is not None:
            return words[machine.syscall], words[machine.result]
        number = struct.unpack("=i", self._registers(tid, _NT_ARM_SYSTEM_CALL, 4))[0]
        return number, words[machine.result]

    def _restart_epoll_wait(self, tid: int) -> None:
        """epoll_wait ends with EINTR when a tracer stops it (fs/eventpoll.c ep_poll), unlike poll and select. Asking
        the kernel for a restart instead hides the stop; a signal that is pending still ends it with EINTR. The call's
        time-out starts again in full."""
        machine = self._machine
        number, result = self._syscall(tid)
        if result != -errno.EINTR or number not in machine.epoll_waits:
            return
        registers = self.registers(tid)
        struct.pack_into("=q", registers, machine.result * 8, -ERESTARTNOHAND)
        self.set_registers(tid, registers)

    # -- for what makes one stopped thread do something (injection.py) -------------------------------------------------

    @property
    def is_pinned(self) -> bool:
        return self._pinned

    def threads(self) -> list[int]:
        """The stopped ones, the main thread first."""
        tids = [tid for tid, stopped in self._threads.items() if stopped]
        return sorted(tids, key=lambda tid: (tid != self.pid, tid))

    def registers(self, tid: int) -> bytearray:
        """NT_PRSTATUS of a stopped thread (asm/user_64.h, struct user_regs_struct, on x86_64)."""
        return self._registers(tid, _NT_PRSTATUS, self._machine.words * 8)

    def set_registers(self, tid: int, registers: bytearray) -> None:
        buffer = (ctypes.c_char * len(registers)).from_buffer(registers)
        vector = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(registers))
        ptrace(_SETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(vector))

    def run_to_syscall(self, tid: int, deadline: float) -> int | None:
        """Let one stopped thread run to its next entry into a system call, or to the end of one; None there, else the
        signal that came first, which was not delivered. It is stopped in both cases. Refused where it does not stop in
        time, or ends: then `resume` deals with it."""
        deliver = 0
        while True:
            self._threads[tid] = False
            ptrace(_SYSCALL, tid, 0, deliver)
            status = self._status(tid, deadline)
            event, stop_signal = status >> 16, os.WSTOPSIG(status)
            if event == 0 and stop_signal != signal.SIGSTOP:
                return None if stop_signal == signal.SIGTRAP | 0x80 else stop_signal
            deliver = stop_signal if event == 0 else 0  # the thread runs on all the same, and stops when it is let go

    def stop_again(self, tid: int, deadline: float) -> None:
        """From the stop in which `run_to_syscall` left the thread, to one before its next instruction, behind which the
        kernel looks for a system call to restart and for signals to deliver."""
        deliver = 0
        while True:
            self._threads[tid] = False
            ptrace(_INTERRUPT, tid)
            ptrace(_CONT, tid, 0, deliver)
            status = self._status(tid, deadline)
            if status >> 16 == _EVENT_STOP:
                return
            deliver = 0 if status >> 16 else os.WSTOPSIG(status)

    def _status(self, tid: int, deadline: float) -> int:
        spins = 0
        while True:
            try:
                reported, status = os.waitpid(tid, os.WNOHANG | _WALL)
            except ChildProcessError:
                reported, status = tid, 0
            if reported and not os.WIFSTOPPED(status):
                self._threads.pop(tid, None)
                raise Refused(f"process {self.pid} has exited")
            if reported:
                self._threads[tid] = True
                return status
            if time.monotonic() > deadline:
                raise Refused(f"thread {tid} of process {self.pid} does not end a system call in time")
            spins += 1
            if spins > _SPINS:
                time.sleep(_PAUSE_S)

    def pin(self) -> None:
        """From here on the process stays stopped when its tracer dies (state T): rollback by the kernel alone ends."""
        if not self._pinned:
            check("tgkill", libc.tgkill(self.pid, self._first_thread(), signal.SIGSTOP))
            self._pinned = True

    def _first_thread(self) -> int:
        return self.pid if self.pid in self._threads else next(iter(self._threads))

    def resume(self) -> None:
        """Let every thread run as if nothing had been; a `pin` is taken back. Threads that ended are no error."""
        if self._pinned and self._threads:
            self._unpin(self._first_thread())
        for tid, stopped in list(self._threads.items()):
            if stopped or self._stop_to_detach(tid):
                self._detach(tid)
        self._threads.clear()
        self._pinned = False

    def _stop_to_detach(self, tid: int) -> bool:
        """A thread can be detached only while it is stopped; False when it ended instead."""
        deadline = time.monotonic() + 1
        while self._threads.get(tid) is False and time.monotonic() < deadline:
            if not self._take_report(tid):
                time.sleep(_PAUSE_S)
        return self._threads.get(tid, False)

    def _detach(self, tid: int) -> None:
        try:
            self._restart_epoll_wait(tid)
            ptrace(_DETACH, tid)
        except KernelError as error:
            if error.errno != errno.ESRCH:
                raise
            self._collect(tid)

    @staticmethod
    def _collect(tid: int) -> None:
        """A thread that was killed while it was stopped stays a zombie, and so does its process, until its tracer
        waits."""
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            try:
                if os.waitpid(tid, os.WNOHANG | _WALL)[0]:
                    return
            except ChildProcessError:
                return
            time.sleep(_PAUSE_S)

    def _unpin(self, tid: int) -> None:
        """Run the pinned thread up to the delivery of its SIGSTOP and detach it there, the signal suppressed. Signals
        that come before it are delivered; the thread does not reach its own code in between."""
        try:
            self._restart_epoll_wait(tid)
            ptrace(_CONT, tid)
            deadline, spins = time.monotonic() + 1, 0
            while time.monotonic() < deadline:
                reported, status = os.waitpid(tid, os.WNOHANG | _WALL)
                if not reported:
                    spins += 1
                    if spins > _SPINS:  # this process may have precedence over what it waits for
                        time.sleep(_PAUSE_S)
                    continue
                if not os.WIFSTOPPED(status):
                    break
                stop_signal = os.WSTOPSIG(status)
                if stop_signal == signal.SIGSTOP and status >> 16 == 0:
                    ptrace(_DETACH, tid, 0, 0)
                    break
                ptrace(_CONT, tid, 0, 0 if status >> 16 else stop_signal)
        except (KernelError, ChildProcessError) as error:
            if isinstance(error, KernelError) and error.errno != errno.ESRCH:
                raise
        self._threads.pop(tid, None)


def _why_not_traceable(pid: int, tid: int) -> str:
    tracer = process.tracer_of(tid)
    if tracer:
        return f"process {pid} is traced by process {tracer} already"
    return f"process {pid} may not be traced (another user's, or a Yama or container policy)"

"""System calls that a stopped program makes for this tool, in one of its own threads, as if nothing had been.

A thread that is in a system call, or at the end of one, is sent to a *stub*: a few instructions in the padding behind
the vdso's image, which nothing else uses. It makes its calls, one after the other, puts back the registers that it
used, and jumps to where the thread was, so that an interrupted call begins again as the kernel would have begun it.

The tool lets it go as far as it wants, call by call, and then puts everything back itself, exactly: the signal mask,
the registers with the call to be restarted (the kernel does that when the thread runs again), the stub's bytes. When
the tool is killed meanwhile, the kernel lets the thread run, from wherever it is, and the stub does the rest. At no
instant is there anything that only the tool could put right:

    write the stub        bytes that nobody runs
    registers: to stub    from here on, left alone, the thread comes back by itself (one ptrace call)
    mask: hold signals    the stub's last call is the one that puts the mask back
    the wanted calls      what follows them in the stub takes back what they did (`Calls.undo`)
    mask, registers       as they were: a signal that came meanwhile meets the interrupted call, as ever
    wipe the stub         or not: what a killed tool leaves is some bytes in that padding, which the next use wipes

Nothing is called or returned from, and no memory but the padding is written: neither the stack nor the shadow stack,
the floating-point state or a restart that is pending for nanosleep, poll or futex (struct restart_block) is touched. A
thread that runs its own code is no good: it may be in a restartable sequence (rseq(2)), which must not be left unseen.

x86_64 only. On arm64 the kernel rewinds an interrupted call before a tracer sees it (arch/arm64/kernel/signal.c,
do_signal) and there is no register to spare for the jump: that wants another stub, and a machine to try it on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import signal
import struct
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..core.endpoint import Protocol
from ..core.errors import Refused
from . import process
from .syscalls import failing
from .tracee import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    MACHINES,
    Tracee,
    ptrace,
)

_POKEDATA, _GETSIGMASK, _SETSIGMASK = 5, 0x420A, 0x420B  # linux/ptrace.h
_MASK_BYTES = 8
# asm/unistd_64.h
_RT_SIGPROCMASK, _SOCKET, _CLOSE, _RESTART_SYSCALL, _DUP3, _EPOLL_CTL = 14, 41, 3, 219, 292, 233
_CTL_ADD, _CTL_DEL = 1, 2  # linux/eventpoll.h
_SIG_SETMASK = 2
# 64-bit words of struct user_regs_struct (asm/user_64.h)
_R11, _R10, _RAX, _RCX, _RDX, _RSI, _RDI, _ORIG_RAX, _RIP, _CS = 6, 7, 10, 11, 12, 13, 14, 15, 16, 17
_WORDS = 27
_64_BIT_CODE = 0x33  # the code segment (asm/segment.h, __USER_CS)
_SYSCALL_BYTES = 2
_AGAIN = frozenset({-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND})

#: Left to the program while the stub runs: what its own doing raises. Blocked, such a signal would kill it.
_SYNCHRONOUS = (signal.SIGILL, signal.SIGTRAP, signal.SIGBUS, signal.SIGFPE, signal.SIGSEGV, signal.SIGSYS)
_HELD = ~sum(1 << (number - 1) for number in _SYNCHRONOUS) & (1 << 64) - 1

_MARK = b"tcpcpstb"  # the last word of a slot that is in use
_SLOT, _WORD = 192, 8
_TIME_FOR_A_CALL_S = 1.0
_PAUSE_S = 0.001
RESULT = -1  # as a call's first argument: what the call before gave
DATA = -2  # as an argument: the address of `Calls.data`


class NoThread(Refused):
    """None of the threads is in a system call at this instant."""


@dataclass(frozen=True)
class Calls:
    """System calls, each its number and up to four arguments; those in `undo` are made only where the tool dies, or
    does not want what the others did."""

    wanted: tuple[tuple[int, ...], ...]
    undo: tuple[tuple[int, ...], ...] = ()
    data: bytes = b""


def check(pid: int) -> None:
    """Refused, with the reason, where this program cannot be made to make a system call."""
    if platform.machine() != "x86_64":
        raise Refused(f"a system call in another program is known for x86_64 only, not for {platform.machine()}")
    why_not = _why_not(pid)
    if why_not:
        raise Refused(f"process {pid} ({process.name(pid)}) {why_not}",
                      hint="--into accept:PID, or pid:PID:FD with a TCP socket that it has")
    _Padding.of(pid)


def _why_not(tid: int) -> str:
    """What keeps this thread from making other system calls than its own; '' for nothing."""
    for line in process.status_lines(tid):
        name, _, value = line.partition(":")
        if name == "Seccomp" and value.strip() != "0":
            return "has a seccomp filter, which may kill it for a system call that is not its own"
        if name == "x86_Thread_features" and "shstk" in value.split():
            return "has a shadow stack, and this was never tried with one"
    return ""


@contextlib.contextmanager
def new_socket(tracee: Tracee, family: int, protocol: Protocol = Protocol.TCP) -> Iterator[int]:
    """A socket that the stopped program makes: its descriptor, the lowest that is free, close-on-exec. It stays if
    the block ends well; else, and when this process dies in the block, the program closes it. NoThread: try later."""
    kind = int(protocol.socket_type) | os.O_CLOEXEC  # SOCK_CLOEXEC
    calls = Calls(((_SOCKET, family, kind, int(protocol)),), undo=((_CLOSE, RESULT),))
    with _injected(tracee, calls) as (result,):
        if result == -errno.EMFILE:
            raise Refused(f"process {tracee.pid} has no descriptor left (RLIMIT_NOFILE)")
        if result < 0:
            raise Refused(f"process {tracee.pid} cannot make a socket: {os.strerror(-result)}")
        yield result


def close(tracee: Tracee, descriptor: int) -> None:
    """The stopped program closes a descriptor of its own. NoThread: try later."""
    with _injected(tracee, Calls(((_CLOSE, descriptor),))):
        pass


def duplicate(tracee: Tracee, old: int, new: int, flags: int) -> int:
    """dup3 of the stopped program; the kernel's answer, an error negative."""
    return _answer(tracee, Calls(((_DUP3, old, new, flags),)))


def watch(tracee: Tracee, epoll: int, descriptor: int, events: int, data: int) -> int:
    """epoll_ctl(EPOLL_CTL_ADD) of the stopped program; the kernel's answer, an error negative."""
    event = struct.pack("=IQ", events, data)  # linux/eventpoll.h: packed on x86_64
    return _answer(tracee, Calls(((_EPOLL_CTL, epoll, _CTL_ADD, descriptor, DATA),), data=event))


def watch_no_more(tracee: Tracee, epoll: int, descriptor: int) -> int:
    """epoll_ctl(EPOLL_CTL_DEL) of the stopped program; the kernel's answer, an error negative."""
    return _answer(tracee, Calls(((_EPOLL_CTL, epoll, _CTL_DEL, descriptor, 0),)))


def _answer(tracee: Tracee, calls: Calls) -> int:
    with _injected(tracee, calls) as (result,):
        return result


def stop(pid: int, timeout_s: float) -> Tracee:
    """The program stands still, with a thread that can be sent to a stub. Refused where it cannot be stopped in time;
    NoThread where it has none in time."""
    deadline, padding = time.monotonic() + timeout_s, _Padding.of(pid)
    while True:
        tracee = Tracee(pid)
        tracee.stop(timeout_s)
        try:
            _suitable(tracee)
            padding.check_left(tracee)
            return tracee
        except NoThread:
            tracee.resume()
            if time.monotonic() > deadline:
                raise NoThread(f"no thread of process {pid} ({process.name(pid)}) was in a system call within "
                               f"{timeout_s:g} s", hint="a program that only computes cannot be given a descriptor") \
                    from None
        except BaseException:
            tracee.resume()
            raise
        time.sleep(_PAUSE_S)


@contextlib.contextmanager
def _injected(tracee: Tracee, calls: Calls) -> Iterator[list[int]]:
    """The wanted calls are made: their results. What the block raises, `calls.undo` answers."""
    tid, registers = _suitable(tracee)
    words = list(struct.unpack(f"={_WORDS}q", registers))
    mask = _mask_of(tid)
    padding = _Padding.of(tracee.pid)
    address = padding.place()
    _write(tid, address, _stub(calls, words, mask, address))
    words[_RIP], words[_ORIG_RAX] = address, -1
    tracee.set_registers(tid, bytearray(struct.pack(f"={_WORDS}q", *words)))
    try:
        _set_mask(tid, _HELD)
        stops = _Stops(tracee, tid)
        try:
            results = [stops.call() for _ in calls.wanted]
            try:
                stops.end()
                yield results
            except BaseException:
                for _ in calls.undo:
                    stops.call()
                raise
        finally:
            stops.end()
    finally:
        if tid in tracee.threads():  # else it does not stop, and finds back by itself
            _set_mask(tid, mask)
            tracee.set_registers(tid, registers)
            _wipe(tid, address)


class _Stops:
    """A thread on its way through the stub, from call to call."""

    def __init__(self, tracee: Tracee, tid: int) -> None:
        self._tracee, self._tid = tracee, tid
        self._deadline = time.monotonic() + _TIME_FOR_A_CALL_S
        self._is_at_rest = True

    def call(self) -> int:
        """Make the next call; its result, as the kernel gives it."""
        self._is_at_rest = False
        for _ in ("its begin", "its end"):
            raised = self._tracee.run_to_syscall(self._tid, self._deadline)
            if raised is not None:
                raise Refused(f"process {self._tracee.pid} may not make system calls outside of its own code "
                              f"({signal.Signals(raised).name})")
        return _words(self._tracee, self._tid)[_RAX]

    def end(self) -> None:
        """The thread stands where the kernel looks at its registers before it runs on."""
        if not self._is_at_rest:
            self._tracee.stop_again(self._tid, self._deadline)
            self._is_at_rest = True


def _words(tracee: Tracee, tid: int) -> tuple[int, ...]:
    return struct.unpack(f"={_WORDS}q", tracee.registers(tid))


def _suitable(tracee: Tracee) -> tuple[int, bytearray]:
    """A thread in a system call, or at the end of one, and its registers."""
    if tracee.is_pinned:
        raise NoThread(f"process {tracee.pid} is to stay stopped")
    for tid in tracee.threads():
        registers = tracee.registers(tid)
        words = struct.unpack(f"={_WORDS}q", registers)
        if words[_ORIG_RAX] >= 0 and words[_CS] == _64_BIT_CODE and not _why_not(tid):
            return tid, registers
    raise NoThread(f"no thread of process {tracee.pid} is in a system call")


# -- signals -----------------------------------------------------------------------------------------------------------

def _mask_of(tid: int) -> int:
    """The thread's own mask, even where it waits in sigsuspend or ppoll under another (kernel/ptrace.c)."""
    mask = ctypes.c_uint64()
    ptrace(_GETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(mask))
    return mask.value


def _set_mask(tid: int, value: int) -> None:
    """What such a wait sets for itself is taken back; it sets it again as it is restarted."""
    mask = ctypes.c_uint64(value)
    ptrace(_SETSIGMASK, tid, _MASK_BYTES, ctypes.addressof(mask))


# -- the stub ----------------------------------------------------------------------------------------------------------

def _stub(calls: Calls, words: Sequence[int], mask: int, address: int) -> bytes:
    """Its way back is what the kernel would do with the interrupted call (arch/x86/kernel/signal.c,
    arch_do_signal_or_restart); epoll_wait, which ends with EINTR, is begun again (tracee.py)."""
    number, result, target = words[_ORIG_RAX], words[_RAX], words[_RIP]
    if result in _AGAIN or (result == -errno.EINTR and number in MACHINES["x86_64"].epoll_waits):
        result, target = number, target - _SYSCALL_BYTES
    elif result == -ERESTART_RESTARTBLOCK:
        result, target = _RESTART_SYSCALL, target - _SYSCALL_BYTES
    data = calls.data + struct.pack("=Q", mask) + _MARK
    begin = address + _SLOT - len(data)
    mask_back = (_RT_SIGPROCMASK, _SIG_SETMASK, begin + len(calls.data), 0, _MASK_BYTES)
    code = b"".join(_call(call, begin) for call in (*calls.wanted, *calls.undo, mask_back))
    code += b"".join(_load(register, words[register]) for register in (_RDI, _RSI, _RDX, _R10, _RCX, _R11))
    code += _load(_RAX, result) + b"\xff\x25\0\0\0\0" + struct.pack("=q", target)  # jmp *0(%rip)
    if len(code) + len(data) > _SLOT:
        raise ValueError("a stub of that many system calls fits into no slot")
    return code.ljust(_SLOT - len(data), b"\xcc") + data


_CODES = {_RAX: 0, _RCX: 1, _RDX: 2, _RSI: 6, _RDI: 7, _R10: 10, _R11: 11}


def _load(register: int, value: int) -> bytes:
    """mov $value, register."""
    code = _CODES[register]
    if 0 <= value < 1 << 32:
        return (b"\x41" if code > 7 else b"") + bytes([0xB8 | code & 7]) + struct.pack("=I", value)
    return bytes([0x49 if code > 7 else 0x48, 0xB8 | code & 7]) + struct.pack("=Q", value & (1 << 64) - 1)


def _call(call: tuple[int, ...], data: int) -> bytes:
    number, *arguments = call
    code = b""
    for register, value in zip((_RDI, _RSI, _RDX, _R10), arguments, strict=False):
        code += b"\x89\xc7" if value == RESULT else _load(register, data if value == DATA else value)  # mov %eax, %edi
    return code + _load(_RAX, number) + b"\x0f\x05"


# -- where it lies -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Padding:
    """Executable memory that no code and no data are in: what is left of the vdso's last page behind its image. A
    tracer may write there; the program then has a page of its own of it (mm/gup.c, FOLL_FORCE)."""

    pid: int
    start: int
    content: bytes

    @classmethod
    def of(cls, pid: int) -> _Padding:
        """Refused where the program has no vdso, or a full one."""
        begin, end = process.mapping(pid, "[vdso]")
        image = _read(pid, begin, end - begin)
        used = _image_size(image)
        start = -(-used // 64) * 64
        if not begin or start + _SLOT > len(image):
            raise Refused(f"process {pid} ({process.name(pid)}) has no room for code (its vdso is missing or full)")
        return cls(pid, begin + start, image[start:])

    def check_left(self, tracee: Tracee) -> None:
        """NoThread where a thread is still on its way through the stub of a tool that was killed: it would come back to
        it, and find another there."""
        if any(self.start <= _words(tracee, tid)[_RIP] < self.start + len(self.content) for tid in tracee.threads()):
            raise NoThread(f"a thread of process {self.pid} is on its way back")

    def place(self) -> int:
        """The address of a slot that is free. What a killed tool has left is taken when no other is: a signal handler
        may still return into it."""
        slots = {self.start + offset: self.content[offset:offset + _SLOT]
                 for offset in range(0, len(self.content) - _SLOT + 1, _SLOT)}
        for address, content in slots.items():
            if not any(content):
                return address
        for address, content in slots.items():
            if content.endswith(_MARK):
                return address
        raise Refused(f"process {self.pid} ({process.name(self.pid)}) has no room for code")


def _image_size(image: bytes) -> int:
    """Of an ELF file (elf(5)): its sections' table stands last, or its last segment. Refused where it is none."""
    try:
        if image[:5] != b"\x7fELF\x02":
            raise ValueError
        segments, sections = struct.unpack_from("=QQ", image, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("=HHHH", image, 54)
        ends = [sections + section_size * section_count]
        for number in range(segment_count):
            at = segments + number * segment_size
            ends.append(sum(struct.unpack_from("=Q16xQ", image, at + 8)))  # p_offset, p_filesz
        return int(max(ends))
    except (ValueError, struct.error):
        raise Refused("the program's vdso is none that this tool knows") from None


def _read(pid: int, address: int, size: int) -> bytes:
    with failing(f"read /proc/{pid}/mem"), open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(size)


def _write(tid: int, address: int, stub: bytes) -> None:
    """The mark first, so that nothing lies there without one. By ptrace, which may write where /proc/PID/mem may be
    forbidden to (proc_mem.force_override, Linux 6.12)."""
    for offset in reversed(range(0, _SLOT, _WORD)):
        ptrace(_POKEDATA, tid, address + offset, int.from_bytes(stub[offset:offset + _WORD], sys.byteorder))


def _wipe(tid: int, address: int) -> None:
    """The mark last."""
    for offset in range(0, _SLOT, _WORD):
        ptrace(_POKEDATA, tid, address + offset, 0)

"""What /proc tells of processes and their descriptors (proc(5)). All of it is input: a process can lie.

Names of processes and of files stand in the midst of it, and a name may hold anything but a zero byte. The kernel
escapes the line feed in them, where it does, and nothing else that Python takes for the end of a line: so lines are
split here at that byte alone.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.errors import KernelError, Refused
from .syscalls import borrow_socket, failing, pidfd_open

_SO_ACCEPTCONN = 30


@dataclass(frozen=True)
class Identity:
    """A process, told apart from a later one with the same number by its start time (clock ticks since boot)."""

    pid: int
    start_time: int

    def to_json(self) -> list[int]:
        return [self.pid, self.start_time]


def identity(pid: int) -> Identity:
    """Refused where there is no such process, or it is a zombie or a kernel thread."""
    fields = _stat(pid)
    if fields is None:
        raise Refused(f"there is no process {pid}")
    if fields[0] in ("Z", "X"):
        raise Refused(f"process {pid} has exited")
    return Identity(pid, int(fields[19]))


def is_alive(process: Identity) -> bool:
    fields = _stat(process.pid)
    return fields is not None and fields[0] not in ("Z", "X") and int(fields[19]) == process.start_time


def run_state(pid: int) -> str:
    """The letter that ps shows: R, S, D, T (stopped), t (traced); '' where there is no such process."""
    fields = _stat(pid)
    return fields[0] if fields else ""


def parent(pid: int) -> int:
    """The number of the process that it is a child of; 0 where there is no such process."""
    fields = _stat(pid)
    return int(fields[1]) if fields else 0


def waits(pid: int) -> bool:
    """Every thread of the process waits in the kernel, or is stopped, at this instant."""
    try:
        tids = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return True
    return not any((fields := _stat(f"{pid}/task/{tid}")) and fields[0] == "R" for tid in tids)


def status_lines(tid: int) -> list[str]:
    """/proc/TID/status of a process or of one of its threads; nothing of what has gone."""
    return _lines(f"/proc/{tid}/status")


def _lines(path: str) -> list[str]:
    """None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace").removesuffix("\n").split("\n")
    except OSError:
        return []


def tracer_of(tid: int) -> int:
    """The process that traces this thread, or the first one of this process; 0 where none does."""
    return next((int(line.split()[1]) for line in status_lines(tid) if line.startswith("TracerPid:")), 0)


def users(pid: int) -> frozenset[int]:
    """All that the process acts as, or could again: its real, effective, saved and file system user (proc(5), Uid);
    none of what has gone."""
    found = next((line.split()[1:] for line in status_lines(pid) if line.startswith("Uid:")), [])
    return frozenset(map(int, found))


def executable(pid: int) -> str:
    """The file that the process executes, by its path here; '' where that may not be seen, or the path leads to another
    file by now: in a container, or after an upgrade."""
    link = f"/proc/{pid}/exe"
    try:
        path = os.readlink(link)
        return path if os.path.samestat(os.stat(link), os.stat(path)) else ""
    except OSError:
        return ""


def descriptor_lines(pid: int, descriptor: int) -> list[str]:
    """/proc/PID/fdinfo/DESCRIPTOR; nothing of one that is closed."""
    return _lines(f"/proc/{pid}/fdinfo/{descriptor}")


def mapping(pid: int, name: str) -> tuple[int, int]:
    """Begin and end of the first mapping of this name in the process's memory; (0, 0) where it has none."""
    with failing(f"read /proc/{pid}/maps"), open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            words = line.rstrip(b"\n").split(maxsplit=5)
            if len(words) == 6 and words[5] == name.encode():
                begin, _, end = words[0].partition(b"-")
                return int(begin, 16), int(end, 16)
    return 0, 0


def is_32_bit(pid: int) -> bool:
    """Its program is a 32-bit one (elf(5), EI_CLASS)."""
    try:
        with open(f"/proc/{pid}/exe", "rb") as program:
            return program.read(5) == b"\x7fELF\x01"
    except OSError:
        return False


def thread_name(pid: int, tid: str) -> str:
    """As the thread is called; '' of one that has ended."""
    return next(iter(_lines(f"/proc/{pid}/task/{tid}/comm")), "")


def sleeps_in(pid: int, tid: str) -> str:
    """The kernel's function in which the thread waits; '0' while it runs, or where that is not told."""
    return next(iter(_lines(f"/proc/{pid}/task/{tid}/wchan")), "")


def listens_on_unix(pid: int) -> bool:
    """The process accepts from a unix socket. The sockets themselves are asked: in /proc/net/unix stand names that any
    user may choose, line feeds and all."""
    pidfd = pidfd_open(pid)
    try:
        for number, link in descriptors(pid).items():
            if socket_inode(link) is not None:
                with contextlib.suppress(KernelError), borrow_socket(pidfd, number) as sock:
                    if sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, _SO_ACCEPTCONN):
                        return True
    finally:
        os.close(pidfd)
    return False


def has_ended(pid: int, tid: int) -> bool:
    """The thread of this process has: a main thread stays visible as a zombie as long as there are others."""
    fields = _stat(f"{pid}/task/{tid}")
    return fields is None or fields[0] in ("Z", "X")


def _stat(pid: int | str) -> list[str] | None:
    """The fields behind the command's name, which may hold anything."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].decode("ascii", "replace").split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def carrier() -> int | None:
    """The nearest ancestor that is an sshd, which carries what this process says; None without one, or where another
    process of this tool stands between: then nothing is said over SSH."""
    pid = os.getppid()
    while pid > 1 and not name(pid).startswith("tcpcp-"):
        if name(pid).startswith("sshd"):
            return pid
        fields = _stat(pid)
        pid = int(fields[1]) if fields is not None else 0
    return None


def send_at_once(pid: int) -> None:
    """What that process sends by its TCP connections does not wait until what it sent before is acknowledged
    (TCP_NODELAY). For an sshd without a terminal, which lets it wait (OpenSSH, ssh_packet_set_interactive), and a
    client that has nothing to send back: 40 ms and more. Where that is not allowed, it stays as it is."""
    with contextlib.suppress(KernelError, Refused, OSError):
        pidfd = pidfd_open(pid)
        try:
            for number, what in descriptors(pid).items():
                if what.startswith("socket:"):
                    with borrow_socket(pidfd, number) as sock:
                        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
                            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        finally:
            os.close(pidfd)


def name(pid: int) -> str:
    """The process's own name for itself, made printable."""
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:
            return "".join(c if c.isprintable() else "?" for c in comm.read(64).decode("utf-8", "replace").strip())
    except OSError:
        return "?"


def descriptors(pid: int) -> dict[int, str]:
    """Descriptor number -> what it is ("socket:[12345]", a path, ...). Refused where that may not be seen."""
    directory = f"/proc/{pid}/fd"
    try:
        numbers = sorted(int(entry) for entry in os.listdir(directory))
    except FileNotFoundError:
        raise Refused(f"there is no process {pid}") from None
    except PermissionError:
        raise Refused(f"the descriptors of process {pid} may not be seen", hint="run as root") from None
    found = {}
    try:
        inside = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refused(f"there is no process {pid}") from None
    try:
        for number in numbers:
            try:
                found[number] = os.readlink(str(number), dir_fd=inside)
            except OSError:  # closed meanwhile
                continue
    finally:
        os.close(inside)
    return found


def socket_inode(link: str) -> int | None:
    """The inode in a descriptor's link, if it is a socket."""
    if link.startswith("socket:[") and link.endswith("]") and link[8:-1].isdigit():
        return int(link[8:-1])
    return None


def processes() -> Iterator[int]:
    return (int(entry) for entry in os.listdir("/proc") if entry.isdigit())


def sockets() -> dict[int, dict[int, list[int]]]:
    """What every process that may be looked at has: process id -> inode of a socket -> descriptor numbers."""
    found: dict[int, dict[int, list[int]]] = {}
    for pid in processes():
        try:
            links = descriptors(pid)
        except Refused:
            continue
        for number, link in links.items():
            inode = socket_inode(link)
            if inode is not None:
                found.setdefault(pid, {}).setdefault(inode, []).append(number)
    return found


def holders(inodes: set[int]) -> dict[int, set[int]]:
    """Which processes have each of these sockets open: inode -> process ids. Looks at every process that it may see."""
    found: dict[int, set[int]] = {inode: set() for inode in inodes}
    for pid in processes():
        try:
            links = descriptors(pid).values()
        except Refused:
            continue
        for link in links:
            inode = socket_inode(link)
            if inode is not None and inode in found:
                found[inode].add(pid)
    return found


def network_namespace(pid: int) -> str:
    """The path that names the process's network namespace."""
    return f"/proc/{pid}/ns/net"


def open_namespace(pid: int) -> int:
    """A descriptor of the process's network namespace: it stays valid when the process ends."""
    with failing(f"open {network_namespace(pid)}"):
        return os.open(network_namespace(pid), os.O_RDONLY | os.O_CLOEXEC)

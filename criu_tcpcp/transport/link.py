"""A byte stream to the other host's `criu-tcpcp serve`, and the process that it runs through.

The keeper is single-threaded, and holds stopped processes and packet queues: it must not run an SSH client's threads.
So the connection lives in a child of its own, the link process:

    keeper                          link process                               other host
    Link.socket <-- socketpair --> [ ssh: two pumps <--> paramiko channel ] <---> sshd --> serve
                                   [ local: stdin and stdout of serve, nothing between ]
    Link        <-- reports ------ connected | failed, then ended
    Link        <-- shared page -- the last 4 KiB of the far command's stderr

`open_link` forks it (no exec: the cost is the import of the SSH client alone) and waits for "connected" or "failed".
From then on the user reads and writes `Link.socket` with calls of its own. The end of the far command shows there as
EOF, EPIPE or ECONNRESET; the report "ended" is sent before that, so `failure()` can say why.

Invariants:
- The link process ends when the user's end of the socketpair closes, however that came about, SIGKILL included: it
  holds no descriptor of the caller, and both ends are close-on-exec. What was written before the end is
  still delivered if the far command takes it within `DRAIN_S`; the far command is not killed, it sees EOF, as with ssh.
- It never returns into the caller's frames, never prints a traceback, and hears no signal of the terminal.
- Nothing here blocks without bound: `open_link` by the target's time-out, `close` by about a second, then SIGKILL.
- A fork of the user that runs on without exec keeps the stream open: it has to close its copy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import gc
import json
import mmap
import os
import select
import signal
import socket
import struct
import time
import warnings
from types import TracebackType
from typing import Any, NoReturn

from ..core.errors import LinkError, TcpcpError
from ..kernel import syscalls
from .target import LocalTarget, Target

DRAIN_S = 0.4  # what the link process grants the far command after the user has closed
_CLOSE_S = 1.0  # after that, SIGKILL
_LOCAL_START_S = 10.0
_GRACE_S = 0.5  # for a report that is on its way
_TAIL_BYTES = 4096
_LINES = 3  # of stderr, in a diagnosis

_INSTALL = "install it there (pip install criu-tcpcp), or say where it is with --remote-command"


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why the stream ended: `reason` in words, and the far command's exit status where one arrived."""

    reason: str
    exit_status: int | None


class Link:
    """The user's end of the stream. Made by `open_link`; a context manager that closes."""

    def __init__(
        self,
        target: Target | LocalTarget,
        data: socket.socket,
        reports: socket.socket,
        tail: Tail,
        pid: int,
        pidfd: int,
        peer_address: str | None,
    ) -> None:
        self.socket = data
        self.pid = pid
        self.peer_address = peer_address  # the address that SSH reached; None: local, or through another host
        self._target = target
        self._reports = reports
        self._tail = tail
        self._pidfd = pidfd
        self._ending: Ending | None = None
        self._closed = False

    def fileno(self) -> int:
        """The stream's descriptor, for poll."""
        return self.socket.fileno()

    def diagnosis(self) -> str:
        """Why the stream ended and what the far command said last on stderr, on one line; empty when nothing is known.

        Never blocks, and may be asked at any time, also after `close`.
        """
        self._take_report(wait_s=0)
        parts = [self._ending.reason] if self._ending else []
        lines = self._tail.lines()[-_LINES:]
        if lines:
            parts.append("its last words: " + " | ".join(lines))
        return "; ".join(parts)

    def failure(self) -> LinkError:
        """The error to raise when the stream ended before its first byte.

        Waits up to half a second for the far command's exit status.
        """
        self._take_report(wait_s=_GRACE_S)
        lines = self._tail.lines()
        said = f": {lines[-1]}" if lines else ""
        command = _command_name(self._target)
        if self._ending is None:
            return LinkError(f"{self._target}: the stream to `{command}` ended, for an unknown reason{said}")
        status = self._ending.exit_status
        # 127 is the shell's word for it; sudo, for one, ends with 1.
        if status == 127 or (status and lines and lines[-1].endswith("command not found")):
            return LinkError(f"`{command}` was not found on {self._target}{said}", hint=_INSTALL)
        if status == 126:
            return LinkError(f"`{command}` cannot be executed on {self._target}{said}", hint=_INSTALL)
        if status is not None:
            return LinkError(f"`{command}` on {self._target} ended at once with status {status}{said}")
        return LinkError(f"{self._target}: {self._ending.reason}{said}")

    def close(self) -> None:
        """Close the stream and reap the link process, by SIGKILL if it takes more than a second. Does not raise."""
        if self._closed:
            return
        self._closed = True
        self._take_report(wait_s=0)
        self.socket.close()
        self._reports.close()
        _reap(self.pid, self._pidfd, _CLOSE_S)

    def descriptors(self) -> set[int]:
        """What a fork needs that goes on with the link in this process's place."""
        return {self.socket.fileno(), self._reports.fileno()}

    def hand_over(self) -> None:
        """A fork of this process has the link from now on: close it here, and let the link process be. Does not
        raise."""
        if not self._closed:
            self._closed = True
            self.socket.close()
            self._reports.close()
            os.close(self._pidfd)

    def __enter__(self) -> Link:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _take_report(self, wait_s: float) -> None:
        if self._ending is not None or self._reports.fileno() < 0:
            return
        report = _receive(self._reports, wait_s)
        if report is None:
            return
        self._ending = Ending(report.get("reason", "the link process died"), report.get("exit_status"))


class Tail:
    """The last 4 KiB of a byte stream, in a page that the link process writes and the user reads.

    A reader that meets a write may see the bytes mixed: they are words for a human, nothing decides by them.
    """

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, 4 + _TAIL_BYTES)
        self._last = b""

    def write(self, data: bytes) -> None:
        """Append; what is older than the last 4 KiB goes."""
        self._last = (self._last + data)[-_TAIL_BYTES:]
        self._page[4 : 4 + len(self._last)] = self._last
        self._page[:4] = struct.pack("=I", len(self._last))

    def lines(self) -> list[str]:
        """What was written, as lines without the empty ones; what a terminal would act upon is escaped."""
        (length,) = struct.unpack("=I", self._page[:4])
        text = self._page[4 : 4 + min(length, _TAIL_BYTES)].decode(errors="replace")
        lines = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in line.strip()) for line in text.splitlines())
        return [line for line in lines if line]


class Reporter:
    """The link process's voice. A report that cannot be delivered is dropped: its reader has gone."""

    def __init__(self, reports: socket.socket, tail: Tail) -> None:
        self.reports = reports
        self.tail = tail

    def connected(self, peer_address: str | None) -> None:
        """The far command was started."""
        self._send({"connected": True, "peer_address": peer_address})

    def failed(self, error: TcpcpError) -> None:
        """It could not be started; `open_link` raises this."""
        self._send({"connected": False, "message": error.message, "hint": error.hint})

    def ended(self, ending: Ending) -> None:
        """The stream is over; to be sent before the user can see EOF."""
        self._send(dataclasses.asdict(ending))

    def _send(self, report: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.reports.send(json.dumps(report).encode(), socket.MSG_DONTWAIT)


def open_link(target: Target | LocalTarget) -> Link:
    """Reach the target and start its command; the stream is ready for use.

    Raises LinkError, one line that says what to do about it, when the host cannot be reached or does not let us in.
    That the command is missing there shows only as an EOF before the first byte: `Link.failure` makes the error.
    """
    timeout_s = target.timeout_s if isinstance(target, Target) else _LOCAL_START_S
    data, far_data = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    reports, far_reports = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tail = Tail()
    pid = _fork()
    if pid == 0:
        _link_process(target, far_data, Reporter(far_reports, tail))
    far_data.close()
    far_reports.close()
    pidfd = os.pidfd_open(pid)
    try:
        peer_address = _await_connected(target, reports, timeout_s)
    except BaseException:
        data.close()
        reports.close()
        _reap(pid, pidfd, 0)
        raise
    return Link(target, data, reports, tail, pid, pidfd, peer_address)


def _await_connected(target: Target | LocalTarget, reports: socket.socket, timeout_s: float) -> str | None:
    """The address that SSH reached. The link process keeps the time-out itself and says where it was lost."""
    report = _receive(reports, timeout_s + _GRACE_S)
    if report is None:
        raise LinkError(f"{target}: no connection within {timeout_s:g} s", hint="--timeout waits longer")
    if not report:
        raise LinkError(f"{target}: the link process died")
    if not report["connected"]:
        raise LinkError(report["message"], hint=report["hint"])
    address: str | None = report["peer_address"]
    return address


def _receive(reports: socket.socket, wait_s: float) -> dict[str, Any] | None:
    """The next report; None when there is none within the time, {} when the link process has gone without one."""
    poller = select.poll()
    poller.register(reports, select.POLLIN)
    if not poller.poll(wait_s * 1000):
        return None
    message = reports.recv(65536)
    report: dict[str, Any] = json.loads(message) if message else {}
    return report


def _command_name(target: Target | LocalTarget) -> str:
    return target.remote_command if isinstance(target, Target) else target.argv[0]


def _reap(pid: int, pidfd: int, grace_s: float) -> None:
    """Wait for the child's end, by SIGKILL after `grace_s`; it may have been reaped by a waitpid(-1) of the user."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    try:
        if not poller.poll(grace_s * 1000):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poller.poll()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    finally:
        os.close(pidfd)


def _fork() -> int:
    """fork(2); the child starts with every signal blocked, so that no handler of the caller runs in it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside other threads. The child takes no lock that they might hold.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _link_process(target: Target | LocalTarget, data: socket.socket, report: Reporter) -> NoReturn:
    """Everything the child does, from the fork to its exit."""
    try:
        data, report.reports = _above_stdio(data), _above_stdio(report.reports)
        _become_link_process({data.fileno(), report.reports.fileno()})
        if isinstance(target, Target):
            from . import ssh

            ssh.run(target, data, report, deadline=time.monotonic() + target.timeout_s)
        else:
            from . import local

            local.run(target, data, report)
    except TcpcpError as error:
        report.failed(error)
    except BaseException as error:  # noqa: BLE001 - what leaves this frame would go on in the caller's, twice
        report.failed(LinkError(f"{target}: {type(error).__name__}: {error}"))
    finally:
        os._exit(0)


def _above_stdio(end: socket.socket) -> socket.socket:
    """The same socket at a number above 2: a caller without stdio has it where /dev/null goes now."""
    return end if end.fileno() > 2 else socket.socket(fileno=fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3))


def _become_link_process(keep: set[int]) -> None:
    """Let go of everything that a fork inherits: the caller's descriptors, signal handlers, terminal, garbage."""
    gc.freeze()  # the caller's objects are never finalised here: their descriptors' numbers are soon others'
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError):  # the two or three that the C library keeps for itself
            signal.signal(number, signal.SIG_IGN if number in (signal.SIGINT, signal.SIGPIPE) else signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.setsid()
    syscalls.keep_only(keep)
    warnings.simplefilter("ignore")
    syscalls.name_process("tcpcp-link")
    syscalls.forbid_core_dumps()

"""What is physically true of two hosts and the connection between two programs there, whatever anybody believes.

Owner tables (hold, silence) and the tracer's stop go with the process that made them; the fence and SIGSTOP outlive it.
A journal is a directory: it is locked by a process, and found by its name, so that one which was removed and made again
is another. A reboot takes all of it: the run directory lies on tmpfs.

The properties are checked here, at the very change that breaks one.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Generator
from typing import Any


class Property(enum.StrEnum):
    """What must hold in every run."""

    TWO_OWNERS = "two hosts can speak for the connection"
    UNDECIDED = "the destination activates though committed is not written"
    TAKEN_BACK = "the origin takes the connection back after the commit"
    STALE = "what the destination activates is older than what the origin program did since"
    REPLAYED = "a connection that has lived and ended at the destination is made again"
    LOST = "the connection is lost, and nothing excuses it"
    FORGOTTEN = "the state is gone, and the end is not written: recovery asks for ever"
    UNTOLD = "settled was said, and the end is not written: recovery asks one who has forgotten"
    UNSETTLED = "recovery does not come to an end"
    STOPPED = "the origin's program stays stopped, or its packets held"
    LEFT = "something is left behind"
    ILLEGAL = "an event that the table does not know, and no LINK_LOST for it"


class Violation(AssertionError):
    """A property does not hold."""

    def __init__(self, broken: Property, detail: str = "") -> None:
        super().__init__(f"{broken.value}{': ' if detail else ''}{detail}")
        self.property = broken


class ActionFailed(Exception):
    """An action could not be done: the simulation's TcpcpError."""


class LinkBroken(ActionFailed):
    """Its LinkError and ProtocolError."""


class Wait(enum.Enum):
    """What a process waits for (it yields this); an Action that it yields is the one that it does next."""

    MESSAGE = enum.auto()
    FOREVER = enum.auto()  # a message, without a time limit
    LOCK = enum.auto()
    KEEPER = enum.auto()


class Link:
    """A connection between a process of the origin host and a serve: two queues. Cut, it loses the end of what is on
    its way, and each end may notice at once or only by silence."""

    __slots__ = ("closed_by", "cut", "stalled", "to_destination", "to_origin", "unnoticed")

    def __init__(self) -> None:
        self.to_origin: deque[str] = deque()
        self.to_destination: deque[str] = deque()
        self.closed_by = ""
        self.cut = False
        self.unnoticed = ""
        self.stalled = False


class Directory:
    """One side's journal of the pass."""

    __slots__ = ("boot", "lock", "records", "state", "taker", "verdict")

    def __init__(self) -> None:
        self.records: list[str] = []
        self.verdict: str | None = None
        self.state = False
        self.lock: Process | None = None
        self.boot = 0  # the destination's, that intent names
        self.taker = 0  # the program that the connection is for


class Host:
    __slots__ = ("boot", "full", "journal", "unreachable")

    def __init__(self) -> None:
        self.boot = 1
        self.journal: Directory | None = None
        self.full = 0  # so many writes fail
        self.unreachable = 0  # so many new links fail


class Process:
    """One of ours. `role`: the side that it works for."""

    __slots__ = ("alive", "cancelled", "failing", "link", "main", "name", "reported", "role", "timed_out", "todo",
                 "watches")

    def __init__(self, name: str, role: str) -> None:
        self.name = name
        self.role = role
        self.main: Generator[Any, None, None] | None = None
        self.todo: Any = None  # an Action, a Wait, or None
        self.link: Link | None = None
        self.alive = True
        self.cancelled = False
        self.watches = False  # it can be told to cancel
        self.timed_out = False
        self.reported = False
        self.failing = ""  # the action it does next: "before" or "after" it has taken effect


class Socket:
    """The destination's. Dormant (in repair) until it is alive. Held by a serve, by the program, or by both."""

    __slots__ = ("alive", "conversation", "program", "serve")

    def __init__(self, serve: Process) -> None:
        self.alive = False
        self.serve: Process | None = serve
        self.program = False
        self.conversation: Process | None = None  # the serve that the program speaks with about it


class World:
    """Both hosts. Names begin with o_ or d_ for the side."""

    def __init__(self) -> None:
        self.origin = Host()
        self.destination = Host()
        # the origin's program and endpoint
        self.o_program = True
        self.o_socket = True
        self.o_tracer: Process | None = None
        self.o_sigstop = False
        self.o_held: Process | None = None
        self.o_silent: Process | None = None
        self.o_fence = False
        self.o_redirect = False
        # the destination's
        self.d_program = True
        self.d_program_number = 1  # another process, another number
        self.d_delivered = False  # what the program remembers
        self.d_socket: Socket | None = None
        self.d_fence = False
        # history
        self.dirty = False  # the origin's program ran on since the state was read
        self.committed_boot = 0  # the destination's boot that wrote committed
        self.decided_boot = 0  # the same, or aborted
        self.lived = False  # the destination's socket has spoken
        self.lived_and_ended = False
        self.forced = False
        self.settled = False  # the destination has heard it
        self.let_go = False  # written
        self.sent: list[str] = []
        self.excuses: set[str] = set()  # for a connection that is lost: what struck
        self.ignored: frozenset[Property] = frozenset()
        self.log: list[str] | None = None

    def say(self, text: str) -> None:
        if self.log is not None:
            self.log.append(text)

    def violated(self, broken: Property, detail: str = "") -> None:
        if broken not in self.ignored:
            raise Violation(broken, detail)

    # -- who can speak -------------------------------------------------------------------------------------------------

    @property
    def o_stopped(self) -> bool:
        return self.o_tracer is not None or self.o_sigstop

    @property
    def o_speaks(self) -> bool:
        return self.o_socket and not self.o_fence and self.o_silent is None

    @property
    def d_speaks(self) -> bool:
        return self.d_socket is not None and self.d_socket.alive and not self.d_fence

    def check(self) -> None:
        """After every step."""
        sock = self.d_socket
        if sock is not None and sock.alive and not self.d_fence:
            self.lived = True
            if self.o_socket and not self.o_fence and self.o_silent is None and not self.forced:
                self.violated(Property.TWO_OWNERS)

    # -- the origin's program ------------------------------------------------------------------------------------------

    def o_runs(self) -> None:
        """It is not stopped any more."""
        if self.o_socket and self.o_program and not self.o_stopped and "end failed" not in self.excuses:
            self.dirty = True

    def o_program_dies(self, why: str) -> None:
        if self.o_program:
            self.o_program = False
            self.o_sigstop = False
            self.o_tracer = None
            if not self.committed_boot:
                self.excuses.add(why)

    # -- the destination's ---------------------------------------------------------------------------------------------

    def d_close(self) -> None:
        if self.d_socket is not None:
            if self.lived:
                self.lived_and_ended = True
            self.d_socket = None

    def d_program_dies(self) -> None:
        sock = self.d_socket
        self.d_program = False
        self.d_program_number += 1
        self.d_delivered = False
        if self.committed_boot or sock is not None:
            self.excuses.add("the destination's program died")
        if sock is not None and sock.program:
            sock.program = False
            sock.conversation = None
            if sock.serve is None:
                self.d_close()

    # -- processes and hosts -------------------------------------------------------------------------------------------

    def ended(self, process: Process) -> None:
        """By itself, or killed: what the kernel does then."""
        process.alive = False
        process.main = None
        for host in (self.origin, self.destination):
            if host.journal is not None and host.journal.lock is process:
                host.journal.lock = None
        if process.link is not None:
            process.link.closed_by += process.role
        if self.o_held is process:
            self.o_held = None
        if self.o_silent is process:
            self.o_silent = None
        if self.o_tracer is process:
            self.o_tracer = None
            self.o_runs()
        self.serve_lets_go(process)
        self.check()

    def serve_lets_go(self, process: Process) -> None:
        """Its descriptors, and its conversation with the program, which then closes what is dormant, and keeps what is
        alive (application.py)."""
        sock = self.d_socket
        if sock is None:
            return
        if sock.serve is process:
            sock.serve = None
        if sock.conversation is process:
            sock.conversation = None
            if not sock.alive:
                sock.program = False
        if sock.serve is None and not sock.program:
            self.d_close()

    def origin_reboots(self) -> None:
        self.o_program_dies("the origin rebooted")
        self.origin = self._rebooted(self.origin)
        if not self.d_delivered:
            self.excuses.add("the origin rebooted before the destination had it")
        self.o_socket = self.o_fence = self.o_redirect = False

    def destination_reboots(self) -> None:
        if self.committed_boot:
            self.excuses.add("the destination rebooted after the commit")
        self.d_program_dies()
        self.d_program = True
        self.destination = self._rebooted(self.destination)
        self.d_close()
        self.d_fence = False

    @staticmethod
    def _rebooted(host: Host) -> Host:
        new = Host()
        new.boot = host.boot + 1
        return new

"""A connection that a server accepts from nobody, so that its socket can become another one.

    Forged    comes from the peer's own address and port: a SYN is given to this host's own stack, the SYN-ACK is caught
              before it leaves (kernel/interception.py), read and dropped, and the ACK is given. So what accept tells
              the server of the peer, what it filters by, and which socket of an SO_REUSEPORT group is chosen, are right
              by themselves. The fence keeps everything else that the server might say from the real peer.
    Ordinary  from this host to itself, for a server that listens on loopback only: no packet for another host can come
              from there (net/ipv4/route.c, __mkroute_output). accept then tells of a local client.

TCP_DEFER_ACCEPT, by which a server hears only of connections that have sent something, is off while the ACK arrives:
that is when the kernel looks at it (net/ipv4/tcp_minisocks.c, tcp_check_req).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Iterator
from typing import Protocol

from ..core import tcp
from ..core.endpoint import Flow
from ..core.errors import KernelError, Refused
from ..journal import Journal
from ..kernel import conntrack, repair, sockdiag
from ..kernel.interception import Interception
from ..kernel.rawpacket import ACK, RST, SYN, Injector
from ..kernel.rules import MARK, HostRules, marks_are_inherited
from ..kernel.sockdiag import Listener
from ..kernel.syscalls import failing
from .prologue import Speaker

THROWN = "thrown"
_ANSWER_TIMEOUT_S = 1.0
_TCP_DEFER_ACCEPT = 9
_CHUNK = 1 << 16


class ThrowAway(Protocol):
    """`flow`, as the server has it. `heard`: what the server did with it, "speaks" or "closes", where this end can
    tell. Where it was made to talk: `say` begins to, `go_on` goes on, takes what the server answered, and returns how
    many bytes that were; `has_said_all`: the server's host has all of it; `fall_silent` ends it, and what the server
    says from then on counts as speaking. `end`: one that no program has, or has any more, goes; `forget`: its socket
    has become something else. Neither sends a packet to anybody."""

    flow: Flow

    def open(self) -> None: ...
    def heard(self) -> str | None: ...
    def say(self, text: bytes) -> None: ...
    def go_on(self) -> int: ...
    @property
    def has_said_all(self) -> bool: ...
    def fall_silent(self) -> None: ...
    def end(self) -> None: ...
    def forget(self) -> None: ...


class Forged:
    """See the module. `fenced`: the fence for `flow` stands for the pass itself; else it is this object's. `talks`: a
    prologue will be said."""

    def __init__(self, listener: Listener, flow: Flow, journal: Journal, rules: HostRules, injector: Injector, *,
                 fenced: bool, talks: bool) -> None:
        self.flow = flow
        self._listener, self._journal, self._rules, self._injector = listener, journal, rules, injector
        self._fences, self._talks = not fenced, talks
        self._speaker: Speaker | None = None
        self._sequence = secrets.randbits(32)
        self._record(self._sequence)

    def _record(self, sequence: int) -> None:
        """For whoever has to `clear` it: the next byte that the server expects is the one behind this."""
        self._journal.write(THROWN, thrown=self.flow.to_json(), sequence=sequence, fences=self._fences)

    def open(self) -> None:
        """It waits to be accepted. Refused where nothing answers, or the answer is no."""
        if marks_are_inherited():
            raise Refused("what a server accepts here takes over the mark by which packets pass this tool's own rules",
                          hint="sysctl net.ipv4.tcp_fwmark_accept=0 at the destination")
        if self._fences:
            self._rules.fence(self.flow)
            if conntrack.knows_any():  # the SYN-ACK goes nowhere, so what it follows would never be established
                with contextlib.suppress(KernelError), contextlib.closing(conntrack.Tracking()) as tracking:
                    tracking.enter(self.flow)
        with contextlib.ExitStack() as stack:
            caught = stack.enter_context(contextlib.closing(Interception(self.flow)))
            self._injector.deliver_bare(self.flow, SYN, self._sequence)
            answer = caught.answer(_ANSWER_TIMEOUT_S)
            if answer is None:
                raise Refused(f"the listener at {self._listener} does not answer: its backlog may be full, or a packet "
                              "filter of the destination drops what the host sends to itself")
            flags, sequence = answer
            if flags & RST:
                raise Refused(f"nothing listens at {self._listener} any more")
            ours, theirs = tcp.add(self._sequence, 1), tcp.add(sequence, 1)
            self._injector.deliver_bare(self.flow, ACK, ours, theirs)
            if self._talks:
                stack.pop_all()
                self._speaker = Speaker(self.flow, self._injector, caught, ours, theirs)

    def heard(self) -> str | None:
        """Only the server's own socket tells: what it says gets no further, unless there is a talk."""
        return "closes" if self._speaker is not None and self._speaker.has_closed else None

    def say(self, text: bytes) -> None:
        self._record(tcp.add(self._sequence, len(text)))
        self._talk.say(text)

    def go_on(self) -> int:
        return self._talk.go_on()

    @property
    def has_said_all(self) -> bool:
        return self._talk.has_said_all

    @property
    def _talk(self) -> Speaker:
        if self._speaker is None:
            raise Refused("the forged connection was not made to talk")
        return self._speaker

    def fall_silent(self) -> None:
        if self._speaker is not None:
            self._speaker.close()
            self._sequence = tcp.add(self._speaker.next_sequence, -1)
            self._speaker = None

    def end(self) -> None:
        self.fall_silent()
        _end_unowned(self.flow, self._sequence, self._injector)
        self.forget()

    def forget(self) -> None:
        self.fall_silent()
        if self._fences:
            _take_away(self.flow, self._rules)
            self._fences = False


class Ordinary:
    """See the module."""

    def __init__(self, listener: Listener) -> None:
        family = socket.AF_INET if listener.plain_address.version == 4 else socket.AF_INET6
        self._listener = listener
        self._unsaid = b""
        self._client = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._client.settimeout(_ANSWER_TIMEOUT_S)

    def open(self) -> None:
        """As of the other."""
        try:
            with failing("connect"):
                self._client.connect((str(self._listener.plain_address), self._listener.port))
        except KernelError as error:
            raise Refused(f"the listener at {self._listener} does not answer: {error.message}") from None
        self._client.setblocking(False)
        here = Flow.of_socket(self._client)
        self.flow = Flow(here.peer, here.local)

    def heard(self) -> str | None:
        try:
            return "speaks" if self._client.recv(1, socket.MSG_PEEK) else "closes"
        except BlockingIOError:
            return None
        except OSError:
            return "closes"

    def say(self, text: bytes) -> None:
        self._unsaid = text

    def go_on(self) -> int:
        answered = 0
        with contextlib.suppress(OSError):  # would block; or the connection has ended, which `heard` tells
            while self._unsaid:
                self._unsaid = self._unsaid[self._client.send(self._unsaid):]
        with contextlib.suppress(OSError):
            while data := self._client.recv(_CHUNK):
                answered += len(data)
        return answered

    @property
    def has_said_all(self) -> bool:
        return not self._unsaid

    def fall_silent(self) -> None:
        """The kernel acknowledges what comes from now on, and keeps it: `heard` sees it."""

    def end(self) -> None:
        """As a client that resets: for a server that has not accepted it yet, or has closed it."""
        with contextlib.suppress(OSError):
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._client.close()

    def forget(self) -> None:
        with contextlib.suppress(KernelError, OSError):
            repair.end_silently(self._client)
        self._client.close()


@contextlib.contextmanager
def undeferred(listening: socket.socket | None) -> Iterator[None]:
    """This listener hears of every connection at once, inside the `with`."""
    deferral = listening.getsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT) if listening is not None else 0
    if listening is None or not deferral:
        yield
        return
    try:
        with failing("setsockopt(TCP_DEFER_ACCEPT)"):
            listening.setsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, 0)
        yield
    finally:
        with failing("setsockopt(TCP_DEFER_ACCEPT)"):
            listening.setsockopt(socket.IPPROTO_TCP, _TCP_DEFER_ACCEPT, deferral)


def thrown_flow(journal: Journal) -> Flow | None:
    """Of the newest forged one of this pass."""
    thrown = journal.field(THROWN)
    return Flow.from_json(thrown["thrown"]) if thrown is not None else None


def clear(journal: Journal, rules: HostRules) -> None:
    """Take away what an earlier serve has left of the forged connections of an undone pass, once no program has one."""
    for record in journal.records():
        if record["record"] != THROWN:
            continue
        flow = Flow.from_json(record["thrown"])
        with contextlib.closing(Injector(flow.ip_version, MARK)) as injector:
            _end_unowned(flow, record["sequence"], injector)
        if record["fences"]:
            _take_away(flow, rules)


def unfence(journal: Journal, rules: HostRules) -> None:
    """The fences of this pass's forged connections go."""
    for record in journal.records():
        if record["record"] == THROWN and record["fences"]:
            _take_away(Flow.from_json(record["thrown"]), rules)


def _take_away(flow: Flow, rules: HostRules) -> None:
    """The fence of a forged connection, and what conntrack knows of it."""
    rules.unfence(flow)
    conntrack.forget(flow)


def _end_unowned(flow: Flow, sequence: int, injector: Injector) -> None:
    if sockdiag.state_of(flow) is not None:
        injector.deliver_bare(flow, RST, tcp.add(sequence, 1))

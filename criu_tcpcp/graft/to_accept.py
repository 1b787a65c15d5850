"""Through accept, into a server that knows nothing of this: it accepts a throw-away connection (throwaway.py) as any
other, and that very socket becomes the passed connection (in_place.py).

The server is brought to that point while staging, before the origin is stopped: how long it takes to accept is no part
of the stall. Then it has a moment for what it does with a new connection, and is looked at: one that has spoken first
or has closed it cannot be given a connection in this way.

Of several processes that accept from one listening socket, the others stand still for the milliseconds that it takes
the wanted one to accept. Which socket of an SO_REUSEPORT group is chosen depends on the peer's port: where the wanted
process has another than that, other ports are tried: accept then tells of a wrong port, and getpeername of the right.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time

from ..core.endpoint import Endpoint, Flow
from ..core.errors import Refused
from ..core.tcp import TcpState
from ..kernel import iouring, process, routing, sockdiag, tcpinfo
from ..kernel.sockdiag import Listener
from . import Ground, Vessel, in_place
from .in_place import IntoProgram, ProgramSocket, named
from .prologue import Silence
from .throwaway import Forged, Ordinary, ThrowAway, undeferred

_ACCEPT_TIMEOUT_S = 2.0
_OTHERS_STAND_S = 0.3
_MOMENT_S = 0.25
_PROLOGUE_TIMEOUT_S = 5.0
_LOOK_EVERY_S = 0.002
_QUIET_LOOKS = 4
_TRIES = 64
_SHOWN = 6
_INIT = 1  # holds the sockets of services that it starts, and accepts for none of these


class ToAccept(IntoProgram):
    """Into whoever accepts at `listener`, of `holders`; where `wanted` is given, into that process or a child of it.
    `sharing`: who accepts from the very socket that `wanted` does."""

    def __init__(self, way: str, listener: Listener, holders: frozenset[int], sharing: frozenset[int] = frozenset(),
                 wanted: int | None = None) -> None:
        super().__init__(way, frozenset({wanted}) if wanted is not None else holders, listener.port)
        self._listener, self._holders, self._sharing, self._wanted = listener, holders, sharing, wanted
        self._thrown: ThrowAway | None = None
        self._answered: int | None = None  # bytes, to the prologue

    @property
    def description(self) -> str:
        if self._taken is None:
            return f"whoever accepts at {self._listener}"
        said = f", prologue answered with {self._answered} bytes" if self._answered is not None else ""
        return f"{super().description}, accepted at {self._listener}{said}"

    # -- staging -------------------------------------------------------------------------------------------------------

    def arrange(self, flow: Flow, ground: Ground) -> None:
        """A program has accepted, and waits. Refused: none did, or it has done with it what cannot be undone; then
        nothing of it is left."""
        listener = self._listener
        port, losers = flow.peer.port, dict[int, None]()
        try:
            for _ in range(_TRIES):
                self._taken = taken = self._accepted(listener, flow, port, ground)
                if self._is_wanted(taken.program.pid):
                    ground.admit(self.takers())
                    if ground.prologue is None:
                        self._watch()
                    else:
                        self._answered = self._rebuild(ground.prologue)
                    self._see_who_has_it()
                    ground.admit(self.takers())
                    self._take(self._taken, ground.journal)
                    return
                losers[taken.program.pid] = None
                self._end()
                port = random.randint(32768, 60999)
            raise Refused(f"process {self._wanted} does not accept at {listener}: "
                          + ", ".join(map(str, list(losers)[:_SHOWN])) + f" did, {_TRIES} times",
                          hint=f"--into listen:{listener.port} takes whichever does")
        except BaseException:
            self._end()
            raise

    def _is_wanted(self, pid: int) -> bool:
        """A child: the one that is named forks for each connection, or has forked its workers."""
        return self._wanted is None or self._wanted in (pid, process.parent(pid))

    def _accepted(self, listener: Listener, flow: Flow, port: int, ground: Ground) -> ProgramSocket:
        """A new throw-away connection, once a program has it."""
        others = {pid for pid in self._sharing - {_INIT} if not self._is_wanted(pid)}
        with in_place.stopped(others), contextlib.ExitStack() as stack:
            self._thrown = self._new_throw_away(listener, flow, port, ground)
            with undeferred(stack.enter_context(self._borrowed(listener))):
                self._thrown.open()
            return self._found(listener, self._thrown.flow, _OTHERS_STAND_S if others else _ACCEPT_TIMEOUT_S)

    def _new_throw_away(self, listener: Listener, flow: Flow, port: int, ground: Ground) -> ThrowAway:
        if listener.is_full:
            raise Refused(f"the backlog of the listener at {listener} is full: {listener.waiting} connections wait to "
                          "be accepted", hint="the server there does not keep up, or hangs")
        address = listener.plain_address
        if address.is_loopback:
            return Ordinary(listener)
        if address.is_unspecified:
            address = flow.local.address if routing.is_local(flow.local.address) \
                else routing.source_towards(flow.peer.address)
        forged = Flow(Endpoint(address, listener.port), Endpoint(flow.peer.address, port))
        if sockdiag.state_of(forged) is not None:
            raise Refused(f"the destination has a connection {forged} already")
        return Forged(listener, forged, ground.journal, ground.rules, ground.injector, fenced=forged == flow.plain,
                      talks=ground.prologue is not None)

    def _borrowed(self, listener: Listener) -> socket.socket:
        found = in_place.first_of(sorted(self._holders), listener.inode, 0)
        if found is None:
            raise Refused(f"nobody listens at {listener} any more")
        return in_place.borrow(found.program.pid, found.descriptor)

    def _found(self, listener: Listener, thrown: Flow, timeout_s: float) -> ProgramSocket:
        deadline = time.monotonic() + timeout_s
        while True:
            entry = sockdiag.entry_of(thrown)
            if entry is None or (not entry.inode and entry.state not in (TcpState.ESTABLISHED, TcpState.SYN_RECV)):
                raise self._closed("the server")
            taken = in_place.first_of(sorted(self._holders), entry.inode, entry.cookie) if entry.inode else None
            if entry.inode and taken is None:  # a child has it, which was forked for it
                taken = in_place.first_of(process.holders({entry.inode})[entry.inode], entry.inode, entry.cookie)
            if taken is not None:
                return taken
            if time.monotonic() > deadline:
                raise Refused(f"nobody accepted a connection at {listener} within {timeout_s:g} s",
                              hint="the server there is busy, or hangs")
            time.sleep(_LOOK_EVERY_S / 4)

    def _watch(self) -> None:
        """Give the program a moment with its new connection, until it waits for what comes. Refused where it does
        something else."""
        taken = self._need()
        deadline, quiet = time.monotonic() + _MOMENT_S, 0
        while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
            self._refuse_if_used()
            quiet = quiet + 1 if process.waits(taken.program.pid) else 0

    def _rebuild(self, prologue: bytes) -> int:
        """Say the prologue, drop what the program says, and wait until both are over: how many bytes it said. Refused
        where it closes the connection, or does not come to rest."""
        taken, thrown = self._need(), self._thrown
        if thrown is None:
            raise Refused("the pass was not staged")
        who = named(taken.program.pid)
        thrown.say(prologue)
        answered, began = 0, time.monotonic()
        silence, deadline = Silence(began), began + _PROLOGUE_TIMEOUT_S
        while True:
            time.sleep(_LOOK_EVERY_S)
            new = thrown.go_on()
            answered += new
            entry = sockdiag.entry_of(thrown.flow)
            if thrown.heard() == "closes" or entry is None or entry.inode != taken.inode \
                    or entry.state is not TcpState.ESTABLISHED:
                answered += thrown.go_on()  # it was quicker than the last look
                raise Refused(f"{who} answers the prologue with {answered} bytes, and closes the connection",
                              hint="its log may tell why")
            now = time.monotonic()
            if new or not thrown.has_said_all or entry.unread or entry.unacknowledged:
                silence.broken(now, by_word=bool(new))
            elif silence.is_over(now) and process.waits(taken.program.pid):
                break
            if now > deadline:
                left = "has not read all of the prologue" if entry.unread or not thrown.has_said_all \
                    else "does not come to rest after the prologue"
                raise Refused(f"{who} {left} within {_PROLOGUE_TIMEOUT_S:g} s",
                              hint="it may be busy; or the prologue asks for what never ends")
        thrown.fall_silent()
        return answered

    def _see_who_has_it(self) -> None:
        """One process only; it may be a child that was forked for the connection."""
        taken = self._need()
        holding = process.holders({taken.inode})[taken.inode]
        if len(holding) > 1:
            raise Refused(f"{named(taken.program.pid)} shares the connections that it accepts with process "
                          + ", ".join(str(pid) for pid in sorted(holding - {taken.program.pid})[:_SHOWN]),
                          hint="every process that could use it would have to stand still")
        if holding != {taken.program.pid}:  # a child has it by now
            self._taken = in_place.first_of(holding, taken.inode, taken.cookie)
            if self._taken is None:
                raise self._closed(named(taken.program.pid))
            in_place.check_program(self._taken.program.pid)

    def _refuse_if_used(self) -> None:
        taken, thrown = self._need(), self._thrown
        entry = sockdiag.entry_of(thrown.flow) if thrown is not None else None
        heard = thrown.heard() if thrown is not None else None
        if heard == "speaks" or (entry is not None and entry.unacknowledged and entry.inode):
            raise self._speaks(named(taken.program.pid))
        if heard == "closes" or entry is None or entry.inode != taken.inode or entry.state is not TcpState.ESTABLISHED:
            raise self._closed(named(taken.program.pid))

    def _speaks(self, who: str) -> Refused:
        if self._answered is not None:
            return Refused(f"{who} says more than it answered to the prologue, and the peer would miss that",
                           hint="try again; or it sends by itself all the time, as to a subscriber")
        return Refused(f"{who} speaks first, and a peer that has its connection already would read that in the middle "
                       "of it", hint="--prologue FILE, even an empty one, takes that away; or --into pid:PID:FD")

    @staticmethod
    def _closed(who: str) -> Refused:
        return Refused(f"{who} accepts a connection from this peer and closes it at once",
                       hint="it may filter by address, or be full: its log tells; or --into pid:PID:FD")

    # -- the freeze ----------------------------------------------------------------------------------------------------

    def vessel(self, flow: Flow) -> Vessel:
        """From here on the program stands still. Refused where it has used the throw-away since."""
        taken = self._need()
        try:
            taken.take()
        except in_place.Closed:
            raise self._closed(named(taken.program.pid)) from None
        heard = self._thrown.heard() if self._thrown is not None else None
        if heard == "speaks" or tcpinfo.unacknowledged_bytes(taken.sock):
            raise self._speaks(named(taken.program.pid))
        if heard == "closes" or tcpinfo.read(taken.sock).state is not TcpState.ESTABLISHED:
            raise self._closed(named(taken.program.pid))
        return taken.empty()

    def discard(self, pass_id: str) -> None:
        self._end()

    def _end(self) -> None:
        taken, self._taken = self._taken, None
        thrown, self._thrown = self._thrown, None
        with contextlib.ExitStack() as stack:
            if thrown is not None:
                stack.callback(thrown.forget if taken is not None and taken.is_emptied else thrown.end)
            if taken is not None:
                taken.end()

    def close(self) -> None:
        if self._thrown is not None:
            self._thrown.forget()
        super().close()


def at_port(port: int, flow: Flow) -> ToAccept:
    """Into whichever process accepts at this local port. Refused where none does."""
    listeners = [one for one in sockdiag.listeners() if one.port == port]
    if not listeners:
        raise Refused(f"nobody listens on port {port} at the destination",
                      hint="`ss -tlnp` there shows who does; a server in a network namespace of its own is named by "
                           "its process: --into accept:PID")
    listener = _choose(listeners, flow, f"port {port}")
    holders = _holders(listeners, listener)
    if not holders:
        raise Refused(f"the process that listens at {listener} may not be seen", hint="root is needed there")
    for pid in holders:
        _check(pid)
    return ToAccept(f"listen:{port}", listener, holders)


def of_process(pid: int, flow: Flow) -> ToAccept:
    """Into what this process accepts: on the connection's local port, or on its only one."""
    _check(pid)
    inodes = {process.socket_inode(link) for link in process.descriptors(pid).values()}
    all_listeners = sockdiag.listeners()
    own = [one for one in all_listeners if one.inode in inodes]
    if not own:
        why = "only unix sockets" if process.listens_on_unix(pid) else "no TCP port"
        raise Refused(f"{named(pid)} listens on {why}", hint="--into pid:PID:FD, or a program that accepts TCP")
    ports = sorted({one.port for one in own})
    same = [one for one in own if one.port == flow.local.port]
    if not same and len(ports) > 1:
        raise Refused(f"{named(pid)} listens on ports {', '.join(map(str, ports[:_SHOWN]))}, and not on "
                      f"{flow.local.port}, the connection's", hint="--into listen:PORT")
    listener = _choose(same or own, flow, named(pid))
    holders = _holders(all_listeners, listener)
    sharing = process.holders({listener.inode})[listener.inode]
    return ToAccept(f"accept:{pid}", listener, holders, frozenset(sharing), pid)


def listens(port: int) -> bool:
    return any(one.port == port for one in sockdiag.listeners())


def _check(pid: int) -> None:
    in_place.check_program(pid)
    if any(ring.accepts for ring in iouring.of(pid)):
        raise Refused(f"{named(pid)} accepts by io_uring, where its wait for the connection cannot be stopped",
                      hint="--into receiver[:PATH], or a server without io_uring")


def _choose(listeners: list[Listener], flow: Flow, who: str) -> Listener:
    """The one that the connection would have come to, or the next best."""
    fitting = [one for one in listeners if one.takes(flow.ip_version)]
    if not fitting:
        raise Refused(f"{who}: listens at {listeners[0]} only, and takes no IPv{flow.ip_version} connection")
    return min(fitting, key=lambda one: (one.plain_address != flow.local.address,
                                         not one.plain_address.is_unspecified, one.plain_address.is_loopback,
                                         one.inode))


def _holders(listeners: list[Listener], chosen: Listener) -> frozenset[int]:
    """Who accepts from this listener, or from another of its SO_REUSEPORT group."""
    group = {one.inode for one in listeners
             if (one.address, one.port, one.socket_family) == (chosen.address, chosen.port, chosen.socket_family)}
    found = set().union(*process.holders(group).values())
    return frozenset(found - {_INIT} or found)


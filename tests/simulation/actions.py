"""What each action of the tables does to the simulated hosts: one function an action and part.

An action with several parts can be interrupted between them. What an action needs and does not find (a program that has
gone, a journal that is full or was removed, a broken link) makes it fail, as it does in origin.py and destination.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from criu_tcpcp.core.handoff import Action, Event, OriginState

from .driver import GaveUp
from .world import ActionFailed, Directory, Host, Link, LinkBroken, Process, Property, Socket, World

#: Messages beside those of the tables.
STAGE, STAGED, SETTLED = "Stage", "Staged", "Settled"
_EVENTS: dict[str, Event] = {event.value: event for event in Event}
#: A record is short: it is there whole, or the write has failed.
_WRITES = frozenset(action for action in Action if action.name.startswith("WRITE_"))


def write(host: Host, record: str) -> None:
    """Append to the journal."""
    room(host)
    if host.journal is None:
        raise ActionFailed("there is no journal")
    host.journal.records.append(record)


def room(host: Host) -> None:
    if host.full:
        host.full -= 1
        raise ActionFailed("the disk is full")


def last(host: Host) -> str:
    return host.journal.records[-1] if host.journal is not None and host.journal.records else ""


def decide(world: World, wanted: str) -> str:
    """Journal.decide of the destination; "committed" was drafted when the pass was staged, and takes no room."""
    host = world.destination
    if wanted != "committed":
        room(host)
    if host.journal is None:
        raise ActionFailed("there is no journal")
    if host.journal.verdict is None:
        host.journal.verdict = wanted
        world.decided_boot = host.boot
        if wanted == "committed":
            world.committed_boot = host.boot
    return host.journal.verdict


Effects = dict[Action, tuple[Callable[[Any], Event | None], ...]]


class _Side:
    """Common to both: messages, and failures that the scenario orders."""

    effects: ClassVar[Effects]
    reads = ""

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process
        self.state: Any = None

    def follow(self, state: Any) -> None:
        self.state = state
        if self.world.log is not None:
            self.world.say(f"{self.process.name}: now {state.value!r}")

    def parts(self, action: Action) -> int:
        return len(self.effects[action])

    def perform(self, action: Action, part: int) -> Event | None:
        world, process = self.world, self.process
        failing, process.failing = process.failing, ""
        if action is Action.WRITE_LOST and isinstance(self, DestinationSide):
            failing = ""  # one rename
        try:
            if failing == "before" or (failing and action in _WRITES):
                self.excuse(action)
                if action is Action.UNDO:  # each part is tried whatever became of the others
                    world.say(f"{process.name}: {action.value}: part {part} is refused")
                    return None
                raise ActionFailed("the kernel refuses")
            found = self.effects[action][part](self)
            if failing and action is not Action.UNDO:
                self.excuse(action)
                raise ActionFailed("the kernel complains, having done it")
        except ActionFailed as error:
            world.say(f"{process.name}: {action.value}: {error}")
            raise
        if world.log is not None:
            world.say(f"{process.name}: {action.value}" + (f" -> {found.value}" if found is not None else ""))
        return found

    def excuse(self, action: Action) -> None:
        if action in EXCUSING:
            self.world.excuses.add(f"{action.value} failed")

    def next_event(self) -> Event:
        process = self.process
        if process.cancelled and process.watches:
            process.watches = False
            self.world.say(f"{process.name}: cancelled")
            return Event.CANCEL
        if process.timed_out:
            process.timed_out = False
            self.world.say(f"{process.name}: nothing came in time")
            return Event.TIMEOUT
        message = receive(process, self.reads)
        self.world.say(f"{process.name}: received {message}")
        event = _EVENTS.get(message)
        if event is None:
            raise LinkBroken(f"{message} out of turn")
        return event


def receive(process: Process, queue: str) -> str:
    link = process.link
    messages = getattr(link, queue) if link is not None else None
    if not messages:
        raise LinkBroken("the link ended")
    return str(messages.popleft())


class OriginSide(_Side):
    """origin.Origin. `recovered`: made by resolve, from the journal."""

    reads = "to_origin"

    def __init__(self, world: World, process: Process, connect: Callable[[Process], Link], patience: int,
                 doubt_limit: int, recovered: bool = False) -> None:
        super().__init__(world, process)
        self._connect = connect
        self._patience = patience
        self._doubt_limit = doubt_limit
        self._asked = 0
        self._recovered = recovered
        self._has_socket = not recovered or (world.o_program and world.o_socket)
        self.boot = world.destination.boot

    def _send(self, message: str) -> None:
        link = self.process.link
        if link is None or link.closed_by or (link.cut and "origin" not in link.unnoticed):
            raise LinkBroken("the link is broken")
        self.world.sent.append(message)
        if not link.cut:
            link.to_destination.append(message)

    def _write_intent(self) -> None:
        write(self.world.origin, "intent")
        if self.world.origin.journal is not None:
            self.world.origin.journal.boot = self.boot

    def _quiesce(self) -> None:
        if not self.world.o_program:
            raise ActionFailed("the program has gone")

    def _stop(self) -> None:
        self._quiesce()
        self.world.o_tracer = self.process

    def _hold(self) -> None:
        self.world.o_held = self.process

    def _probe(self) -> None:
        if not self.world.o_socket:
            raise ActionFailed("no socket")

    def _extract(self) -> None:
        if not self.world.o_socket:
            raise ActionFailed("no socket")
        self.world.dirty = False
        self.world.o_runs()

    def _send_prepare(self) -> None:
        self._send(Event.PREPARE)

    def _save_state(self) -> None:
        room(self.world.origin)
        if self.world.origin.journal is None:
            raise ActionFailed("there is no journal")
        self.world.origin.journal.state = True

    def _silence(self) -> None:
        self.world.o_silent = self.process

    def _verify(self) -> None:
        if self.world.dirty:
            raise ActionFailed("the connection moved")

    def _write_offered(self) -> None:
        if self.process.cancelled and self.process.watches:
            raise ActionFailed("it was cancelled")
        write(self.world.origin, "offered")

    def _write_let_go(self) -> None:
        write(self.world.origin, "let go")
        self.world.let_go = True

    def _fence(self) -> None:
        self.world.o_fence = True

    def _pin(self) -> None:
        if not self.world.o_program:
            raise ActionFailed("the program has gone")
        self.world.o_sigstop = True

    def _send_commit(self) -> None:
        self._send(Event.COMMIT)

    def _write_committed(self) -> None:
        write(self.world.origin, "committed")

    def _redirect(self) -> None:
        self.world.o_redirect = True
        self.world.o_held = None

    def _end(self) -> None:
        if self._has_socket:
            self.world.o_socket = False

    def _resume(self) -> None:
        world = self.world
        if self._recovered or world.o_tracer is self.process:
            world.o_tracer = None
            world.o_sigstop = False
            world.o_runs()

    def _forget_state(self) -> None:
        if self.world.origin.journal is not None:
            self.world.origin.journal.state = False

    def _tell_settled(self) -> None:
        if self.state not in (OriginState.DONE, OriginState.LOST) or self.process.link is None:
            return
        try:
            self._send(SETTLED)
        except LinkBroken:
            self.process.link = self._connect(self.process)
            self._send(SETTLED)

    def _write_done(self) -> None:
        write(self.world.origin, "done")

    def _write_lost(self) -> None:
        write(self.world.origin, "lost")

    def _take_back(self) -> None:
        """The first part of UNDO."""
        world = self.world
        if world.committed_boot == world.destination.boot and not world.forced:
            world.violated(Property.UNTOLD if world.settled else Property.TAKEN_BACK)
        world.o_fence = False
        world.o_silent = None

    def _undo_redirect(self) -> None:
        self.world.o_redirect = False

    def _release(self) -> None:
        self.world.o_held = None

    def _write_aborted(self) -> None:
        if self.world.origin.journal is not None:
            write(self.world.origin, "aborted")

    def _send_abort(self) -> None:
        if self.process.link is not None:
            self._send(Event.ABORT)

    def _reconnect(self) -> Event | None:
        self._asked += 1
        if self.state is OriginState.DOUBT and self._asked > 1 and self._asked > self._doubt_limit:
            return Event.OVERDUE
        if self._asked > self._patience:
            raise GaveUp
        if self.process.link is not None:
            self.process.link.closed_by += "origin"
            self.process.link = None
        self.process.link = self._connect(self.process)
        return Event.REBOOTED if self.world.destination.boot != self.boot else None

    def _send_query(self) -> None:
        self._send(Event.QUERY)

    def _send_activate(self) -> None:
        if self.world.origin.journal is None or not self.world.origin.journal.state:
            raise ActionFailed("there is no state")
        self._send(Event.ACTIVATE)

    effects: ClassVar[Effects] = {
        Action.WRITE_INTENT: (_write_intent,), Action.QUIESCE: (_quiesce,), Action.STOP: (_stop,),
        Action.HOLD: (_hold,), Action.PROBE: (_probe,), Action.EXTRACT: (_extract,),
        Action.SEND_PREPARE: (_send_prepare,),
        Action.SAVE_STATE: (_save_state,), Action.SILENCE: (_silence,), Action.VERIFY: (_verify,),
        Action.WRITE_OFFERED: (_write_offered,), Action.WRITE_LET_GO: (_write_let_go,), Action.FENCE: (_fence,),
        Action.PIN: (_pin,), Action.SEND_COMMIT: (_send_commit,), Action.WRITE_COMMITTED: (_write_committed,),
        Action.REDIRECT: (_redirect,), Action.END: (_end,), Action.RESUME: (_resume,),
        Action.REROUTE: (),  # only the network hears of it
        Action.FORGET: (_forget_state, _tell_settled), Action.WRITE_DONE: (_write_done,),
        Action.WRITE_LOST: (_write_lost,), Action.UNDO: (_take_back, _undo_redirect, _resume, _release),
        Action.WRITE_ABORTED: (_write_aborted,), Action.SEND_ABORT: (_send_abort,), Action.RECONNECT: (_reconnect,),
        Action.SEND_QUERY: (_send_query,), Action.SEND_ACTIVATE: (_send_activate,)}


class DestinationSide(_Side):
    """destination.Destination. `recovered`: for a later serve that is asked about the pass."""

    reads = "to_destination"

    def __init__(self, world: World, process: Process, recovered: bool = False) -> None:
        super().__init__(world, process)
        self._recovered = recovered
        self._drafted = world.destination.journal
        self._delivered = False
        self._prepared = False
        self._socket: Socket | None = None

    def next_event(self) -> Event:
        event = super().next_event()
        if event is Event.PREPARE:
            if self._prepared:
                raise LinkBroken("a state that was not made for this pass")
            self._prepared = True
        return event

    def _send(self, message: str) -> None:
        link = self.process.link
        if link is None or link.closed_by or (link.cut and "destination" not in link.unnoticed):
            raise LinkBroken("the link is broken")
        self.world.sent.append(message)
        if not link.cut:
            link.to_origin.append(message)

    def _need_program(self) -> None:
        if not self.world.d_program:
            raise ActionFailed("the program has gone")

    def _restore(self) -> None:
        if self.world.d_socket is not None:
            raise ActionFailed("there is such a connection already")
        self._socket = self.world.d_socket = Socket(self.process)

    def _graft(self) -> None:
        self._need_program()
        sock, journal = self.world.d_socket, self.world.destination.journal
        if sock is None or sock is not self._socket:
            raise ActionFailed("no socket")
        if journal is None or journal.taker != self.world.d_program_number:
            raise ActionFailed("the program that was asked has gone")
        sock.program = True
        sock.conversation = self.process

    def _write_prepared(self) -> None:
        write(self.world.destination, "prepared")

    def _send_prepared(self) -> None:
        self._send(Event.PREPARED)

    def _check_target(self) -> None:
        if not self._program_is_the_same():
            raise ActionFailed("the program has gone")

    def _program_is_the_same(self) -> bool:
        """The one that has the connection from us, over the same conversation."""
        sock = self.world.d_socket
        return sock is not None and sock is self._socket and sock.program and sock.conversation is self.process

    def _decide_committed(self) -> Event:
        if self.world.destination.journal is not self._drafted:
            raise ActionFailed("the draft is gone")
        return self._decided(decide(self.world, "committed"))

    def _decide_aborted(self) -> Event:
        if self.world.destination.journal is None:
            room(self.world.destination)
            self.world.destination.journal = Directory()
        return self._decided(decide(self.world, "aborted"))

    def _decided(self, verdict: str) -> Event:
        if verdict == "aborted":
            return Event.DECIDED_ABORTED
        journal = self.world.destination.journal
        if self._recovered and journal is not None and "active" in journal.records:
            return Event.DECIDED_ACTIVE
        return Event.DECIDED_COMMITTED

    def _send_committed(self) -> None:
        self._send(Event.COMMITTED)

    def _unfence(self) -> None:
        self.world.d_fence = False

    def _leave_repair(self) -> None:
        if self._delivered:
            return
        world, sock = self.world, self._socket
        if sock is None or sock is not world.d_socket:
            raise ActionFailed("no socket")
        if sock.alive:
            return
        if world.committed_boot != world.destination.boot:
            world.violated(Property.UNDECIDED)
        if world.dirty and not world.forced:
            world.violated(Property.STALE)
        if world.lived_and_ended:
            world.violated(Property.REPLAYED)
        sock.alive = True

    def _deliver(self) -> None:
        if self._delivered:
            return
        if not self._program_is_the_same():
            raise ActionFailed("the program has gone")
        sock = self._socket
        assert sock is not None
        self.world.d_delivered = True
        sock.serve = sock.conversation = self._socket = None

    def _write_active(self) -> None:
        write(self.world.destination, "active")

    def _write_lost(self) -> None:
        if self.world.destination.journal is None:
            raise ActionFailed("there is no journal")
        self.world.destination.journal.records.append("lost")  # a mark that was reserved: it needs no space

    def _send_active(self) -> None:
        self._send(Event.ACTIVE)

    def _discard_sockets(self) -> None:
        world, sock = self.world, self._socket
        self._socket = None
        if sock is not None and sock is world.d_socket:
            if sock.conversation is self.process:  # "abort" to the program, which closes what was not handed out
                sock.program = False
                sock.conversation = None
            sock.serve = None
            if not sock.program:
                world.d_close()

    def _remove_rules(self) -> None:
        self.world.d_fence = False

    def _remove_journal(self) -> None:
        journal = self.world.destination.journal
        if journal is not None and journal.verdict != "committed":
            self.world.destination.journal = None

    def _send_aborted(self) -> None:
        if self.world.decided_boot != self.world.destination.boot:
            self.world.violated(Property.UNDECIDED, "it says Aborted though nothing is written")
        self._send(Event.ABORTED)

    def _send_lost(self) -> None:
        self._send(Event.LOST)

    def _reclaim(self) -> None:
        world = self.world
        self._need_program()
        journal = world.destination.journal
        if journal is None or "lost" in journal.records or journal.taker != world.d_program_number:
            raise ActionFailed("the program that had the connection is not there any more")
        if world.d_delivered:
            self._delivered = True
            return
        world.d_fence = True
        sock = world.d_socket
        if sock is None or not sock.program:
            self._restore()
            self._graft()
            return
        sock.serve = sock.conversation = self.process
        self._socket = sock

    effects: ClassVar[Effects] = {
        Action.RESTORE: (_restore,), Action.GRAFT: (_graft,), Action.WRITE_PREPARED: (_write_prepared,),
        Action.SEND_PREPARED: (_send_prepared,), Action.CHECK_TARGET: (_check_target,),
        Action.DECIDE_COMMITTED: (_decide_committed,), Action.DECIDE_ABORTED: (_decide_aborted,),
        Action.DISCARD: (_discard_sockets, _remove_rules, _remove_journal), Action.UNFENCE: (_unfence,),
        Action.ACTIVATE: (_leave_repair, _deliver), Action.RECLAIM: (_reclaim,),
        Action.WRITE_ACTIVE: (_write_active,), Action.WRITE_LOST: (_write_lost,),
        Action.SEND_COMMITTED: (_send_committed,),
        Action.SEND_ACTIVE: (_send_active,), Action.SEND_ABORTED: (_send_aborted,), Action.SEND_LOST: (_send_lost,)}


#: Where the kernel refuses these, the connection may be lost for that reason alone, and the report says so.
EXCUSING = frozenset({Action.UNFENCE, Action.ACTIVATE, Action.RECLAIM, Action.UNDO, Action.END, Action.RESUME,
                      Action.DISCARD})

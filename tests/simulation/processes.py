"""The processes of a pass: what the command, the keeper, resolve, serve and release do around their machines.

Generators, as `driver.drive` is. They follow passing.py, keeper.py, settle.py and serve.py: who locks which journal,
from which state recovery begins, when a journal is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from criu_tcpcp.core.handoff import (
    BEST_EFFORT,
    DESTINATION,
    DESTINATION_FINAL,
    ORIGIN,
    ORIGIN_FINAL,
    Action,
    DestinationState,
    Event,
    Machine,
    OriginState,
)

from .actions import SETTLED, STAGE, STAGED, DestinationSide, OriginSide, decide, last, receive, room, write
from .driver import Seen, drive
from .world import ActionFailed, Directory, Host, Link, LinkBroken, Process, Wait, World

#: As journal.UNSETTLED.
UNSETTLED = ("offered", "let go", "committed")
Main = Generator[Any, None, None]


@dataclass
class Taken:
    """The transitions that were taken, of both tables (whose states are equal where their names are)."""

    origin: Seen = field(default_factory=set)
    destination: Seen = field(default_factory=set)


@dataclass
class Rules:
    """What is simulated: the project's own tables, or wrong ones. `lock`: a question waits for the serve that works on
    the pass. `patience`: how often
    a keeper asks before it leaves the pass in doubt; `doubt_limit`: how often before the program is let go."""

    origin: dict[Any, Any] = field(default_factory=lambda: ORIGIN)
    destination: dict[Any, Any] = field(default_factory=lambda: DESTINATION)
    lock: bool = True
    patience: int = 3
    doubt_limit: int = 99
    best_effort: frozenset[Action] = BEST_EFFORT


class Processes:
    """Makes them; `connect` gives a link to a new serve."""

    def __init__(self, world: World, rules: Rules, seen: Taken,
                 connect: Callable[[Process], Link]) -> None:
        self.world = world
        self.rules = rules
        self._seen = seen
        self._connect = connect

    @staticmethod
    def _lock(host: Host, process: Process, waits: bool = True) -> Directory | None:
        """The journal, locked by this process; None where there is none, or another has it."""
        journal = host.journal
        if journal is None or (journal.lock is not None and waits):
            return None
        journal.lock = process
        return journal

    @staticmethod
    def _unlock(journal: Directory | None, process: Process) -> None:
        if journal is not None and journal.lock is process:
            journal.lock = None

    # -- origin --------------------------------------------------------------------------------------------------------

    def command(self, process: Process, keeper: Process) -> Main:
        """passing._run."""
        yield Wait.KEEPER
        if keeper.reported:
            return
        if last(self.world.origin) in UNSETTLED:
            yield from self.resolve(process, False)
        elif last(self.world.origin) not in ("done", "lost"):
            self.world.origin.journal = None

    def keeper(self, process: Process) -> Main:
        world = self.world
        host = world.origin
        try:
            process.link = self._connect(process)
            host.journal = journal = Directory()
            journal.lock = process
            write(host, "claimed")
            side = OriginSide(world, process, self._connect, self.rules.patience, self.rules.doubt_limit)
            yield None
            process.link.to_destination.append(STAGE)
            yield Wait.FOREVER
            if receive(process, "to_origin") != STAGED:
                raise LinkBroken("it was refused")
        except ActionFailed:
            host.journal = None
            process.reported = True
            return
        process.watches = True
        machine = Machine(self.rules.origin, OriginState.READY)
        state = yield from drive(machine, side, ORIGIN_FINAL, Event.START, self._seen.origin,
                                 self.rules.best_effort)
        self._unlock(journal, process)
        yield None
        if state in (OriginState.READY, OriginState.ROLLED_BACK):
            host.journal = None
        process.reported = True

    def resolve(self, process: Process, forced: bool) -> Main:
        """settle.resolve."""
        host = self.world.origin
        journal = self._lock(host, process)
        if journal is None:
            return
        stage = last(host)
        if stage in UNSETTLED and not (stage == "committed" and forced):
            yield None
            if stage == "committed":
                state, event = OriginState.COMMITTED, Event.RECOVER
            elif stage == "let go":
                state, event = OriginState.LET_GO, Event.FORCED if forced else Event.RECOVER
            else:
                state, event = OriginState.DOUBT, Event.FORCED if forced else Event.TIMEOUT
            if forced:
                self.world.forced = True
            side = OriginSide(self.world, process, self._connect, self.rules.patience, self.rules.doubt_limit, True)
            side.boot = journal.boot
            machine = Machine(self.rules.origin, state)
            reached = yield from drive(machine, side, ORIGIN_FINAL, event, self._seen.origin, self.rules.best_effort)
            if reached is OriginState.ROLLED_BACK:
                host.journal = None
        self._unlock(journal, process)

    def release_origin(self, process: Process) -> Main:
        """settle.release of the one pass, at the origin."""
        world = self.world
        yield None
        journal = world.origin.journal
        lingers = world.o_fence and world.o_socket and not world.o_program
        if journal is None or journal.lock is not None or last(world.origin) in UNSETTLED or lingers:
            return
        if not world.o_socket:
            world.o_fence = world.o_redirect = False
        world.origin.journal = None

    # -- destination ---------------------------------------------------------------------------------------------------

    def _sweep(self, process: Process) -> Main:
        """settle.sweep_host: what a serve that was killed before its decision has left."""
        world = self.world
        journal = self._lock(world.destination, process)
        if journal is None:
            return
        if journal.verdict != "committed":
            yield None
            try:
                decide(world, "aborted")
                yield None
                world.d_fence = False
                world.destination.journal = None
                world.say(f"{process.name}: swept")
            except ActionFailed:
                pass
        self._unlock(journal, process)

    def release_destination(self, process: Process) -> Main:
        """settle.release of the one pass, at the destination."""
        world = self.world
        yield None
        journal = world.destination.journal
        if journal is not None and journal.lock is None and world.d_socket is None \
                and (journal.verdict != "committed" or "settled" in journal.records):
            world.destination.journal = None
            world.d_fence = False
        yield from self._sweep(process)

    def serve(self, process: Process) -> Main:
        yield None
        yield from self._sweep(process)
        while True:
            yield Wait.FOREVER
            message = receive(process, "to_destination")
            self.world.say(f"{process.name}: received {message}")
            if message == STAGE:
                yield from self._pass(process)
            elif message == Event.QUERY:
                yield from self._answer(process)
            elif message == SETTLED:
                if self.world.destination.journal is not None:
                    write(self.world.destination, "settled")
                    self.world.settled = True
            elif message != Event.ABORT:
                raise LinkBroken(f"{message} out of turn")

    def _say(self, process: Process, message: str) -> None:
        if process.link is not None:
            process.link.to_origin.append(message)

    def _pass(self, process: Process) -> Main:
        world = self.world
        host = world.destination
        if host.journal is not None or world.d_socket is not None:
            self._say(process, "Refused")
            return
        host.journal = journal = Directory()
        journal.lock = process
        try:
            write(host, "claimed")
            yield None
            write(host, "staged")
            journal.taker = world.d_program_number
            room(host)  # for the draft of the verdict
        except ActionFailed:
            host.journal = None
            self._say(process, "Refused")
            return
        world.d_fence = True
        side = DestinationSide(world, process)
        self._say(process, STAGED)
        machine = Machine(self.rules.destination, DestinationState.READY)
        yield from drive(machine, side, DESTINATION_FINAL, None, self._seen.destination,
                         self.rules.best_effort)
        world.serve_lets_go(process)
        self._unlock(journal, process)

    def _answer(self, process: Process) -> Main:
        world = self.world
        host = world.destination
        locked = None
        while host.journal is not None:
            locked = self._lock(host, process, self.rules.lock)
            if locked is not None:
                break
            yield Wait.LOCK
            if process.timed_out:
                process.timed_out = False
                return
        if host.journal is None or "staged" not in host.journal.records:
            if host.journal is None:
                host.journal = Directory()
            yield None
            if decide(world, "aborted") != "aborted":
                raise ActionFailed("the journal says committed, and not of what")
            host.journal = None
            self._say(process, Event.ABORTED)
        else:
            side = DestinationSide(world, process, recovered=True)
            machine = Machine(self.rules.destination, DestinationState.READY)
            yield from drive(machine, side, DESTINATION_FINAL, Event.QUERY, self._seen.destination,
                         self.rules.best_effort)
            world.serve_lets_go(process)
        self._unlock(locked, process)

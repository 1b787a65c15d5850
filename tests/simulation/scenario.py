"""One pass from a seed: which faults come when, whose turn it is, and what must be true when all is over.

A fault strikes just before or just after an action of one side, or at some step. Time has no length: whoever waits is
told that it is over when nothing else can happen, or by a fault. Then the faults end, `resolve` and `release` run as an
operator would run them, and the pass must come to its end.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from criu_tcpcp.core.handoff import Action, Event, IllegalEvent

from .actions import DestinationSide, OriginSide, last
from .processes import UNSETTLED, Main, Processes, Rules, Taken
from .world import ActionFailed, Link, LinkBroken, Process, Property, Violation, Wait, World

_STEPS = 3000  # of one stage of a pass; none takes a tenth of that
_OTHER = {"origin": "destination", "destination": "origin"}


@dataclass
class Result:
    """`owner`: origin, destination, or nobody (then `excuses` says why). `faults`: those that struck."""

    owner: str
    steps: int
    faults: list[str]
    excuses: set[str]
    world: World = field(repr=False)


def simulate(seed: int, rules: Rules | None = None, taken: Taken | None = None,
             only: Property | None = None, log: list[str] | None = None) -> Result:
    """Raises Violation. `only`: the one property that is looked at. `taken` gets the transitions, `log` the
    trace."""
    return Scenario(seed, rules or Rules(), taken or Taken(), only, log).run()


class Scenario:
    """The processes that are alive, and the dice."""

    def __init__(self, seed: int, rules: Rules, taken: Taken, only: Property | None,
                 log: list[str] | None) -> None:
        self.random = random.Random(seed)
        self.world = World()
        self.world.log = log
        if only is not None:
            self.world.ignored = frozenset(Property) - {only}
        dice = self.random.random
        self.rules = replace(rules, patience=2 + int(dice() * 3), doubt_limit=99 if dice() < 0.6 else 2)
        self.make = Processes(self.world, self.rules, taken, self._connect)
        self.processes: list[Process] = []
        self.serves = 0
        self.steps = 0
        self.faults: list[str] = []
        self.by_action: dict[tuple[str, Any, bool], str] = {}
        self.by_step: dict[int, str] = {}
        if dice() < 0.2:  # a long doubt: nobody answers the commit
            self.by_action["origin", Action.SEND_COMMIT, True] = "link cut" if dice() < 0.5 else "crash of all there"
            self.by_action["origin", Action.RECONNECT, False] = "destination out of reach"
            self.rules.patience += int(dice() * 4)
            if dice() < 0.1:  # and the letting go is interrupted
                action = _LETTING_GO[int(dice() * len(_LETTING_GO))]
                self.by_action["origin", action, True] = "crash of all at the origin"
        for _ in range(_HOW_MANY[int(dice() * len(_HOW_MANY))]):
            fault = _FAULTS[int(dice() * len(_FAULTS))]
            if dice() < 0.2:
                self.by_step[int(dice() * 80)] = fault
            else:
                role, action = _ACTIONS[int(dice() * len(_ACTIONS))]
                self.by_action[role, action, dice() < 0.5] = fault

    # -- processes -----------------------------------------------------------------------------------------------------

    def _start(self, process: Process, main: Main) -> None:
        process.main = main
        self.processes.append(process)

    def _connect(self, process: Process) -> Link:
        host = self.world.destination
        if host.unreachable:
            host.unreachable -= 1
            raise LinkBroken("the destination cannot be reached")
        self.serves += 1
        serve = Process(f"serve {self.serves}", "destination")
        link = serve.link = Link()
        self._start(serve, self.make.serve(serve))
        return link

    def _begin_resolve(self, forced: bool = False) -> None:
        process = Process("resolve --force-origin" if forced else "resolve", "origin")
        self._start(process, self.make.resolve(process, forced))

    def kill(self, process: Process) -> None:
        if process.alive:
            self.world.say(f"{process.name} is killed")
            if process in self.processes:
                self.processes.remove(process)
            self.world.ended(process)

    def _ready(self, process: Process) -> bool:
        todo = process.todo
        if todo.__class__ is not Wait or process.timed_out:
            return True
        if todo is Wait.LOCK:
            journal = self.world.destination.journal
            return journal is None or journal.lock is None
        if todo is Wait.KEEPER:
            return not self.keeper.alive
        link = process.link
        if link is None or (process.cancelled and process.watches):
            return True
        role = process.role
        if not link.stalled and (link.to_origin if role == "origin" else link.to_destination):
            return True
        return _OTHER[role] in link.closed_by or (link.cut and role not in link.unnoticed)

    def _advance(self, process: Process) -> None:
        todo = process.todo
        triggers = self.by_action
        role = process.role
        if triggers and (role, todo, False) in triggers:
            self._strike(triggers.pop((role, todo, False)), process)
            if not process.alive:
                return
        process.todo = None
        try:
            process.todo = next(process.main)  # type: ignore[arg-type]
        except (StopIteration, ActionFailed) as end:
            self.world.say(f"{process.name} ends{'' if isinstance(end, StopIteration) else f' ({end})'}")
            self.processes.remove(process)
            self.world.ended(process)
            return
        except IllegalEvent as error:
            raise Violation(Property.ILLEGAL, str(error)) from None
        self.world.check()
        if triggers and (role, todo, True) in triggers:
            self._strike(triggers.pop((role, todo, True)), process)

    def _idle(self) -> bool:
        """Nothing can happen but by the passing of time. False where not even that helps."""
        dice = self.random.random
        stalled = [one.link for one in self.processes if one.link is not None and one.link.stalled]
        if stalled and dice() < 0.5:
            stalled[0].stalled = False
            return True
        waiting = [one for one in self.processes if one.todo in (Wait.MESSAGE, Wait.LOCK)]
        if waiting:
            waiting[int(dice() * len(waiting))].timed_out = True
            return True
        for process in self.processes:
            link = process.link
            if link is not None and (link.unnoticed or link.stalled):
                link.unnoticed, link.stalled = "", False
                return True
        return False

    def _run(self) -> None:
        dice, processes = self.random.random, self.processes
        for _ in range(_STEPS):
            self.steps += 1
            if self.by_step and self.steps in self.by_step:
                self._strike(self.by_step.pop(self.steps), None)
            ready = [one for one in processes if self._ready(one)]
            if ready:
                self._advance(ready[int(dice() * len(ready))])
            elif not self._idle():
                if not processes:
                    return
                raise Violation(Property.UNSETTLED, f"{processes[0].name} waits for ever")
        self.world.violated(Property.UNSETTLED, "too many steps")

    # -- faults --------------------------------------------------------------------------------------------------------

    def _strike(self, fault: str, process: Process | None) -> None:
        """`process`: the one whose action it comes with."""
        world = self.world
        self.faults.append(fault)
        world.say(f"fault: {fault}" + (f", at {process.name}" if process is not None else ""))
        _EFFECTS[fault](self, process if process is not None else self._any())
        world.check()

    def _any(self, role: str = "") -> Process | None:
        found = [one for one in self.processes if not role or one.role == role]
        return found[int(self.random.random() * len(found))] if found else None

    def _crash(self, process: Process | None) -> None:
        if process is not None:
            self.kill(process)

    def _crash_destination(self, _process: Process | None) -> None:
        for one in [one for one in self.processes if one.role == "destination"]:
            self.kill(one)

    def _crash_other(self, process: Process | None) -> None:
        if process is not None:
            self._crash(self._any(_OTHER[process.role]))

    def _crash_origin(self, _process: Process | None) -> None:
        """The command, the keeper, a resolve: everything of ours there."""
        for one in [one for one in self.processes if one.role == "origin"]:
            self._kill_instructing(one)

    def _kill_instructing(self, process: Process) -> None:
        self.kill(process)
        if process is self.command:
            self.keeper.cancelled = True

    def _crash_command(self, _process: Process | None) -> None:
        self._kill_instructing(self.command)

    def _cancel(self, _process: Process | None) -> None:
        self.keeper.cancelled = True

    def _fail_before(self, process: Process | None) -> None:
        if process is not None:
            process.failing = "before"

    def _fail_after(self, process: Process | None) -> None:
        if process is not None:
            process.failing = "after"

    def _cut(self, process: Process | None) -> None:
        """Of what is on its way, the end is lost; each side notices now or later."""
        link, dice = (process.link if process is not None else None), self.random.random
        if link is None or link.cut:
            return
        link.cut = True
        for queue in (link.to_origin, link.to_destination):
            while queue and dice() < 0.6:
                queue.pop()
        link.unnoticed = " ".join(role for role in _OTHER if dice() < 0.5)

    def _stall(self, process: Process | None) -> None:
        if process is not None and process.link is not None:
            process.link.stalled = True

    def _duplicate(self, process: Process | None) -> None:
        """Something that was said in this session, or in an older one, comes (again) in this one."""
        link, sent = (process.link if process is not None else None), self.world.sent
        if link is None or not sent:
            return
        message = sent[int(self.random.random() * len(sent))]
        (link.to_destination if message in _SAID_BY_ORIGIN else link.to_origin).append(message)

    def _time_out(self, process: Process | None) -> None:
        waiting = [one for one in self.processes if one.todo in (Wait.MESSAGE, Wait.LOCK)]
        if waiting:
            waiting[int(self.random.random() * len(waiting))].timed_out = True

    def _origin_program_dies(self, _process: Process | None) -> None:
        self.world.o_program_dies("the origin's program died")

    def _destination_program_dies(self, _process: Process | None) -> None:
        self.world.d_program_dies()

    def _destination_program_restarts(self, _process: Process | None) -> None:
        self.world.d_program_dies()
        self.world.d_program = True

    def _reboot(self, role: str) -> None:
        for one in [one for one in self.processes if one.role == role]:
            if one.link is not None:
                self._cut(one)
            self.kill(one)
        if role == "origin":
            self.world.origin_reboots()
        else:
            self.world.destination_reboots()

    def _reboot_origin(self, _process: Process | None) -> None:
        self._reboot("origin")

    def _reboot_destination(self, _process: Process | None) -> None:
        self._reboot("destination")

    def _fill_origin(self, _process: Process | None) -> None:
        self.world.origin.full = 1 + int(self.random.random() * 4)

    def _fill_destination(self, _process: Process | None) -> None:
        self.world.destination.full = 1 + int(self.random.random() * 4)

    def _unreachable(self, _process: Process | None) -> None:
        self.world.destination.unreachable = 1 + int(self.random.random() * 5)

    def _resolve(self, _process: Process | None) -> None:
        self._begin_resolve()

    def _resolve_twice(self, _process: Process | None) -> None:
        self._begin_resolve()
        self._begin_resolve()

    def _force(self, _process: Process | None) -> None:
        self._begin_resolve(forced=True)

    def _release(self, _process: Process | None) -> None:
        for role, main in (("origin", self.make.release_origin), ("destination", self.make.release_destination)):
            process = Process(f"release at the {role}", role)
            self._start(process, main(process))

    # -- a whole pass --------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        self.keeper = Process("keeper", "origin")
        self.command = Process("command", "origin")
        self._start(self.keeper, self.make.keeper(self.keeper))
        self._start(self.command, self.make.command(self.command, self.keeper))
        self._run()
        self._settle()
        owner = self._judge()
        return Result(owner, self.steps, self.faults, self.world.excuses, self.world)

    def _settle(self) -> None:
        """The faults are over; an operator does what the reports say."""
        world = self.world
        world.say("the faults are over")
        self.by_action.clear()
        self.by_step.clear()
        world.origin.full = world.destination.full = world.destination.unreachable = 0
        world.d_program = True
        self.rules.patience = 6
        if self.random.random() < 0.06 and world.d_delivered:
            world.say("the connection ends at the destination, and is released")
            world.excuses.add("the destination's program died")
            world.d_close()
            self._release(None)
            self._run()
        if last(world.origin) in UNSETTLED and self.random.random() < 0.06:
            self._begin_resolve(forced=True)
            self._run()
        if last(world.origin) in UNSETTLED:
            self._begin_resolve()
            self._run()
        journal = world.origin.journal
        if journal is not None and last(world.origin) in UNSETTLED:
            if not journal.state:
                world.violated(Property.FORGOTTEN)
            world.violated(Property.UNSETTLED, f"the origin's journal says {last(world.origin)!r}")
        self._release(None)
        self._run()

    def _judge(self) -> str:
        world = self.world
        stopped = world.o_stopped and not world.excuses & {"resume failed", "undo failed"}
        if stopped or world.o_held or world.o_silent:
            world.violated(Property.STOPPED)
        for host in (world.origin, world.destination):
            if host.journal is not None and (host.journal.state or host.journal.lock is not None):
                world.violated(Property.LEFT, "a state, or a lock")
        journal, sock = world.destination.journal, world.d_socket
        if journal is not None and journal.verdict != "committed":
            world.violated(Property.LEFT, "a pass without a decision")
        if sock is not None and not sock.alive:
            world.violated(Property.LEFT, "a dormant connection")
        here = world.o_program and world.o_socket and not world.o_fence
        there = world.d_speaks and world.d_delivered
        if here and there:
            if not world.forced:
                world.violated(Property.TWO_OWNERS, "at the end")
            return "both"
        owner, accepted = (there, _LOST_AFTER_COMMIT) if world.committed_boot else (here, _LOST_BEFORE)
        if world.let_go and not world.committed_boot:  # what the destination does not have is lost then
            owner = True
        if not owner and not world.forced and not world.excuses & accepted:
            world.violated(Property.LOST)
        return "origin" if here else "destination" if there else "nobody"


#: What may cost the connection. The protocol says Lost, or the report says what could not be undone.
_LOST_BEFORE = {"the origin rebooted", "the origin's program died", "undo failed",
                "the origin rebooted before the destination had it"}
_LOST_AFTER_COMMIT = {"the destination rebooted after the commit", "the destination's program died",
                      "the origin rebooted before the destination had it", "unfence failed", "activate failed",
                      "reclaim failed"}
_HOW_MANY = (0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6)
_LETTING_GO = (Action.WRITE_LET_GO, Action.END)
_SAID_BY_ORIGIN = frozenset({Event.PREPARE, Event.COMMIT, Event.ABORT, Event.QUERY, Event.ACTIVATE, "Settled"})
_ACTIONS: list[tuple[str, Action]] = [(side, action) for side, effects in (("origin", OriginSide.effects),
                                                                             ("destination", DestinationSide.effects))
                                      for action, parts in effects.items() if parts]
_EFFECTS: dict[str, Callable[[Scenario, Process | None], None]] = {
    "crash": Scenario._crash,
    "crash of the other side": Scenario._crash_other,
    "crash of all at the origin": Scenario._crash_origin,
    "crash of all there": Scenario._crash_destination,
    "crash of the command": Scenario._crash_command,
    "cancel": Scenario._cancel,
    "failure": Scenario._fail_before,
    "failure after it took effect": Scenario._fail_after,
    "link cut": Scenario._cut,
    "link stalled": Scenario._stall,
    "message repeated": Scenario._duplicate,
    "time over": Scenario._time_out,
    "origin program dies": Scenario._origin_program_dies,
    "destination program dies": Scenario._destination_program_dies,
    "destination program restarts": Scenario._destination_program_restarts,
    "origin reboots": Scenario._reboot_origin,
    "destination reboots": Scenario._reboot_destination,
    "disk full at the origin": Scenario._fill_origin,
    "disk full at the destination": Scenario._fill_destination,
    "destination out of reach": Scenario._unreachable,
    "resolve": Scenario._resolve,
    "resolve twice": Scenario._resolve_twice,
    "resolve --force-origin": Scenario._force,
    "release": Scenario._release,
}
_OFTEN = {"crash": 5, "crash of the other side": 3, "crash of all at the origin": 3, "failure": 3, "link cut": 5,
          "link stalled": 2, "time over": 3, "destination out of reach": 3, "disk full at the origin": 2,
          "disk full at the destination": 2, "message repeated": 2, "resolve": 2}
_FAULTS: list[str] = [fault for fault in _EFFECTS for _ in range(_OFTEN.get(fault, 1))]

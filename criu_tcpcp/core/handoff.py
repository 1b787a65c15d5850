"""The handoff: who owns the connection at every instant, as two state machines without I/O.

A machine is a table: (state, event) -> (next state, actions). The executor does the actions in their order and feeds
back what happened: `DONE` when all are done, `FAILED` at the first that fails. A pair that is not in the table raises
and changes nothing. Events are messages of the other side, the outcome of actions, and the outer world (the link, the
clock, the operator); both tables can be printed, simulated and model-checked as they stand.

Rules that the tables keep:
  * The commit point is the destination's decision: the first of COMMITTED and ABORTED that is written wins.
  * Before OFFERED the origin may undo for any reason; from OFFERED on only a written ABORTED (or a destination that has
    rebooted since, or an operator's order) gives the connection back to it. Never a timer.
  * Nothing of the origin's leaves any more before its state is read (SILENCE), since its timers still send, and what
    they send must not be unsent in the state; nothing is under way before the offer is written (VERIFY: while the
    destination is at work); the offer is written before
    anything is made that outlives the keeper (FENCE, PIN); Commit is sent last. So up to the offer the kernel alone
    undoes everything; from there on the journal says that the destination must be asked, whatever was made by then.
  * The destination can hear and speak before it says Committed: what the origin then releases must not be dropped.
  * The destination leaves repair only after COMMITTED is written; it says Aborted only after ABORTED is written.
  * The origin forgets the state only on Active, or when the connection is lost, and when that is written.
  * What lived at the destination and ended there is not made again: the loss is written before it is said.
  * Doubt costs one connection, not the server: when it lasts, the origin process runs again with that descriptor dead
    (OVERDUE). That is written first; from then on the connection lives at the destination, or nowhere.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Generic, TypeVar

from .errors import Owner


class Event(enum.StrEnum):
    """What a machine can be told."""

    START = "start"
    DONE = "done"  # every action of the last transition
    FAILED = "failed"  # one of them; those behind it were not done
    CANCEL = "cancel"  # the operator, or the command is gone
    LINK_LOST = "link lost"
    TIMEOUT = "timeout"
    REBOOTED = "rebooted"  # the destination is another boot than the one that was offered to
    FORCED = "forced"  # resolve --force-origin
    RECOVER = "recover"  # from a journal that says committed, or let go
    OVERDUE = "overdue"  # the origin process has stood still long enough
    # messages
    PREPARE = "Prepare"
    PREPARED = "Prepared"
    COMMIT = "Commit"
    COMMITTED = "Committed"
    ACTIVE = "Active"
    ABORT = "Abort"
    ABORTED = "Aborted"
    QUERY = "Query"
    ACTIVATE = "Activate"
    LOST = "Lost"
    # what the destination's journal holds once a decision is written
    DECIDED_COMMITTED = "decided committed"
    DECIDED_ACTIVE = "decided committed, and active"
    DECIDED_ABORTED = "decided aborted"


class Action(enum.StrEnum):
    """What a side can be asked to do. BEST_EFFORT below: those whose failure does not change the outcome."""

    # origin
    WRITE_INTENT = "write intent"
    QUIESCE = "quiesce"
    STOP = "stop"
    HOLD = "hold"
    PROBE = "probe"
    EXTRACT = "extract"
    SEND_PREPARE = "send prepare"
    SILENCE = "silence"
    FENCE = "fence"
    VERIFY = "verify"
    PIN = "pin"
    SAVE_STATE = "save state"
    WRITE_OFFERED = "write offered"
    WRITE_LET_GO = "write let go"
    SEND_COMMIT = "send commit"
    WRITE_COMMITTED = "write committed"
    REDIRECT = "redirect"
    END = "end"
    RESUME = "resume"
    FORGET = "forget"
    REROUTE = "reroute"
    WRITE_DONE = "write done"
    WRITE_ABORTED = "write aborted"
    WRITE_LOST = "write lost"
    UNDO = "undo"
    SEND_ABORT = "send abort"
    RECONNECT = "reconnect"
    SEND_QUERY = "send query"
    SEND_ACTIVATE = "send activate"
    # destination
    RESTORE = "restore"
    GRAFT = "graft"
    WRITE_PREPARED = "write prepared"
    SEND_PREPARED = "send prepared"
    CHECK_TARGET = "check target"
    DECIDE_COMMITTED = "decide committed"
    DECIDE_ABORTED = "decide aborted"
    DISCARD = "discard"
    UNFENCE = "unfence"
    ACTIVATE = "activate"
    RECLAIM = "reclaim"
    WRITE_ACTIVE = "write active"
    SEND_COMMITTED = "send committed"
    SEND_ACTIVE = "send active"
    SEND_ABORTED = "send aborted"
    SEND_LOST = "send lost"


#: A failure of these is noted and the rest goes on: either the outcome is decided already and written elsewhere, or the
#: kernel keeps it. (A journal that cannot be written after the commit point still says "offered": it is asked again.)
BEST_EFFORT = frozenset({
    Action.WRITE_COMMITTED, Action.WRITE_ABORTED, Action.WRITE_ACTIVE,
    Action.FORGET, Action.SEND_ABORT, Action.SEND_ABORTED, Action.SEND_ACTIVE, Action.SEND_LOST, Action.SEND_COMMITTED,
    Action.REDIRECT, Action.REROUTE, Action.END, Action.RESUME, Action.UNDO, Action.DISCARD})

#: Of these, what nobody else will do if this process does not, and what may be done again: tried once more before it is
#: noted. Packets that are not led on, for one, leave a committed connection deaf.
TRIED_TWICE = frozenset({Action.REDIRECT, Action.END, Action.RESUME, Action.UNDO, Action.DISCARD})


class OriginState(enum.StrEnum):
    READY = "ready"
    PREPARING = "preparing"
    PREPARED = "waiting for prepared"
    OFFERING = "offering"
    OFFERED = "offered"
    DOUBT = "in doubt"
    LETTING_GO = "in doubt, letting the process go"
    LET_GO = "in doubt, the process let go"
    COMMITTED = "committed"
    UNCONFIRMED = "committed, unconfirmed"
    DONE = "done"
    ROLLED_BACK = "rolled back"
    LOST = "lost"


class DestinationState(enum.StrEnum):
    READY = "ready"
    PREPARING = "preparing"
    PREPARED = "prepared"
    CHECKING = "checking"
    DECIDING = "deciding"
    COMMITTED = "committed"
    RETRYING = "committed, activation tried again"
    ACTIVE = "active"
    ABORTED = "aborted"
    LOST = "lost"
    ASKED = "asked"
    INTERRUPTED = "committed, activation interrupted"
    LEFT = "committed, left to a later serve"


State = TypeVar("State", bound=OriginState | DestinationState)


@dataclass(frozen=True)
class Transition(Generic[State]):
    state: State
    actions: tuple[Action, ...] = ()


_O, _D, _E, _A = OriginState, DestinationState, Event, Action
_OriginTable = dict[tuple[OriginState, Event], Transition[OriginState]]
_DestinationTable = dict[tuple[DestinationState, Event], Transition[DestinationState]]


def _origin_table() -> _OriginTable:
    undone = Transition(_O.ROLLED_BACK, (_A.UNDO, _A.WRITE_ABORTED, _A.SEND_ABORT, _A.FORGET))
    given_back = Transition(_O.ROLLED_BACK, (_A.UNDO, _A.WRITE_ABORTED, _A.FORGET))
    ask = (_A.RECONNECT, _A.SEND_QUERY)
    take_leave = (_A.WRITE_COMMITTED, _A.REDIRECT, _A.END, _A.RESUME)
    let_go = (_A.END, _A.RESUME)
    # What takes the network time has it now, when the peer is served; before the end is written, so that `resolve` does
    # it where the keeper could not.
    done = (_A.REROUTE, _A.WRITE_DONE, _A.FORGET)
    lost = Transition(_O.LOST, (_A.WRITE_LOST, _A.FORGET))
    table: _OriginTable = {
        (_O.READY, _E.START): Transition(_O.PREPARING, (_A.WRITE_INTENT, _A.QUIESCE, _A.STOP, _A.HOLD, _A.PROBE,
                                                        _A.SILENCE, _A.EXTRACT, _A.SEND_PREPARE, _A.SAVE_STATE,
                                                        _A.VERIFY)),
        (_O.PREPARING, _E.DONE): Transition(_O.PREPARED),
        (_O.PREPARED, _E.PREPARED): Transition(_O.OFFERING, (_A.WRITE_OFFERED,)),
        # From here on rollback needs the destination's word.
        (_O.OFFERING, _E.DONE): Transition(_O.OFFERED, (_A.FENCE, _A.PIN, _A.SEND_COMMIT)),
        (_O.OFFERED, _E.DONE): Transition(_O.OFFERED),
        (_O.OFFERED, _E.COMMITTED): Transition(_O.COMMITTED, take_leave),
        (_O.OFFERED, _E.ACTIVE): Transition(_O.DONE, (*take_leave, *done)),  # what said Committed failed there at first
        (_O.OFFERED, _E.ABORTED): given_back,
        (_O.COMMITTED, _E.DONE): Transition(_O.COMMITTED),
        (_O.COMMITTED, _E.ACTIVE): Transition(_O.DONE, done),
        (_O.COMMITTED, _E.LOST): lost,
        # What was committed cannot come back. How far the leave-taking came is not known; all of it can be repeated.
        (_O.COMMITTED, _E.RECOVER): Transition(_O.UNCONFIRMED, (*take_leave, *ask)),
        (_O.DOUBT, _E.DONE): Transition(_O.DOUBT),
        (_O.DOUBT, _E.ABORTED): given_back,
        (_O.DOUBT, _E.REBOOTED): given_back,
        (_O.DOUBT, _E.FORCED): given_back,
        (_O.DOUBT, _E.COMMITTED): Transition(_O.UNCONFIRMED, (*take_leave, _A.SEND_ACTIVATE)),
        (_O.DOUBT, _E.ACTIVE): Transition(_O.DONE, (*take_leave, *done)),
        (_O.DOUBT, _E.LOST): Transition(_O.LOST, (*take_leave, _A.WRITE_LOST, _A.FORGET)),
        (_O.DOUBT, _E.OVERDUE): Transition(_O.LETTING_GO, (_A.FENCE, _A.WRITE_LET_GO, *let_go)),
        (_O.LETTING_GO, _E.DONE): Transition(_O.LET_GO, ask),
        (_O.LETTING_GO, _E.FAILED): Transition(_O.DOUBT, ask),  # nothing was ended
        # From here on nothing can be given back: what the destination does not have is lost.
        (_O.LET_GO, _E.DONE): Transition(_O.LET_GO),
        (_O.LET_GO, _E.RECOVER): Transition(_O.LET_GO, (*let_go, *ask)),
        (_O.LET_GO, _E.COMMITTED): Transition(_O.UNCONFIRMED, (*take_leave, _A.SEND_ACTIVATE)),
        (_O.LET_GO, _E.ACTIVE): Transition(_O.DONE, (*take_leave, *done)),
        (_O.LET_GO, _E.ABORTED): lost,
        (_O.LET_GO, _E.REBOOTED): lost,
        (_O.LET_GO, _E.FORCED): Transition(_O.LOST, (*let_go, _A.WRITE_LOST, _A.FORGET)),
        (_O.LET_GO, _E.LOST): lost,
        (_O.UNCONFIRMED, _E.DONE): Transition(_O.UNCONFIRMED),
        (_O.UNCONFIRMED, _E.COMMITTED): Transition(_O.UNCONFIRMED, (_A.SEND_ACTIVATE,)),
        (_O.UNCONFIRMED, _E.ACTIVE): Transition(_O.DONE, done),
        (_O.UNCONFIRMED, _E.LOST): lost,
        (_O.UNCONFIRMED, _E.REBOOTED): lost,
        (_O.UNCONFIRMED, _E.ABORTED): Transition(_O.DONE, done),  # released by force there
        (_O.DONE, _E.DONE): Transition(_O.DONE),
        (_O.DONE, _E.FAILED): Transition(_O.DONE),  # not written, so nothing is forgotten: it can be asked again
        (_O.ROLLED_BACK, _E.DONE): Transition(_O.ROLLED_BACK),
        (_O.LOST, _E.DONE): Transition(_O.LOST),
        (_O.LOST, _E.FAILED): Transition(_O.LOST),
    }
    for state in (_O.READY, _O.PREPARING, _O.PREPARED, _O.OFFERING):
        for event in (_E.FAILED, _E.CANCEL, _E.LINK_LOST, _E.TIMEOUT, _E.ABORTED):
            table[state, event] = undone
    for event in (_E.FAILED, _E.LINK_LOST, _E.TIMEOUT):
        table[_O.OFFERED, event] = Transition(_O.DOUBT, ask)
        table[_O.DOUBT, event] = Transition(_O.DOUBT, ask)
        table[_O.LET_GO, event] = Transition(_O.LET_GO, ask)
        table[_O.COMMITTED, event] = Transition(_O.UNCONFIRMED, ask)
        table[_O.UNCONFIRMED, event] = Transition(_O.UNCONFIRMED, ask)
    for state in (_O.OFFERED, _O.DOUBT, _O.LET_GO, _O.COMMITTED, _O.UNCONFIRMED):
        table[state, _E.CANCEL] = Transition(state)  # too late: only the destination's word counts
    return table


def _destination_table() -> _DestinationTable:
    refuse = Transition(_D.DECIDING, (_A.DECIDE_ABORTED,))
    activate = (_A.ACTIVATE, _A.WRITE_ACTIVE)
    table: _DestinationTable = {
        (_D.READY, _E.PREPARE): Transition(_D.PREPARING, (_A.RESTORE, _A.GRAFT, _A.WRITE_PREPARED)),
        (_D.READY, _E.ABORT): refuse,
        (_D.READY, _E.QUERY): Transition(_D.ASKED, (_A.DECIDE_ABORTED,)),
        (_D.READY, _E.LINK_LOST): Transition(_D.ABORTED, (_A.DISCARD,)),
        (_D.READY, _E.TIMEOUT): Transition(_D.ABORTED, (_A.DISCARD,)),
        (_D.PREPARING, _E.DONE): Transition(_D.PREPARED, (_A.SEND_PREPARED,)),
        (_D.PREPARING, _E.FAILED): refuse,
        (_D.PREPARED, _E.DONE): Transition(_D.PREPARED),
        (_D.PREPARED, _E.COMMIT): Transition(_D.CHECKING, (_A.CHECK_TARGET,)),
        (_D.CHECKING, _E.DONE): Transition(_D.DECIDING, (_A.DECIDE_COMMITTED,)),
        (_D.CHECKING, _E.FAILED): refuse,
        # From here on the connection lives here, or nowhere.
        (_D.DECIDING, _E.DECIDED_COMMITTED): Transition(_D.COMMITTED, (_A.UNFENCE, _A.SEND_COMMITTED, *activate)),
        (_D.DECIDING, _E.DECIDED_ABORTED): Transition(_D.ABORTED, (_A.DISCARD, _A.SEND_ABORTED)),
        (_D.COMMITTED, _E.DONE): Transition(_D.ACTIVE, (_A.SEND_ACTIVE,)),
        # It cannot live elsewhere any more: what failed once, for want of memory perhaps, is tried once more.
        (_D.COMMITTED, _E.FAILED): Transition(_D.RETRYING, (_A.UNFENCE, *activate)),
        (_D.RETRYING, _E.DONE): Transition(_D.ACTIVE, (_A.SEND_ACTIVE,)),
        (_D.RETRYING, _E.FAILED): Transition(_D.LOST, (_A.WRITE_LOST, _A.DISCARD, _A.SEND_LOST)),
        (_D.ASKED, _E.DECIDED_ABORTED): Transition(_D.ABORTED, (_A.DISCARD, _A.SEND_ABORTED)),
        (_D.ASKED, _E.DECIDED_COMMITTED): Transition(_D.INTERRUPTED, (_A.SEND_COMMITTED,)),
        (_D.ASKED, _E.DECIDED_ACTIVE): Transition(_D.ACTIVE, (_A.SEND_ACTIVE,)),
        (_D.INTERRUPTED, _E.DONE): Transition(_D.INTERRUPTED),
        (_D.INTERRUPTED, _E.ACTIVATE): Transition(_D.COMMITTED, (_A.RECLAIM, _A.UNFENCE, *activate)),
        (_D.INTERRUPTED, _E.QUERY): Transition(_D.INTERRUPTED, (_A.SEND_COMMITTED,)),
        (_D.INTERRUPTED, _E.LINK_LOST): Transition(_D.LEFT),
        (_D.INTERRUPTED, _E.TIMEOUT): Transition(_D.LEFT),
        (_D.ACTIVE, _E.DONE): Transition(_D.ACTIVE),
        (_D.ABORTED, _E.DONE): Transition(_D.ABORTED),
        (_D.LOST, _E.DONE): Transition(_D.LOST),
        (_D.LOST, _E.FAILED): Transition(_D.LOST, (_A.DISCARD,)),  # not written: nothing is said, and it is asked again
        # Without a written decision nothing is said: the origin stays in doubt and asks again.
        (_D.DECIDING, _E.FAILED): Transition(_D.READY),
        (_D.ASKED, _E.FAILED): Transition(_D.READY),
    }
    for event in (_E.ABORT, _E.LINK_LOST, _E.TIMEOUT, _E.CANCEL, _E.FAILED):
        table[_D.PREPARED, event] = refuse
    for event in (_E.LINK_LOST, _E.TIMEOUT):
        for state in (_D.COMMITTED, _D.RETRYING, _D.ACTIVE, _D.ABORTED, _D.LOST):
            table[state, event] = Transition(state)
    return table


ORIGIN: _OriginTable = _origin_table()
DESTINATION: _DestinationTable = _destination_table()

#: Where a machine rests: nothing more will happen by itself.
ORIGIN_FINAL = frozenset({_O.DONE, _O.ROLLED_BACK, _O.LOST})
DESTINATION_FINAL = frozenset({_D.ACTIVE, _D.ABORTED, _D.LOST, _D.LEFT})

#: Who owns the connection as far as the origin can tell.
OWNER: dict[OriginState, Owner] = {
    _O.READY: Owner.ORIGIN, _O.PREPARING: Owner.ORIGIN, _O.PREPARED: Owner.ORIGIN, _O.OFFERING: Owner.ORIGIN,
    _O.ROLLED_BACK: Owner.ORIGIN, _O.OFFERED: Owner.UNKNOWN, _O.DOUBT: Owner.UNKNOWN,
    _O.LETTING_GO: Owner.UNKNOWN, _O.LET_GO: Owner.UNKNOWN,
    _O.COMMITTED: Owner.DESTINATION, _O.UNCONFIRMED: Owner.DESTINATION, _O.DONE: Owner.DESTINATION, _O.LOST: Owner.NONE}


class IllegalEvent(Exception):
    """The table has no such transition; the machine is as it was."""


class Machine(Generic[State]):
    """One side of one pass. `handle` moves it and returns what is to be done."""

    def __init__(self, table: dict[tuple[State, Event], Transition[State]], state: State) -> None:
        self._table = table
        self.state: State = state

    def handle(self, event: Event) -> tuple[Action, ...]:
        transition = self._table.get((self.state, event))
        if transition is None:
            raise IllegalEvent(f"{event.value!r} makes no sense in state {self.state.value!r}")
        self.state = transition.state
        return transition.actions


def origin(state: OriginState = OriginState.READY) -> Machine[OriginState]:
    return Machine(ORIGIN, state)


def destination(state: DestinationState = DestinationState.READY) -> Machine[DestinationState]:
    return Machine(DESTINATION, state)

"""The order in which a connection is read without being given away (`dump --leave-running`): a table as in handoff.py,
of the same actions and states, which the same executor runs. It never waits for anybody, and writes nothing."""

from __future__ import annotations

from .handoff import Action, Event, Machine, OriginState, Transition

_O, _E, _A = OriginState, Event, Action
_BACK = Transition(_O.ROLLED_BACK, (_A.UNDO,))

#: VERIFY as in a pass: what was read is one state of the connection, and not two halves of two.
SNAPSHOT: dict[tuple[OriginState, Event], Transition[OriginState]] = {
    (_O.READY, _E.START): Transition(_O.PREPARING, (_A.QUIESCE, _A.STOP, _A.HOLD, _A.PROBE, _A.SILENCE, _A.EXTRACT,
                                                    _A.VERIFY)),
    (_O.PREPARING, _E.DONE): _BACK,
    (_O.PREPARING, _E.FAILED): _BACK,
    (_O.ROLLED_BACK, _E.DONE): Transition(_O.ROLLED_BACK),
}


def machine() -> Machine[OriginState]:
    return Machine(SNAPSHOT, OriginState.READY)

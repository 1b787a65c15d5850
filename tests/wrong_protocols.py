"""Handoffs that are known to be wrong, as changes of the tables: whatever checks the protocol must find them out.

The first five are the design's own four: resume on a timer, activate before committed is written, offer before silence
and fence, say aborted without writing it (which the lock hides: without it, sessions overtake each other).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from criu_tcpcp.core.handoff import DESTINATION, ORIGIN, Action, DestinationState, Event, OriginState, Transition

A, E, Org, Dst = Action, Event, OriginState, DestinationState
Table = Mapping[Any, Any]

_GIVEN_BACK = ORIGIN[Org.OFFERED, E.ABORTED]
_DECIDED_COMMITTED = DESTINATION[Dst.DECIDING, E.DECIDED_COMMITTED]
_TAKE_LEAVE = ORIGIN[Org.OFFERED, E.COMMITTED].actions
_SAY_ABORTED = Transition(Dst.ABORTED, (A.SEND_ABORTED,))


def _changed(table: Table, changes: Table) -> dict[Any, Any]:
    """`changes`: transitions, or the actions of one that stays as it is otherwise."""
    return {**table, **{key: new if isinstance(new, Transition) else replace(table[key], actions=tuple(new))
                        for key, new in changes.items()}}


def _origin(changes: Table) -> tuple[Table, Table]:
    return _changed(ORIGIN, changes), DESTINATION


def _destination(changes: Table) -> tuple[Table, Table]:
    return ORIGIN, _changed(DESTINATION, changes)


def _begin(*without: Action) -> tuple[Action, ...]:
    return tuple(one for one in ORIGIN[Org.READY, E.START].actions if one not in without)


#: (origin's table, destination's table)
WRONG: dict[str, tuple[Table, Table]] = {
    "resume_on_a_timer": _origin({(Org.OFFERED, E.TIMEOUT): _GIVEN_BACK}),
    "activate_before_committed_is_written": _destination({
        (Dst.PREPARED, E.COMMIT): replace(_DECIDED_COMMITTED, state=Dst.COMMITTED)}),
    "offer_before_silence_and_fence": _origin({
        (Org.READY, E.START): _begin(A.SILENCE),
        (Org.OFFERING, E.DONE): (A.SEND_COMMIT, A.SILENCE, A.FENCE, A.PIN)}),
    "offer_before_fence": _origin({(Org.OFFERING, E.DONE): (A.PIN, A.SEND_COMMIT, A.FENCE)}),
    "aborted_is_not_written": _destination({
        (Dst.READY, E.QUERY): _SAY_ABORTED,
        **{(Dst.PREPARED, event): _SAY_ABORTED for event in (E.ABORT, E.LINK_LOST, E.TIMEOUT, E.FAILED)}}),
    # The origin.
    "take_back_on_a_timer": _origin({(Org.DOUBT, E.TIMEOUT): _GIVEN_BACK}),
    "commit_before_offered_is_written": _origin({
        (Org.PREPARED, E.PREPARED): (A.SEND_COMMIT, A.WRITE_OFFERED),
        (Org.OFFERING, E.DONE): (A.FENCE, A.PIN)}),
    "commit_before_pin": _origin({(Org.OFFERING, E.DONE): (A.FENCE, A.SEND_COMMIT, A.PIN)}),
    "neither_stopped_nor_verified": _origin({(Org.READY, E.START): _begin(A.STOP, A.VERIFY)}),
    "end_before_committed": _origin({(Org.OFFERING, E.DONE): (A.FENCE, A.PIN, A.END, A.SEND_COMMIT)}),
    "resume_before_end": _origin({
        (Org.OFFERED, E.COMMITTED): (A.WRITE_COMMITTED, A.REDIRECT, A.RESUME, A.END)}),
    "forget_before_active": _origin({(Org.OFFERED, E.COMMITTED): (*_TAKE_LEAVE, A.FORGET)}),
    "done_before_active": _origin({(Org.OFFERED, E.COMMITTED): (*_TAKE_LEAVE, A.WRITE_DONE)}),
    "offered_is_not_written": _origin({
        (Org.PREPARED, E.PREPARED): replace(ORIGIN[Org.OFFERING, E.DONE], state=Org.OFFERED)}),
    "never_resumed": _origin({(Org.OFFERED, E.COMMITTED): (A.WRITE_COMMITTED, A.REDIRECT, A.END)}),
    "take_back_the_committed": _origin({(Org.UNCONFIRMED, E.REBOOTED): _GIVEN_BACK,
                                        (Org.UNCONFIRMED, E.TIMEOUT): _GIVEN_BACK}),
    "let_go_is_written_late": _origin({(Org.DOUBT, E.OVERDUE): (A.FENCE, A.END, A.RESUME, A.WRITE_LET_GO)}),
    "let_go_with_the_endpoint": _origin({
        (Org.DOUBT, E.OVERDUE): (A.FENCE, A.WRITE_LET_GO, A.RESUME),
        (Org.LET_GO, E.RECOVER): (A.RESUME, A.RECONNECT, A.SEND_QUERY)}),
    # The destination.
    "committed_and_not_activated": _destination({
        (Dst.DECIDING, E.DECIDED_COMMITTED): Transition(Dst.LEFT, (A.UNFENCE, A.SEND_COMMITTED))}),
    "never_unfenced": _destination({
        (Dst.DECIDING, E.DECIDED_COMMITTED): (A.SEND_COMMITTED, A.ACTIVATE, A.WRITE_ACTIVE)}),
}

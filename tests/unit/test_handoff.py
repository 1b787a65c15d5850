"""The handoff's tables, walked exhaustively: each side alone, and both over a link that loses, with crashes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from criu_tcpcp.core.errors import Owner
from criu_tcpcp.core.handoff import (
    BEST_EFFORT,
    DESTINATION,
    DESTINATION_FINAL,
    ORIGIN,
    ORIGIN_FINAL,
    OWNER,
    Action,
    DestinationState,
    Event,
    IllegalEvent,
    Machine,
    OriginState,
)

A, E, Org, Dst = Action, Event, OriginState, DestinationState
TABLES: dict[str, tuple[dict[Any, Any], Any, Any]] = {
    "origin": (ORIGIN, ORIGIN_FINAL, Org), "destination": (DESTINATION, DESTINATION_FINAL, Dst)}
DECISIONS = frozenset({A.DECIDE_COMMITTED, A.DECIDE_ABORTED})
GIVES_BACK = frozenset({E.ABORTED, E.REBOOTED, E.FORCED})


def paths(table: dict[Any, Any], start: Any) -> Iterator[tuple[list[Event], list[Action], Any]]:
    """Every (events, all actions so far, state) reached without taking a transition twice: loops add nothing new.
    RECOVER is how another process begins, not how one goes on."""
    todo: deque[tuple[list[Event], list[Action], Any, frozenset[Any]]] = deque([([], [], start, frozenset())])
    while todo:
        events, actions, state, used = todo.popleft()
        yield events, actions, state
        for (source, event), transition in table.items():
            if source is state and (source, event) not in used and len(events) < 7 and event is not E.RECOVER:
                todo.append(([*events, event], [*actions, *transition.actions], transition.state,
                             used | {(source, event)}))


@pytest.mark.parametrize("side", TABLES)
def test_every_state_is_reached_and_left(side: str) -> None:
    table, final, states = TABLES[side]
    reached = {next(iter(states))} | {transition.state for transition in table.values()}
    assert reached == set(states)
    for state in states:
        events = {event for source, event in table if source is state}
        assert state in final or events - {E.DONE}, f"nothing leads out of {state}"


@pytest.mark.parametrize("side", TABLES)
def test_what_an_entry_does_can_end(side: str) -> None:
    """The end of actions is understood where they lead to; so is their failure, if it can change the course."""
    table, _final, _states = TABLES[side]
    for (state, event), transition in table.items():
        if not transition.actions:
            continue
        place = f"{state} on {event}"
        if not set(transition.actions) & DECISIONS:
            assert (transition.state, E.DONE) in table, place
        if set(transition.actions) - BEST_EFFORT:
            assert (transition.state, E.FAILED) in table, place


def test_a_decision_is_the_only_action_of_its_entry() -> None:
    for transition in DESTINATION.values():
        if set(transition.actions) & DECISIONS:
            assert len(transition.actions) == 1
            assert {event for state, event in DESTINATION if state is transition.state} >= {
                E.DECIDED_COMMITTED, E.DECIDED_ABORTED}


@pytest.mark.parametrize("side", TABLES)
def test_an_event_that_makes_no_sense_changes_nothing(side: str) -> None:
    table, _final, states = TABLES[side]
    for state in states:
        for event in Event:
            machine = Machine(table, state)
            if (state, event) in table:
                assert machine.handle(event) == table[state, event].actions
                assert machine.state is table[state, event].state
            else:
                with pytest.raises(IllegalEvent):
                    machine.handle(event)
                assert machine.state is state


def test_after_the_offer_the_origin_takes_back_only_by_a_word() -> None:
    count = 0
    for events, actions, state in paths(ORIGIN, Org.READY):
        if state is Org.ROLLED_BACK and A.SEND_COMMIT in actions:
            count += 1
            assert GIVES_BACK & set(events), events
    assert count
    for (source, event), transition in ORIGIN.items():
        if transition.state is Org.ROLLED_BACK and source not in (Org.READY, Org.PREPARING, Org.PREPARED, Org.OFFERING,
                                                                Org.ROLLED_BACK):
            assert event in GIVES_BACK, (source, event)


def test_the_committed_are_never_rolled_back() -> None:
    for (source, event), transition in ORIGIN.items():
        if source in (Org.COMMITTED, Org.UNCONFIRMED, Org.DONE):
            assert transition.state is not Org.ROLLED_BACK, (source, event)
            assert A.UNDO not in transition.actions


def test_silence_then_offer_then_what_outlives_the_keeper_then_commit() -> None:
    for _events, actions, _state in paths(ORIGIN, Org.READY):
        if A.WRITE_OFFERED in actions:
            order = [actions.index(one) for one in (A.HOLD, A.PROBE, A.SILENCE, A.EXTRACT, A.SAVE_STATE, A.VERIFY,
                                                    A.WRITE_OFFERED)]
            assert order == sorted(order), actions
        for lasting in (A.FENCE, A.PIN):
            assert lasting not in actions or A.WRITE_OFFERED in actions[:actions.index(lasting)]
        if A.SEND_COMMIT in actions:
            assert {A.FENCE, A.PIN} <= set(actions[:actions.index(A.SEND_COMMIT)])
            assert actions.count(A.SEND_COMMIT) == 1


def test_packets_are_held_and_the_program_stopped_before_anything_is_read() -> None:
    for _events, actions, _state in paths(ORIGIN, Org.READY):
        if A.EXTRACT in actions:
            assert {A.HOLD, A.STOP, A.WRITE_INTENT} <= set(actions[:actions.index(A.EXTRACT)])


def test_the_endpoint_is_ended_only_when_the_destination_has_it_and_before_the_program_runs() -> None:
    for events, actions, _state in paths(ORIGIN, Org.READY):
        if A.END in actions:
            assert {E.COMMITTED, E.ACTIVE, E.LOST, E.OVERDUE} & set(events)
            before = {A.REDIRECT} if A.WRITE_COMMITTED in actions else {A.FENCE, A.WRITE_LET_GO}
            assert before <= {*actions[:actions.index(A.END)]}
            assert actions.index(A.END) < actions.index(A.RESUME)
        if A.RESUME in actions:
            assert A.END in actions[:actions.index(A.RESUME)]
        assert actions.count(A.END) <= 1
        assert actions.count(A.RESUME) <= 1


def test_the_state_is_forgotten_only_when_nothing_needs_it() -> None:
    for (source, event), transition in ORIGIN.items():
        if A.FORGET in transition.actions:
            assert transition.state in (Org.DONE, Org.ROLLED_BACK, Org.LOST), (source, event)
            assert event in {E.ACTIVE, E.LOST, E.REBOOTED} or source in (Org.UNCONFIRMED, Org.LET_GO) \
                or transition.state is Org.ROLLED_BACK
            if transition.state is not Org.ROLLED_BACK:
                # After ACTIVE the journal may lag: asking again is answered. Payload never outlives the record.
                assert transition.actions[-1] is A.FORGET or A.WRITE_DONE in transition.actions


def test_the_destination_activates_only_after_the_decision() -> None:
    for events, actions, _state in paths(DESTINATION, Dst.READY):
        if A.ACTIVATE in actions or A.SEND_COMMITTED in actions or A.SEND_ACTIVE in actions:
            assert {E.DECIDED_COMMITTED, E.DECIDED_ACTIVE} & set(events), events
        if A.SEND_ABORTED in actions:
            assert E.DECIDED_ABORTED in events, events
        if A.SEND_LOST in actions:
            assert E.DECIDED_COMMITTED in events, events


def test_prepared_is_said_after_it_is_written() -> None:
    for _events, actions, _state in paths(DESTINATION, Dst.READY):
        if A.SEND_PREPARED in actions:
            order = [actions.index(one) for one in (A.RESTORE, A.GRAFT, A.WRITE_PREPARED, A.SEND_PREPARED)]
            assert order == sorted(order)


def test_every_state_of_the_origin_has_an_owner_and_it_is_the_true_one() -> None:
    assert set(OWNER) == set(Org)
    for _events, actions, state in paths(ORIGIN, Org.READY):
        if A.SEND_COMMIT not in actions:
            assert OWNER[state] is Owner.ORIGIN
    assert OWNER[Org.DOUBT] is Owner.UNKNOWN


# -- both sides, a link that loses, crashes ----------------------------------------------------------------------------
#
# A side's actions are atomic here but for their journal writes, and a crash may come between any two of them. What is
# modelled: who may answer the peer (the origin's socket runs, the destination's has left repair), the destination's
# verdict, what the origin's journal says, messages in two FIFO queues that break as a whole, as a TCP connection does.

@dataclass(frozen=True)
class World:
    origin: OriginState = Org.READY
    todo_o: tuple[Action, ...] = ()
    destination: DestinationState = Dst.READY
    todo_d: tuple[Action, ...] = ()
    to_d: tuple[Event, ...] = ()
    to_o: tuple[Event, ...] = ()
    linked: bool = True
    up_o: bool = True
    up_d: bool = True
    offered: bool = False
    let_go: bool = False  # written, that the process runs again without the connection
    fenced: bool = False
    ended: bool = False
    verdict: str = ""
    active: bool = False  # the destination's socket answers the peer
    written_active: bool = False
    prepared: bool = False
    crashes_o: int = 0
    crashes_d: int = 0
    breaks: int = 0

    @property
    def origin_answers(self) -> bool:
        return not self.fenced and not self.ended


SENDS_O = {A.SEND_PREPARE: E.PREPARE, A.SEND_COMMIT: E.COMMIT, A.SEND_ABORT: E.ABORT, A.SEND_QUERY: E.QUERY,
           A.SEND_ACTIVATE: E.ACTIVATE}
SENDS_D = {A.SEND_PREPARED: E.PREPARED, A.SEND_COMMITTED: E.COMMITTED, A.SEND_ACTIVE: E.ACTIVE,
           A.SEND_ABORTED: E.ABORTED, A.SEND_LOST: E.LOST}


class TwoOwners(Exception):
    """A world in which both can answer the peer."""


def feed_o(world: World, event: Event, table: dict[Any, Any]) -> World:
    transition = table.get((world.origin, event)) or table.get((world.origin, E.LINK_LOST))
    if transition is None:
        return world
    return replace(world, origin=transition.state, todo_o=transition.actions)


def feed_d(world: World, event: Event, table: dict[Any, Any]) -> World:
    transition = table.get((world.destination, event)) or table.get((world.destination, E.LINK_LOST))
    if transition is None:
        return world
    return replace(world, destination=transition.state, todo_d=transition.actions)


def step_o(world: World, table: dict[Any, Any]) -> World:
    action, rest = world.todo_o[0], world.todo_o[1:]
    world = replace(world, todo_o=rest)
    if action in SENDS_O:
        if world.linked and world.up_d:
            world = replace(world, to_d=(*world.to_d, SENDS_O[action]))
        elif action not in BEST_EFFORT:
            return feed_o(replace(world, todo_o=()), E.FAILED, table)
    elif action is A.RECONNECT:  # a new serve, which knows what the journal says
        if not world.up_d:
            world = replace(world, up_d=True)
        world = replace(world, linked=True, to_d=(), to_o=(), destination=Dst.READY, todo_d=(),
                        prepared=world.prepared and world.verdict == "committed")
    elif action is A.FENCE:  # that SILENCE does the same until its process ends is not relied upon here
        world = replace(world, fenced=True)
    elif action is A.WRITE_OFFERED:
        world = replace(world, offered=True)
    elif action is A.WRITE_LET_GO:
        world = replace(world, let_go=True)
    elif action is A.UNDO:
        world = replace(world, fenced=False)
    elif action is A.END:
        world = replace(world, ended=True)
    return world if world.todo_o else feed_o(world, E.DONE, table)


def step_d(world: World, table: dict[Any, Any]) -> World:
    action, rest = world.todo_d[0], world.todo_d[1:]
    world = replace(world, todo_d=rest)
    if action in SENDS_D:
        if world.linked and world.up_o:
            world = replace(world, to_o=(*world.to_o, SENDS_D[action]))
    elif action in DECISIONS:
        wanted = "committed" if action is A.DECIDE_COMMITTED else "aborted"
        world = replace(world, verdict=world.verdict or wanted)
        if world.verdict == "aborted":
            event = E.DECIDED_ABORTED
        else:
            event = E.DECIDED_COMMITTED
            if world.written_active and (world.destination, E.DECIDED_ACTIVE) in table:
                event = E.DECIDED_ACTIVE
        return feed_d(world, event, table)
    elif action is A.ACTIVATE:
        world = replace(world, active=True)
    elif action is A.WRITE_ACTIVE:
        world = replace(world, written_active=True)
    elif action is A.DISCARD:
        world = replace(world, prepared=False)
    elif action is A.GRAFT:
        world = replace(world, prepared=True)
    return world if world.todo_d else feed_d(world, E.DONE, table)


def after(world: World, origin: dict[Any, Any], destination: dict[Any, Any]) -> Iterator[World]:
    if world.up_o and world.todo_o:
        yield step_o(world, origin)
    if world.up_d and world.todo_d:
        yield step_d(world, destination)
    if world.up_o and not world.todo_o:
        if world.to_o:
            yield feed_o(replace(world, to_o=world.to_o[1:]), world.to_o[0], origin)
        elif world.origin not in ORIGIN_FINAL and not world.linked:
            yield feed_o(world, E.LINK_LOST, origin)
        elif world.origin not in ORIGIN_FINAL:
            yield feed_o(world, E.TIMEOUT, origin)
        if (world.origin, E.OVERDUE) in origin:
            yield feed_o(world, E.OVERDUE, origin)
    if world.up_d and not world.todo_d:
        if world.to_d:
            yield feed_d(replace(world, to_d=world.to_d[1:]), world.to_d[0], destination)
        elif not world.linked:
            yield feed_d(world, E.LINK_LOST, destination)
    if world.linked and world.breaks < 2:
        # Everything on its way may be lost, or may still arrive at the one side that can read on.
        yield replace(world, linked=False, to_d=(), to_o=(), breaks=world.breaks + 1)
        yield replace(world, linked=False, to_o=(), breaks=world.breaks + 1)
        yield replace(world, linked=False, to_d=(), breaks=world.breaks + 1)
    if world.up_o and world.crashes_o < 1 and world.origin is not Org.READY:
        crashed = replace(world, crashes_o=world.crashes_o + 1, todo_o=(), to_o=(), linked=False)
        if world.let_go:
            yield feed_o(replace(crashed, origin=Org.LET_GO), E.RECOVER, origin)
        elif world.offered:  # recovery, from the journal: in doubt, until the destination says what is
            yield feed_o(replace(crashed, origin=Org.DOUBT), E.LINK_LOST, origin)
        else:  # the kernel undoes what the keeper's tables did; a fence that is not offered is swept
            yield replace(crashed, origin=Org.ROLLED_BACK, fenced=False)
    if world.up_d and world.crashes_d < 1:
        # Its sockets die with it, silent in repair; one that was active belongs to the program, and lives.
        yield replace(world, crashes_d=world.crashes_d + 1, up_d=False, todo_d=(), to_d=(), linked=False,
                      prepared=False)


def explore(origin: dict[Any, Any], destination: dict[Any, Any]) -> set[World]:
    """All worlds that can be; raises TwoOwners at the first in which both answer."""
    start = feed_o(World(), E.START, origin)
    seen, todo = {start}, [start]
    while todo:
        world = todo.pop()
        if world.active and world.origin_answers:
            raise TwoOwners(str(world))
        for successor in after(world, origin, destination):
            if successor not in seen:
                seen.add(successor)
                todo.append(successor)
                assert len(seen) < 400_000, "the model has grown too large"
    return seen


@pytest.fixture(scope="module")
def worlds() -> set[World]:
    return explore(ORIGIN, DESTINATION)


def test_there_are_never_two_owners(worlds: set[World]) -> None:
    assert len(worlds) > 1000


def test_the_model_reaches_every_end(worlds: set[World]) -> None:
    ends = {world.origin for world in worlds if world.origin in ORIGIN_FINAL}
    assert {Org.DONE, Org.ROLLED_BACK} <= ends
    assert any(world.origin is Org.DONE and world.active for world in worlds)


def test_when_the_origin_rests_the_connection_has_exactly_one_owner(worlds: set[World]) -> None:
    for world in worlds:
        if world.origin is Org.DONE and not world.todo_o:
            assert world.active
            assert world.ended
        if world.origin is Org.ROLLED_BACK and not world.todo_o:
            assert world.origin_answers
            assert not world.active
            assert world.verdict != "committed"
            assert not world.let_go


def test_what_the_process_was_let_go_without_never_comes_back(worlds: set[World]) -> None:
    let_go = [world for world in worlds if world.let_go]
    assert {world.origin for world in let_go} >= {Org.LET_GO, Org.LOST, Org.DONE}
    assert not any(world.origin_answers for world in let_go)
    assert not any(world.origin is Org.LOST and world.active for world in let_go)


def test_the_verdict_and_the_ends_agree(worlds: set[World]) -> None:
    for world in worlds:
        if world.verdict == "aborted":
            assert not world.active
            assert not world.ended or world.let_go
        if (world.ended and not world.let_go) or world.active:
            assert world.verdict == "committed"


def changed(table: dict[Any, Any], key: tuple[Any, Event], **changes: Any) -> dict[Any, Any]:
    return {**table, key: replace(table[key], **changes)}


def without(transition: Any, action: Action) -> tuple[Action, ...]:
    return tuple(one for one in transition.actions if one is not action)


def test_the_model_would_see_a_resume_on_a_timer() -> None:
    given_back = ORIGIN[Org.OFFERED, E.ABORTED]
    wrong = {**ORIGIN, (Org.OFFERED, E.TIMEOUT): given_back}
    with pytest.raises(TwoOwners):
        explore(wrong, DESTINATION)


def test_the_model_would_see_an_activation_before_the_decision() -> None:
    wrong = {**DESTINATION, (Dst.PREPARED, E.COMMIT): replace(
        DESTINATION[Dst.DECIDING, E.DECIDED_COMMITTED], state=Dst.COMMITTED)}
    worlds = set[World]()
    try:
        worlds = explore(ORIGIN, wrong)
    except TwoOwners:
        return
    assert any(world.active and world.verdict != "committed" for world in worlds)


def test_the_model_would_see_a_commit_before_the_fence() -> None:
    key = (Org.OFFERING, E.DONE)
    late = (*without(ORIGIN[key], A.FENCE), A.FENCE)
    with pytest.raises(TwoOwners):
        explore(changed(ORIGIN, key, actions=late), DESTINATION)


def test_the_model_would_see_an_abort_that_is_not_written() -> None:
    """The destination says Aborted without a verdict: a second serve could still commit what was given back."""
    wrong = dict(DESTINATION)
    for event in (E.ABORT, E.TIMEOUT, E.LINK_LOST, E.CANCEL, E.FAILED):
        wrong[Dst.PREPARED, event] = replace(DESTINATION[Dst.DECIDING, E.DECIDED_ABORTED], state=Dst.ABORTED)
    wrong[Dst.READY, E.QUERY] = replace(DESTINATION[Dst.DECIDING, E.DECIDED_ABORTED], state=Dst.ABORTED)
    try:
        worlds = explore(ORIGIN, wrong)
    except TwoOwners:
        return
    assert any(world.origin is Org.ROLLED_BACK and world.verdict != "aborted" and world.offered for world in worlds)

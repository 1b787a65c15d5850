"""`executor.Executor` as a generator, so that two sides, and the faults between them, can be run step by step.

It yields the action before it does it, and Wait.MESSAGE before it waits; all else is as there. A test runs both with
the same side and compares what they ask of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any, Protocol

from criu_tcpcp.core.handoff import BEST_EFFORT, TRIED_TWICE, Action, Event, IllegalEvent, Machine

from .world import ActionFailed, Wait

Seen = set[tuple[Any, Event]]


class GaveUp(Exception):
    """The machine rests where it is."""


class Side(Protocol):
    """What it asks of a side: as executor.Side, but that an action has parts, between which others may act."""

    def follow(self, state: Any) -> None: ...

    def parts(self, action: Action) -> int: ...

    def perform(self, action: Action, part: int) -> Event | None:
        """Raises ActionFailed, or GaveUp."""

    def next_event(self) -> Event:
        """Now that something came, or the time is over. Raises ActionFailed where the link ended."""


def drive(machine: Machine[Any], side: Side, final: frozenset[Any], event: Event | None,
          seen: Seen, best_effort: frozenset[Action] = BEST_EFFORT) -> Generator[Action | Wait, None, Any]:
    """Executor.run. `seen` gets every (state, event) that the table knew."""
    while True:
        if event is None:
            yield Wait.MESSAGE
            try:
                event = side.next_event()
            except ActionFailed:
                event = Event.LINK_LOST
        state = machine.state
        try:
            actions = machine.handle(event)
        except IllegalEvent:
            event = Event.LINK_LOST
            actions = machine.handle(event)
        seen.add((state, event))
        side.follow(machine.state)
        if actions:
            event = Event.DONE
            for action in actions:
                try:
                    found = yield from _tried(side, action)
                except GaveUp:
                    return machine.state
                except ActionFailed:
                    if action in best_effort:
                        continue
                    event = Event.FAILED
                    break
                if found is not None:
                    event = found
                    break
        elif machine.state in final:
            return machine.state
        else:
            event = None


def _tried(side: Side, action: Action) -> Generator[Action | Wait, None, Event | None]:
    """Executor._tried."""
    if action in TRIED_TWICE:
        with contextlib.suppress(ActionFailed):
            return (yield from _performed(side, action))
    return (yield from _performed(side, action))


def _performed(side: Side, action: Action) -> Generator[Action | Wait, None, Event | None]:
    found = None
    for part in range(side.parts(action)):
        yield action
        found = side.perform(action, part)
    return found

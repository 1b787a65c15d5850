"""Runs one side of the handoff: the table says what comes next, the side knows how, this file does it and listens.

There is no second owner of the order: `pass`, the keeper, `resolve` and `serve` all run a machine of `core.handoff`
through here, from whatever state the journal says. Every action is timed; an error ends the list of actions and
becomes the event FAILED, except for those whose failure cannot change the outcome, which is noted in `left`; some of
these are tried once more before that. Tests stop it, or make an action fail, by faults.py.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

from .core.errors import LinkError, ProtocolError, TcpcpError
from .core.handoff import BEST_EFFORT, TRIED_TWICE, Action, Event, IllegalEvent, Machine, State
from .core.messages import Message
from .faults import Faults

StateIn = TypeVar("StateIn", contravariant=True)


class GaveUp(Exception):
    """A side has tried often enough (RECONNECT): the machine rests where it is."""


def event_of(message: Message, pass_id: str) -> Event:
    """What the other side's message means to the machine of this pass. ProtocolError for one that means nothing."""
    if getattr(message, "pass_id", None) != pass_id:
        raise ProtocolError("the other side speaks of another pass")
    try:
        return Event(type(message).__name__)
    except ValueError:
        raise ProtocolError(f"unexpected {type(message).__name__}") from None


class Side(Protocol[StateIn]):
    """What the executor asks of a side."""

    name: str

    def follow(self, state: StateIn) -> None:
        """What state the machine is in now."""

    def failed(self, error: TcpcpError) -> None:
        """What changed the course, the first time that something does."""

    def perform(self, action: Action) -> Event | None:
        """Do it. Where it finds out something, returns that as an event, and the actions behind it are not done.
        Raises TcpcpError, or GaveUp."""

    def next_event(self, timeout_s: float | None) -> Event:
        """Wait for a message, the link's end, or the operator; TIMEOUT when nothing came."""

    def timeout_s(self) -> float | None:
        """How long to wait in the present state."""


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """A collection in the freeze would cost the peer milliseconds."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class Executor(Generic[State]):
    """`steps`: [action, milliseconds] of all that was done. `failure`: the first error that changed the course.
    `left`: what could not be done and does not change the outcome."""

    def __init__(self, machine: Machine[State], side: Side[State], final: frozenset[State]) -> None:
        self.machine = machine
        self.steps: list[tuple[str, float]] = []
        self.left: list[str] = []
        self.failure: TcpcpError | None = None
        self._side = side
        self._final = final
        self._faults = Faults()

    def run(self, event: Event | None = None) -> State:
        """From this event (None: wait for one) until the machine rests; returns its state."""
        event = event or self._wait()
        while True:
            try:
                actions = self.machine.handle(event)
            except IllegalEvent as error:
                # The other side is out of step: whatever it says further is not listened to.
                self._note_failure(ProtocolError(str(error)))
                actions = self.machine.handle(Event.LINK_LOST)
            self._side.follow(self.machine.state)
            if actions:
                try:
                    event = self._perform(actions)
                except GaveUp:
                    return self.machine.state
            elif self.machine.state in self._final:
                return self.machine.state
            else:
                event = self._wait()

    def _wait(self) -> Event:
        try:
            event = self._side.next_event(self._side.timeout_s())
        except TcpcpError as error:  # the link, what came over it, or the packet queue: no more is heard
            self._note_failure(error)
            return Event.LINK_LOST
        if event is Event.TIMEOUT:
            self._note_failure(LinkError("the other side did not answer in time"))
        return event

    def _perform(self, actions: tuple[Action, ...]) -> Event:
        for action in actions:
            point = f"{self._side.name}:{action.value}"
            self._faults.stop(point)
            start = time.perf_counter()
            try:
                found = self._tried(action, point)
            except TcpcpError as error:
                if action in BEST_EFFORT:
                    self.left.append(f"{action.value}: {error}")
                    continue
                self._note_failure(error)
                return Event.FAILED
            finally:
                self.steps.append((action.value, round((time.perf_counter() - start) * 1000, 3)))
            if found is not None:
                return found
        return Event.DONE

    def _tried(self, action: Action, point: str) -> Event | None:
        if action in TRIED_TWICE:
            with contextlib.suppress(TcpcpError):
                self._faults.fail(point)
                return self._side.perform(action)
        self._faults.fail(point)
        return self._side.perform(action)

    def _note_failure(self, error: TcpcpError) -> None:
        """The first error is the cause; those that follow from it are notes."""
        if self.failure is None:
            self.failure = error
            self._side.failed(error)
        else:
            self.failure.add_note(str(error))

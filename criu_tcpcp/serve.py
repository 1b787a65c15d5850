"""`criu-tcpcp serve`: the destination's remote entry. Started over SSH, it speaks on stdin and stdout, and ends with
them.

With `images` the destination is an image directory of this host instead: `dump` starts that, over a link of its own.

One process serves one link, and on it one pass after another. A new pass begins with Stage; a Query asks about an old
one, which another serve may still be working on: then this one waits for it (the journal's lock) before it answers.
Between two passes it waits for some seconds: an origin that vanished says no goodbye, and nothing may be left for it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ._version import __version__
from .core import handoff, messages
from .core.criu import messages as load_criu_messages
from .core.endpoint import Flow
from .core.errors import JournalError, LinkError, ProtocolError, TcpcpError
from .core.handoff import DESTINATION_FINAL, Event
from .core.imageset import Owner
from .destination import PROLOGUE_FILE, Destination
from .executor import Executor, without_garbage_collection
from .imagewriter import ImageWriter, holds_dump
from .journal import DESTINATION, Journal, prepare_run_directory
from .kernel import netns, process, syscalls
from .settle import stands_here, sweep_host
from .transport.wire import Wire

_LOCK_TIMEOUT_S = 12.0
_IDLE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Images:
    """The directory that takes the connection, and whose it was."""

    place: Path
    owner: Owner


def serve(images: Images | None = None) -> None:
    """Serve the link on stdin and stdout until it ends. Raises LinkError where the link ended in the middle, and
    ProtocolError where the other side does not speak the protocol."""
    reading, writing = _claim_stdio()
    syscalls.name_process("tcpcp-serve")
    syscalls.forbid_core_dumps()
    wire = Wire(reading, writing)
    hello = wire.receive(_IDLE_TIMEOUT_S)
    if not isinstance(hello, messages.Hello):
        raise ProtocolError("the other end did not introduce itself as criu-tcpcp")
    try:
        prepare_run_directory()
        load_criu_messages()
    except TcpcpError as error:
        wire.send(messages.Refused("", error.message, error.hint))
        return
    # A directory speaks on no network: it may be on the origin host.
    network = list(netns.identity("/proc/thread-self/ns/net")) if images is None else []
    wire.send(messages.Hello(messages.PROTOCOL, __version__, socket.gethostname(), syscalls.boot_id(), network))
    sweep_host()
    while True:
        try:
            message = wire.receive(_IDLE_TIMEOUT_S)
        except LinkError:  # its end, or silence
            return
        match message:
            case messages.Stage():
                _pass(message, wire, images)
            case messages.Query():
                _answer(message, wire, images)
            case messages.Settled():
                _settled(message, wire, images)
            case messages.Ask():
                stands = (stands_here(Flow.from_json(message.flow)) if images is None
                          else holds_dump(images.place, message.pass_id))
                wire.send(messages.Standing(message.pass_id, stands))
            case messages.Try():
                _try(message, wire)
            case messages.Abort():
                continue  # of a pass that is over here
            case _:
                raise ProtocolError(f"{type(message).__name__} out of turn")


def _claim_stdio() -> tuple[int, int]:
    """stdin and stdout belong to the protocol alone: whatever prints must not spoil it."""
    reading, writing = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    sys.stdout.flush()
    return reading, writing


def _try(message: messages.Try, wire: Wire) -> None:
    from . import features  # a pass does not need them
    try:
        found = features.check(message.feature or None)
    except TcpcpError as error:
        wire.send(messages.Refused("", error.message, error.hint))
        return
    wire.send(messages.Tried([one.to_json() for one in found]))


def _pass(stage: messages.Stage, wire: Wire, images: Images | None) -> None:
    side: Destination | ImageWriter
    with contextlib.ExitStack() as held:
        try:
            journal = Journal(stage.pass_id, DESTINATION)
            if images is None:
                held.enter_context(journal.claimed(stage.flow))
                side = Destination.staged(stage, wire)
            else:
                journal.create()
                held.enter_context(journal.locked())
                side = ImageWriter.staged(stage, wire, images.place, images.owner)
        except TcpcpError as error:
            wire.send(messages.Refused(stage.pass_id, error.message, error.hint))
            return
        held.enter_context(contextlib.closing(side))
        held.enter_context(without_garbage_collection())
        wire.send(messages.Staged(stage.pass_id, side.nonce, side.address_is_local, side.into, side.knows))
        carrier = process.carrier()
        chain = [None] if carrier is None else [None, carrier]  # a message is as slow as the slowest that hands it on
        for pid in chain:
            syscalls.go_first(pid)
        try:
            _run(side)
        finally:
            for pid in chain:
                syscalls.go_along(pid)


def _answer(query: messages.Query, wire: Wire, images: Images | None) -> None:
    side: Destination | ImageWriter
    journal = Journal(query.pass_id, DESTINATION)
    with _waiting_lock(journal) as mine:
        if not mine:
            return  # another serve is at work on it: no answer, the origin asks again
        if journal.field("staged" if images is None else "images") is None:
            # Never heard of, or already undone and deleted: either way nothing can commit it any more once this is
            # written; a serve that still held it dormant would find its journal gone.
            _abort_unknown(journal)
            wire.send(messages.Aborted(query.pass_id, "the destination does not have it"))
            return
        side = (Destination.recovered(journal, wire) if images is None
                else ImageWriter.recovered(journal, wire, images.owner))
        with contextlib.closing(side):
            _run(side, Event.QUERY)


def _abort_unknown(journal: Journal) -> None:
    if not journal.exists():
        journal.create()
    if journal.decide("aborted") != "aborted":
        raise JournalError(f"the journal of pass {journal.pass_id} says committed, and not of what")
    journal.remove()


@contextlib.contextmanager
def _waiting_lock(journal: Journal) -> Iterator[bool]:
    """The journal's lock, if it can be had in time; an unknown pass needs none."""
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while journal.exists():
        with journal.locked(wait=False) as mine:
            if mine or time.monotonic() > deadline:
                yield mine
                return
        time.sleep(0.05)
    yield True


def _run(side: Destination | ImageWriter, event: Event | None = None) -> None:
    executor = Executor(handoff.destination(), side, DESTINATION_FINAL)
    side.steps, side.left = executor.steps, executor.left
    executor.run(event)


def _settled(message: messages.Settled, wire: Wire, images: Images | None) -> None:
    """The origin will not ask again: what remains is what `passes` shows and `release` takes away. Of a dump, that is
    the origin's record."""
    journal = Journal(message.pass_id, DESTINATION)
    if journal.exists() and images is None:
        journal.write("settled")
        journal.forget(PROLOGUE_FILE)
    elif journal.exists():
        journal.remove()
    wire.send(message)


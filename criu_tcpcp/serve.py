"""`criu-tcpcp serve`: the destination's remote entry. Started over SSH, it speaks on stdin and stdout, and ends with
them.

With a `door` it obeys a policy (door.py): sshd forces it upon a key that may do nothing else here, and what the client
wanted to start instead (SSH_ORIGINAL_COMMAND) is not looked at. Without one, whoever may start it as root is obeyed.

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

from . import carrying, namespaces, onward, outside
from ._version import __version__
from .core import handoff, messages
from .core.criu import messages as load_criu_messages
from .core.endpoint import Flow
from .core.errors import JournalError, LinkError, ProtocolError, TcpcpError
from .core.handoff import DESTINATION_FINAL, DestinationState, Event
from .core.image import read_inet_sk
from .core.imageset import Owner
from .destination import PROLOGUE_FILE, Destination
from .door import Denied, Door, Entry
from .executor import Executor, without_garbage_collection
from .imagewriter import ImageWriter, holds_dump
from .journal import DESTINATION, Journal, prepare_run_directory
from .kernel import netns, process, sockdiag, syscalls
from .kernel.channel import Channel
from .redirect import address, carry
from .settle import stands_here, sweep_host
from .transport.wire import Wire

_LOCK_TIMEOUT_S = 12.0
_IDLE_TIMEOUT_S = 10.0
_MORE_ANNOUNCEMENTS, _BETWEEN_ANNOUNCEMENTS_S = 2, 1.0
_LAST_WORDS_S = 2.0


@dataclass(frozen=True)
class Images:
    """The directory that takes the connection, and whose it was."""

    place: Path
    owner: Owner


_ENDED = {DestinationState.ACTIVE: "active", DestinationState.ABORTED: "undone", DestinationState.LOST: "lost"}


def serve(images: Images | None = None, door: Door | None = None) -> None:
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
        if door is not None:
            door.greet()
        prepare_run_directory()
        load_criu_messages()
    except TcpcpError as error:
        wire.send(messages.Refused("", error.message, error.hint))
        return
    # A directory speaks on no network: it may be on the origin host.
    network = list(netns.own()) if images is None else []
    wire.send(messages.Hello(messages.PROTOCOL, __version__, socket.gethostname(), syscalls.boot_id(), network))
    sweep_host()
    adopted: set[str] = set()
    channels: dict[str, Channel] = {}  # of passes whose packets are to travel over this link, by their ids
    while True:
        try:
            message = wire.receive(_IDLE_TIMEOUT_S)
        except LinkError:  # its end, or silence
            _announce_again(adopted)
            return
        if isinstance(message, messages.Adopt) and message.now:
            adopted.add(message.pass_id)
        try:
            if isinstance(message, messages.Carry) and door is None:
                _carry(message, wire, channels.pop(message.pass_id, None))
                return
            _do(message, wire, images, door, channels)
        except Denied as denied:
            wire.send(messages.Refused(getattr(message, "pass_id", ""), denied.message, denied.hint))


def _do(message: messages.Message, wire: Wire, images: Images | None, door: Door | None,
        channels: dict[str, Channel]) -> None:
    match message:
        case messages.Stage():
            channel = _pass(message, wire, images, door)
            if channel is not None:
                channels[message.pass_id] = channel
        case messages.Query():
            _answer(message, wire, images, door)
        case messages.Settled():
            _settled(message, wire, images, door)
        case messages.Ask():
            _tell_whether_it_stands(message, wire, images, door)
        case messages.Adopt():
            _adopt(message, wire, door)
        case messages.Try():
            _try(message, wire)
        case messages.Onward() | messages.Where() | messages.Dig() | messages.Listen():
            _straighten(message, wire, images, door)
        case messages.Abort():
            return  # of a pass that is over here
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
        found = features.attempt(message.feature or None)
    except TcpcpError as error:
        wire.send(messages.Refused("", error.message, error.hint))
        return
    wire.send(messages.Tried([one.to_json() for one in found]))


def _carry(message: messages.Carry, wire: Wire, channel: Channel | None) -> None:
    """The packets of a pass travel over this link from now on, and nothing else does. `channel`: if this process has
    made it; another may have had it, and is ended."""
    journal = Journal(message.pass_id, DESTINATION)
    staged = journal.field("staged")
    with namespaces.of_side(journal):
        flow = Flow.from_json(staged["flow"]) if staged is not None else None
        if flow is None or journal.verdict() != "committed" or not stands_here(journal, flow):
            carrying.over(journal)
            wire.send(messages.Ended())
            return
        try:
            carrying.end(journal)
            claimed = carrying.claim(journal)
            channel = channel or carry.open_again(journal, flow)
        except TcpcpError as error:
            wire.send(messages.Refused(message.pass_id, error.message, error.hint))
            return
        carried_by = process.carrier()
        if carried_by is not None:
            process.send_at_once(carried_by)
        wire.send(messages.Carrying(message.pass_id))
        with contextlib.closing(channel), carrying.carrying(journal, claimed), \
                contextlib.closing(carrying.bell(journal)) as bell:
            for pid in {None, carried_by}:
                syscalls.go_ahead(pid)
            carrying.Carrier(wire, channel, flow, None, lambda quiet_s: _has_ended(journal, flow, quiet_s), bell).run()


def _has_ended(journal: Journal, flow: Flow, quiet_s: float) -> bool:
    """In TIME-WAIT it may still have to answer a FIN that comes again."""
    if stands_here(journal, flow):
        return False
    return sockdiag.state_of(flow) is None or quiet_s > _LAST_WORDS_S


def _pass(stage: messages.Stage, wire: Wire, images: Images | None, door: Door | None) -> Channel | None:
    side: Destination | ImageWriter
    entry: Entry | None = None
    with contextlib.ExitStack() as held:
        try:
            journal = Journal(stage.pass_id, DESTINATION)
            _refuse_nonsense(stage)
            if door is not None:
                entry = door.entry(journal, Flow.from_json(stage.flow), stage.into)
                entry.admit_way()
                entry.admit_options(read_inet_sk(stage.inet_sk))
            if images is None:
                host = netns.open_own()
                held.callback(os.close, host)
                is_apart = held.enter_context(namespaces.of_target(stage.into, guarded=door is not None))
                place = outside.at_destination(Flow.from_json(stage.flow), host) if is_apart else None
                if place is not None:
                    held.callback(place.close)
                held.enter_context(journal.claimed(place.inner.to_json() if place is not None else stage.flow))
                side = Destination.staged(stage, wire, entry, is_apart=is_apart, outside=place,
                                          path=onward.path_to_here(stage))
            else:
                journal.create()
                held.enter_context(journal.locked())
                side = ImageWriter.staged(stage, wire, images.place, images.owner)
        except TcpcpError as error:
            if entry is not None:
                entry.tell_refused(error)
            wire.send(messages.Refused(stage.pass_id, error.message, error.hint, error.refusal))
            return None
        held.enter_context(contextlib.closing(side))
        held.enter_context(without_garbage_collection())
        wire.send(messages.Staged(stage.pass_id, side.nonce, side.address_is_local, side.into, side.knows,
                                  side.takes_at, side.no_route))
        carrier = process.carrier()
        chain = [None] if carrier is None else [None, carrier]  # a message is as slow as the slowest that hands it on
        for pid in chain:
            syscalls.go_first(pid)
        try:
            _run(side, entry)
        finally:
            channel = side.take_channel() if isinstance(side, Destination) else None
            if channel is None:  # else packets wait for what comes now
                for pid in chain:
                    syscalls.go_along(pid)
        return channel


def _refuse_nonsense(stage: messages.Stage) -> None:
    """ProtocolError for what can be seen without a look at this host; nothing was written yet."""
    Flow.from_json(stage.flow)
    read_inet_sk(stage.inet_sk)
    if len(stage.prologue) > messages.MAX_PROLOGUE:
        raise ProtocolError("a prologue that is too long")


def _answer(query: messages.Query, wire: Wire, images: Images | None, door: Door | None) -> None:
    side: Destination | ImageWriter
    journal = Journal(query.pass_id, DESTINATION)
    if door is not None:
        door.check_own(journal)
    with _waiting_lock(journal) as mine:
        if not mine:
            return  # another serve is at work on it: no answer, the origin asks again
        staged = journal.field("staged" if images is None else "images")
        if staged is None:
            # Never heard of, or already undone and deleted: either way nothing can commit it any more once this is
            # written; a serve that still held it dormant would find its journal gone.
            _abort_unknown(journal)
            wire.send(messages.Aborted(query.pass_id, "the destination does not have it"))
            return
        entry = door.entry(journal, Flow.from_json(staged["flow"]), staged["into"]) if door is not None else None
        with namespaces.of_side(journal):
            side = (Destination.recovered(journal, wire, entry) if images is None
                    else ImageWriter.recovered(journal, wire, images.owner))
            with contextlib.closing(side):
                _run(side, entry, Event.QUERY)


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


def _run(side: Destination | ImageWriter, entry: Entry | None, event: Event | None = None) -> None:
    executor = Executor(handoff.destination(), side, DESTINATION_FINAL)
    side.steps, side.left = executor.steps, executor.left
    state = executor.run(event)
    if entry is not None:
        entry.tell_ended(_ENDED.get(state, "interrupted"), side.into, executor.failure)


def _tell_whether_it_stands(ask: messages.Ask, wire: Wire, images: Images | None, door: Door | None) -> None:
    flow = Flow.from_json(ask.flow)
    journal = Journal(ask.pass_id, DESTINATION)
    if door is not None:
        door.check_flow(journal, flow)
    stands = stands_here(journal, flow) if images is None else holds_dump(images.place, ask.pass_id)
    wire.send(messages.Standing(ask.pass_id, stands))


def _adopt(message: messages.Adopt, wire: Wire, door: Door | None) -> None:
    """The local address of a pass that is over."""
    journal = Journal(message.pass_id, DESTINATION)
    if door is not None:
        door.check_own(journal)
    staged = journal.field("staged")
    if staged is None:
        wire.send(messages.Refused(message.pass_id, "the destination does not know the pass", ""))
        return
    flow = Flow.from_json(staged["flow"])
    admit = door.entry(journal, flow, staged["into"]).admit_address if door is not None else None
    with _waiting_lock(journal) as mine, namespaces.of_side(journal):
        if mine:  # else another serve is at it, and the origin asks again
            wire.send(address.answer(message, flow, journal, admit))


def _announce_again(adopted: set[str]) -> None:
    """What is said once can be lost, and now nobody waits (RFC 5227 2.3, RFC 4861 7.2.6)."""
    for _ in range(_MORE_ANNOUNCEMENTS if adopted else 0):
        time.sleep(_BETWEEN_ANNOUNCEMENTS_S)
        for journal in (Journal(pass_id, DESTINATION) for pass_id in adopted):
            staged = journal.field("staged")
            if staged is not None:
                with contextlib.suppress(TcpcpError), namespaces.of_side(journal):
                    address.announce(Flow.from_json(staged["flow"]).local.address)


def _straighten(message: messages.Onward | messages.Where | messages.Dig | messages.Listen, wire: Wire,
                images: Images | None, door: Door | None) -> None:
    """Of a connection that was passed on (onward.py). A guarded door lets in passes, and nothing that changes the way
    of others."""
    if images is not None:
        raise ProtocolError(f"{type(message).__name__} out of turn")
    if door is not None:
        raise Denied("this door does not change the way of a connection that was passed before")
    match message:
        case messages.Onward():
            onward.follow(message, wire)
        case messages.Where():
            onward.answer(message, wire)
        case _:
            onward.lend_an_end(message, wire)


def _settled(message: messages.Settled, wire: Wire, images: Images | None, door: Door | None) -> None:
    """The origin will not ask again: what remains is what `passes` shows and `release` takes away. Of a dump, that is
    the origin's record."""
    journal = Journal(message.pass_id, DESTINATION)
    if door is not None:
        door.check_own(journal)
    if journal.exists() and images is None:
        if journal.field("settled") is None:  # however often it is said
            journal.write("settled")
        journal.forget(PROLOGUE_FILE)
    elif journal.exists():
        journal.remove()
    wire.send(message)


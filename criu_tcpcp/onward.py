"""A connection that is passed on: the host that the peer's packets come by learns where it lives now.

    peer ──► A ──► B            passed from A to B
    peer ──► A ──► B ──► C      passed on from B to C; at once afterwards B tells A, and then
    peer ──► A ──► C

With the connection goes its path: the hosts that it was passed from before, each by the address that SSH came from and
its pass's id. Whoever passes it on tells each of them (Onward), and relays between that host and the new destination
what lays and tries a way (origin/way.py): the two need not reach each other over SSH. A host takes such a word only for
a pass of its own that is over and whose packets it sends on, and only after the new way was found to work.

A host that cannot be told goes on sending to where it passed the connection, whence the packets are sent on; its
`resolve` asks there (Where), and the same conversation follows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
from collections.abc import Iterator, Sequence

from . import journal as journals
from . import namespaces, outside, redirect
from .core.endpoint import Flow
from .core.errors import LinkError, ProtocolError, Refused, TcpcpError
from .core.messages import Dig, Dug, Heard, Listen, Onward, Settled, Stage, Where
from .core.messages import Refused as RefusedMessage
from .greeting import greet
from .journal import Journal
from .kernel.rules import HostRules, host_rules
from .kernel.tap import KnockListener
from .origin.way import laid
from .redirect import tunnelled
from .redirect.forward import ForwardAtOrigin
from .transport.link import open_link
from .transport.target import LocalTarget, Target, target_from_json
from .transport.wire import Wire

LONGEST = 16  # hosts
_LINK_S = 5.0
_ANSWER_S = 30.0
_ENTRY = re.compile(r"[0-9a-f.:]{2,45} [0-9a-f]{16}")
_LISTENS_S = 1.0


def tell(path: Sequence[str], target: Target | LocalTarget, there: Wire, pass_id: str, via: str) -> list[str]:
    """The pass is over: tell the hosts of the path. `target`: how the new destination was reached, and so how they are;
    `there`: a link to it. Returns what the report says of those that go on as before."""
    notes = []
    for one in path:
        address, _, passed_as = one.partition(" ")
        try:
            if isinstance(target, LocalTarget):
                raise LinkError("the destination was not reached over SSH")
            reached = dataclasses.replace(target, host=address, timeout_s=min(target.timeout_s, _LINK_S))
            with open_link(reached) as link:
                wire = Wire(link.fileno(), link.fileno())
                greet(link, wire, _LINK_S)
                _guide(wire, passed_as, there, pass_id, via)
        except TcpcpError as error:
            notes.append(f"{address} still sends the peer's packets here, whence they are sent on: {error.message}; "
                         f"there, criu-tcpcp resolve {passed_as} makes the way straight")
    return notes


def _guide(host: Wire, passed_as: str, there: Wire, pass_id: str, via: str) -> None:
    """Between the host that is to send the packets elsewhere and the new destination. Refused: it does not."""
    host.send(Onward(passed_as, via))
    while True:
        match message := host.receive(_ANSWER_S):
            case Settled():
                return
            case RefusedMessage():
                raise Refused(message.reason, hint=message.hint)
            case Dig() | Listen():
                there.send(dataclasses.replace(message, pass_id=pass_id))
                answer = there.receive(_ANSWER_S)
                if not isinstance(answer, (Dug, Heard, RefusedMessage)):
                    raise ProtocolError("the destination answered out of turn")
                host.send(dataclasses.replace(answer, pass_id=passed_as))
            case _:
                raise ProtocolError(f"{type(message).__name__} out of turn")


# -- the host that the packets come by ---------------------------------------------------------------------------------

def follow(message: Onward, wire: Wire) -> None:
    """Send this connection's packets to where it lives now, by a way of this host's own; say what became of it."""
    journal = Journal(message.pass_id, journals.ORIGIN)
    try:
        with contextlib.ExitStack() as held:
            if not journal.exists():
                raise Refused(f"this host knows no pass {message.pass_id} as its origin")
            if not held.enter_context(journal.locked(wait=False)):
                raise Refused(f"another process works on pass {message.pass_id} at this moment")
            _follow(journal, message.via, wire)
    except LinkError:
        raise
    except TcpcpError as error:
        wire.send(RefusedMessage(message.pass_id, error.message, error.hint))
    else:
        wire.send(Settled(message.pass_id))


def _follow(journal: Journal, via: str, wire: Wire) -> None:
    """Nothing to do where the packets are not sent on any more."""
    intent = journal.field("intent")
    if intent is None or journal.last() != "done":
        raise Refused(f"pass {journal.pass_id} is not over")
    flow = Flow.from_json(intent["flow"])
    try:
        address = ipaddress.ip_address(via)
    except ValueError:
        raise ProtocolError(f"{via[:80]!r} is not an IP address") from None
    with _in_front(journal, flow) as (rules, seen, before):
        if not before:
            return
        plan = laid(redirect.choose("forward", seen, address, False), seen, journal, wire, False)
        assert plan.nexthop is not None
        way = ForwardAtOrigin(plan, redirect.Setting(journal.pass_id, intent["host"]))
        now = rules.prepare_move(plan.nexthop, plan.interface)
        way.commit(rules, seen)
        rules.turn_from(seen, [name for name in before if name not in (now, f"{now}_closing")])


@contextlib.contextmanager
def _in_front(journal: Journal, flow: Flow) -> Iterator[tuple[HostRules, Flow, list[str]]]:
    """Where the packets of a pass's connection come by, in front of a container's host too: the rules there, the
    connection as its peer knows it, and the sets that lead it to another host."""
    with outside.rules_of(journal) as ways:
        if ways is not None:
            rules, place = ways
            yield rules, place.flow, [name for name in rules.moves_of(place.flow) if not place.leads_in(name)]
            return
    with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
        yield rules, flow, rules.moves_of(flow)


def ask(journal: Journal) -> str:
    """Of a pass from here that is over: ask where it went whether it was passed on from there, and follow it. Returns
    what the report says where that cannot be."""
    intent = journal.field("intent")
    if intent is None:
        return ""
    try:
        with open_link(target_from_json(intent["target"])) as link:
            wire = Wire(link.fileno(), link.fileno())
            greet(link, wire)
            wire.send(Where(journal.pass_id))
            answer = wire.receive(_ANSWER_S)
            if isinstance(answer, Onward):
                _follow(journal, answer.via, wire)
                wire.send(Settled(journal.pass_id))
            elif isinstance(answer, RefusedMessage):
                raise Refused(answer.reason, hint=answer.hint)
    except TcpcpError as error:
        return f"where {intent['host']} has passed the connection, if it has, cannot be followed: {error.message}"
    return ""


# -- the host that passed it on, asked later ---------------------------------------------------------------------------

def answer(message: Where, wire: Wire) -> None:
    """Settled where this host has not passed it on; else guide the asking host."""
    staged = Journal(message.pass_id, journals.DESTINATION).field("staged")
    journal = None if staged is None else _passed_on(Flow.from_json(staged["flow"]))
    if journal is None:
        wire.send(Settled(message.pass_id))
        return
    intent = journal.field("intent")
    assert intent is not None
    try:
        with open_link(target_from_json(intent["target"])) as link:
            there = Wire(link.fileno(), link.fileno())
            greet(link, there)
            _guide(wire, message.pass_id, there, journal.pass_id, redirect.Plan.from_json(intent["plan"]).via)
    except Refused:
        return  # it was the asking host that said so
    except TcpcpError as error:
        wire.send(RefusedMessage(message.pass_id, error.message, error.hint))


def _passed_on(flow: Flow) -> Journal | None:
    """The newest pass of this connection from here that is over, if its packets are sent on from here."""
    for journal in journals.newest_first():
        intent = journal.field("intent")
        if journal.side == journals.ORIGIN and intent is not None and journal.last() == "done" \
                and Flow.from_json(intent["flow"]).plain == flow.plain:
            with _in_front(journal, flow) as (_rules, _seen, moves):
                return journal if moves else None
    return None


# -- the new destination -----------------------------------------------------------------------------------------------

def lend_an_end(message: Dig | Listen, wire: Wire) -> None:
    """What a destination does while a pass is staged, for a connection that lives here."""
    journal = Journal(message.pass_id, journals.DESTINATION)
    try:
        staged = journal.field("staged") if journal.exists() else None
        if staged is None or journal.verdict() != "committed":
            raise Refused(f"this host knows no pass {message.pass_id} as its destination")
        flow = Flow.from_json(staged["flow"])
        with contextlib.ExitStack() as held:
            place = outside.of_journal(journal)
            if place is None:
                held.enter_context(namespaces.of_side(journal))
            else:
                held.enter_context(contextlib.closing(place))
                place.ignore_knocks()
                held.enter_context(place.enter())
                flow = place.flow
            if isinstance(message, Dig):
                tunnelled.dig(tunnelled.between(message.here, message.there), journal, flow)
                wire.send(Dug(message.pass_id))
            else:
                with contextlib.closing(KnockListener(flow)) as listener:
                    wire.send(Heard(message.pass_id, listener.hears(message.size, _LISTENS_S)))
    except TcpcpError as error:
        wire.send(RefusedMessage(message.pass_id, error.message, error.hint))


# -- the path ----------------------------------------------------------------------------------------------------------

def path_from_here(flow: Flow) -> list[str]:
    """Of a connection that this host passes on: who passed it before."""
    for journal in journals.newest_first():
        staged = journal.field("staged")
        if journal.side == journals.DESTINATION and staged is not None and journal.verdict() == "committed" \
                and Flow.from_json(staged["flow"]).plain == flow.plain:
            return list(staged.get("path", []))
    return []


def path_to_here(stage: Stage) -> list[str]:
    """Of a connection that comes: its path as the origin knows it, and the origin; up to this host, if it was here
    before. Nothing of what SSH does not tell (a jump host's address tells of another)."""
    path = [one for one in stage.path if _ENTRY.fullmatch(one)][:LONGEST - 1]
    client = os.environ.get("SSH_CONNECTION", "").partition(" ")[0]
    if client:
        path.append(f"{client} {stage.pass_id}")
    own = [Journal(one.partition(" ")[2], journals.ORIGIN).exists() for one in path]
    return path[:own.index(True)] if True in own else path

"""What survived: list it, settle passes in doubt, take away what a passed connection no longer needs.

`resolve` runs the very machine that the keeper ran, from the state that the journal gives, over a new link. `release`
removes the rules of finished passes (the old host would otherwise keep them as long as packets come by) and their
records. `sweep_host` removes what processes that were killed have left: it is safe at any time, beside any other
command.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from dataclasses import dataclass, replace
from typing import Any

from . import carrier, carrying, graft, namespaces, onward, outside, redirect
from . import journal as journals
from .core import handoff
from .core.endpoint import Flow, Protocol
from .core.errors import ExitCode, InDoubt, KernelError, LinkError, Owner, ProtocolError, Refused, TcpcpError
from .core.handoff import ORIGIN_FINAL, Event, OriginState
from .core.messages import Ask, Message, Settled, Standing
from .core.tcp import PASSABLE_STATES, TcpState
from .executor import Executor
from .greeting import greet
from .imagewriter import take_away_remnant
from .inventory import Connection
from .journal import Journal, structure_lock
from .keeper import carry_on, finish_journal, make_report
from .kernel import conntrack, netns, process, returning, routing, sockdiag, syscalls
from .kernel.rules import HostRules, host_rules
from .origin import STATE_FILE, Counterpart, Origin
from .redirect import address, tunnelled
from .redirect.address import Reach
from .redirect.forward import DivertAtDestination
from .report import Report
from .transport.link import open_link
from .transport.target import target_from_json
from .transport.wire import Wire

IP_VERSIONS = (4, 6)
_ANSWER_TIMEOUT_S = 5.0
_UNKNOWN_END = "its end is not known"


@dataclass(frozen=True)
class KnownPass:
    """One side of a pass, as this host's journal and kernel know it. `state`: in doubt | done | active | ...;
    `rules`: the sets of this host's table in which the connection stands. `carrier`: the process that carries its
    packets, where one should; 0 where none does."""

    id: str
    side: str
    state: str
    connection: str
    other_host: str
    rules: tuple[str, ...]
    working: bool
    carrier: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "side": self.side, "state": self.state, "connection": self.connection,
                "other_host": self.other_host, "rules": list(self.rules), "working": self.working,
                "carrier": self.carrier}


def passes() -> list[KnownPass]:
    """Every pass that this host knows of."""
    found = []
    for journal in journals.all_journals():
        with contextlib.suppress(TcpcpError):
            found.append(_known(journal))
    return found


def _known(journal: Journal) -> KnownPass:
    first: dict[str, Any] = journal.field("intent") or journal.field("staged") or journal.field("images") or {}
    flow = Flow.from_json(first["flow"]) if "flow" in first else None
    with journal.locked(wait=False) as mine:
        working = not mine
    return KnownPass(journal.pass_id, journal.side, _state(journal, working), str(flow or first.get("connection", "?")),
                     str(first.get("host", "")), tuple(_rules_of(journal, flow)), working,
                     carrying.carrier_of(journal) if carrying.is_wanted(journal) else None)


def _state(journal: Journal, working: bool) -> str:
    if working:
        return "working"
    last = journal.last()
    if journal.side == journals.DESTINATION:
        if journal.has_mark(journals.LOST_MARK):
            return "lost"
        return {"settled": "active", "active": "active"}.get(last, journal.verdict() or "undecided")
    if any(record["boot"] != syscalls.boot_id() for record in journal.records()):
        return "of an earlier boot"
    if last == "done" and address.is_under_way(journal):
        return "address on its way"
    return {"offered": "in doubt", "let go": "in doubt", "committed": "unconfirmed", "claimed": "undone",
            "intent": "undone"}.get(last, last or "undone")


def _rules_of(journal: Journal, flow: Flow | None) -> list[str]:
    if flow is None:
        return []
    with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
        found = {name for name, flows in rules.flows().items() if flow.plain in flows}
    with outside.rules_of(journal) as ways:
        if ways is not None:
            found |= {name for name, flows in ways[0].flows().items() if ways[1].flow.plain in flows}
    return sorted(found)


# -- resolve -----------------------------------------------------------------------------------------------------------

def unsettled() -> list[Journal]:
    """Passes of this origin whose end is not known, and that no process works on."""
    return [journal for journal in journals.all_journals() if journal.side == journals.ORIGIN
            and (_known(journal).state in ("in doubt", "unconfirmed") or _is_untold(journal) or _is_cut_off(journal))]


def _is_cut_off(journal: Journal) -> bool:
    """The packets of its connection should be carried over a link, and nobody does it."""
    return journal.last() == "done" and carrying.is_wanted(journal) and not carrying.carrier_of(journal)


def _is_untold(journal: Journal) -> bool:
    """The pass is over, and the destination still keeps its verdict, since it may be asked again."""
    return journal.last() in ("done", "lost") and journal.field(journals.TOLD) is None


def is_in_doubt(pass_id: str) -> bool:
    """Of a pass of this origin. Refused where this host knows no such pass."""
    journal = Journal(pass_id, journals.ORIGIN)
    if not journal.exists():
        raise _unknown(pass_id)
    return _known(journal).state == "in doubt"


def _unknown(pass_id: str) -> Refused:
    return Refused(f"this host knows no pass {pass_id} as its origin", hint="criu-tcpcp passes")


def resolve(pass_id: str, *, settle_s: float = 10.0, force_origin: bool = False) -> Report:
    """Settle one pass: ask the destination until it answers, at most `settle_s`. `force_origin` takes the connection
    back without its word: if it did commit, two hosts speak for the connection from then on, and the peer may reset
    it."""
    journal = Journal(pass_id, journals.ORIGIN)
    if not journal.exists():
        raise _unknown(pass_id)
    with journal.locked(wait=False) as mine:
        if not mine:
            raise InDoubt(f"another process is settling pass {pass_id} at this moment", hint="criu-tcpcp passes")
        if journal.last() not in journals.UNSETTLED:
            journal.forget(STATE_FILE)  # its process may have ended before it did
            report = _told_report(journal) if _is_untold(journal) else settled_report(journal)
            report = _carried_on(journal, report) if _is_cut_off(journal) else report
            is_settled = journal.last() == "done" and not address.is_under_way(journal)
            note = onward.ask(journal) if is_settled and not carrying.is_wanted(journal) else ""
            return replace(report, notes=(*report.notes, note)) if note else report
        if journal.field("offered")["boot"] != syscalls.boot_id():  # type: ignore[index]
            journal.write("lost")
            return settled_report(journal)
        committed = journal.last() == "committed"
        if committed and force_origin:
            raise Refused(f"the destination has committed pass {pass_id}: the connection cannot come back",
                          hint=f"criu-tcpcp resolve {pass_id}")
        connection = _remains(journal)
        origin = Origin.recovered(journal, connection, settle_s)
        state, event = OriginState.DOUBT, Event.FORCED if force_origin else Event.TIMEOUT
        if committed:
            state, event = OriginState.COMMITTED, Event.RECOVER
        elif journal.last() == "let go":
            state, event = OriginState.LET_GO, Event.FORCED if force_origin else Event.RECOVER
        executor = Executor(handoff.origin(state), origin, ORIGIN_FINAL)
        try:
            with netns.enter(origin.program.namespace):
                executor.run(event)
            carry_on(origin, executor)
            report = make_report(origin, executor)
            finish_journal(journal, executor)
            return report
        finally:
            with netns.enter(origin.program.namespace):
                origin.close()


def _remains(journal: Journal) -> Connection:
    """The endpoint as the journal remembers it: its process may have changed or gone."""
    intent = journal.field("intent")
    if intent is None:
        raise Refused(f"the journal of pass {journal.pass_id} is damaged: it does not say of which connection")
    return Connection(pid=intent["pid"], process_name=process.name(intent["pid"]),
                      descriptors=tuple(intent["descriptors"]), inode=intent["inode"], state=TcpState.ESTABLISHED,
                      flow=Flow.from_json(intent["flow"]), unread=0, unacknowledged=0, cookie=intent["cookie"],
                      obstacle=None)


def _told_report(journal: Journal) -> Report:
    """Tell the destination that the pass is settled; the process that should have, ended before. First comes what has
    to be settled with it: an address that was on its way."""
    problems = []
    try:
        with contextlib.ExitStack() as stack:
            intent = journal.field("intent")
            wire = _Elsewhere(stack).wire(intent["target"]) if intent is not None else None
            if wire is None:
                raise LinkError("it cannot be reached")
            try:
                _finish_address(journal, wire)
            except Refused as error:  # it is here again
                problems.append(error.message)
            wire.send(Settled(journal.pass_id))
            if not isinstance(wire.receive(_ANSWER_TIMEOUT_S), Settled):
                raise ProtocolError("it answered out of turn")
            journal.write(journals.TOLD)
    except TcpcpError as error:
        problems.append(f"the destination could not be told that the pass is over: {error.message}")
    report = settled_report(journal)
    if problems:
        code = ExitCode.UNCLEAN if report.exit is ExitCode.OK else report.exit
        return replace(report, exit=code, left=(*report.left, *problems),
                       error="; ".join(filter(None, (report.error, *problems))))
    return report


def _finish_address(journal: Journal, wire: Wire) -> None:
    def ask(message: Message) -> Message:
        wire.send(message)
        return wire.receive(_ANSWER_TIMEOUT_S)

    with namespaces.of_side(journal):
        address.finish(Reach("resolve", journal, ask))


def _carried_on(journal: Journal, report: Report) -> Report:
    """Begin again to carry its packets."""
    intent = journal.field("intent")
    try:
        if intent is None:
            raise Refused("the journal does not say whereto")
        with contextlib.closing(Counterpart(target_from_json(intent["target"]))) as there, \
                namespaces.of_side(journal):
            there.connect()
            carrier.begin(journal, Flow.from_json(intent["flow"]), there)
    except TcpcpError as error:
        problem = f"the connection's packets are not carried: {error.message}"
        return replace(report, exit=ExitCode.UNCLEAN, left=(*report.left, problem), error=report.error or problem,
                       hint=f"criu-tcpcp resolve {journal.pass_id}")
    return report


def settled_report(journal: Journal) -> Report:
    """Of a pass that is over, or was never offered."""
    last = journal.last()
    owner = {"done": Owner.DESTINATION, "lost": Owner.NONE}.get(last, Owner.ORIGIN)
    code = {Owner.NONE: ExitCode.LOST, Owner.ORIGIN: ExitCode.ROLLED_BACK}.get(owner, ExitCode.OK)
    known = _known(journal)
    if address.is_under_way(journal):
        way = f"its address is on its way: criu-tcpcp resolve {journal.pass_id}"
        return Report(id=journal.pass_id, owner=owner, exit=ExitCode.UNCLEAN if code is ExitCode.OK else code,
                      connection=known.connection, left=(way,), error=way)
    texts = {Owner.NONE: "the connection is lost",
             Owner.ORIGIN: "the pass was never offered: the origin has its connection"}
    return Report(id=journal.pass_id, owner=owner, exit=code, connection=known.connection, error=texts.get(owner))


# -- release -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Released:
    """What `release` did, and what it left alone and why."""

    released: tuple[str, ...]
    kept: tuple[str, ...]

    @property
    def in_doubt(self) -> bool:
        """One was kept because its end is not known."""
        return any(_UNKNOWN_END in one for one in self.kept)


def release(pass_id: str | None = None, *, force: bool = False) -> Released:
    """Take away the rules and the records of one finished pass, or of all. Idempotent. A pass that is in doubt or at
    work is kept, and so is a connection that is alive, here or, unless the pass is named, where it went: its rules
    bring it its packets."""
    if pass_id is not None:
        Journal(pass_id, journals.ORIGIN)  # for its complaint about what is no id
    done, kept = [], []
    chosen = [one for one in journals.all_journals() if pass_id is None or one.pass_id == pass_id]
    with contextlib.ExitStack() as stack:
        elsewhere = _Elsewhere(stack)
        for journal in chosen:
            with namespaces.of_side(journal):
                why = _why_kept(journal, force)
            if why is None and pass_id is None:
                why = elsewhere.why_kept(journal)
            if why is None:
                why = _untold_network(journal, force)
            if why is None:
                _remove(journal)
                done.append(f"{journal.pass_id} ({journal.side})")
            else:
                kept.append(f"{journal.pass_id} ({journal.side}): {why}")
    sweep_host()
    return Released(tuple(done), tuple(kept))


def _why_kept(journal: Journal, force: bool) -> str | None:
    known = _known(journal)
    if known.working:
        return "a process is working on it"
    if _in_use_by_another(journal):
        return "its connection is being passed at this moment"
    if known.state == "in doubt" or (known.state == "unconfirmed" and not (force and _has_taken_leave(journal))):
        return f"{_UNKNOWN_END}: criu-tcpcp resolve {journal.pass_id}"
    if journal.side == journals.ORIGIN and _is_untold(journal) and not force:
        return f"the destination has not been told that it is over: criu-tcpcp resolve {journal.pass_id}"
    if journal.side == journals.DESTINATION and journal.verdict() == "committed":
        staged = journal.field("staged")
        if journal.field("settled") is None and not force:
            return "its origin has not confirmed the end and may ask again"
        if staged is not None and _alive_here(Flow.from_json(staged["flow"])):
            return "its connection is alive here"
    first = journal.field("claimed")
    if journal.side == journals.ORIGIN and first is not None and "fenced" in known.rules:
        state = sockdiag.state_of(Flow.from_json(first["flow"]))
        if state is not None and state not in PASSABLE_STATES and state is not TcpState.TIME_WAIT:
            # Its process died before it could be ended in silence: without the fence it would still send its FIN.
            return f"what is left of the old endpoint is in state {state.label}; the kernel gives it up in some minutes"
    return None


def tell_network(journal: Journal) -> None:
    """What the origin's redirect announced is not needed any more: the pass was undone, or its connection has ended.
    Refused where it says no."""
    announced = journal.field(journals.ANNOUNCED)
    if announced is None:
        return
    way = redirect.origin_half(redirect.Plan.from_json(announced["plan"]),
                               redirect.Setting(journal.pass_id, announced["host"]))
    flow = Flow.from_json(announced["flow"])
    if journal.last() in ("committed", "done", "lost"):
        way.forget(flow)
    else:
        way.withdraw(flow)


def _untold_network(journal: Journal, force: bool) -> str | None:
    try:
        tell_network(journal)
    except TcpcpError as error:
        return None if force else f"{error.message}; criu-tcpcp release {journal.pass_id} --force does without it"
    return None


def _has_taken_leave(journal: Journal) -> bool:
    """Of a pass that the destination has committed: nothing of the old endpoint is left that could speak. `resolve`
    sees to that, whether the destination answers or not."""
    intent = journal.field("intent")
    return intent is not None and not _alive_here(Flow.from_json(intent["flow"]))


class _Elsewhere:
    """Asks the hosts that connections were passed to whether they are still there; one link a host."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._wires: dict[str, Wire | None] = {}

    def why_kept(self, journal: Journal) -> str | None:
        """For a finished pass of this origin that still sends packets on."""
        intent = journal.field("intent")
        if journal.side != journals.ORIGIN or intent is None or journal.last() != "done":
            return None
        flow = Flow.from_json(intent["flow"])
        dumped = _images_of(journal)
        with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
            is_moved = rules.is_moved(flow)
        with outside.rules_of(journal) as ways:
            if ways is not None:
                flow = ways[1].flow
                is_moved = ways[0].is_moved(flow)
        if not is_moved and dumped is None:
            return None
        all_the_same = f"criu-tcpcp release {journal.pass_id} releases it all the same"
        wire = self.wire(intent["target"])
        try:
            if wire is None:
                raise LinkError("no link")
            wire.send(Ask(journal.pass_id, flow.to_json()))
            answer = wire.receive(_ANSWER_TIMEOUT_S)
        except (LinkError, ProtocolError):
            return f"{intent['host']} cannot be asked whether the connection is alive; {all_the_same}"
        if isinstance(answer, Standing) and not answer.stands:
            return None
        if dumped is not None:
            return f"its state lies in {dumped}, and the fence keeps this host from ending it; {all_the_same}"
        return f"its connection is alive at {intent['host']}; {all_the_same}"

    def wire(self, target: dict[str, Any]) -> Wire | None:
        """To this host; None where it cannot be reached."""
        key = json.dumps(target, sort_keys=True)
        if key not in self._wires:
            self._wires[key] = None
            with contextlib.suppress(LinkError, ProtocolError, Refused):
                link = self._stack.enter_context(open_link(target_from_json(target)))
                wire = Wire(link.fileno(), link.fileno())
                greet(link, wire)
                self._wires[key] = wire
        return self._wires[key]


def stands_here(journal: Journal, flow: Flow) -> bool:
    """The connection of this pass is alive at this host, or this host has passed it on."""
    with outside.rules_of(journal) as ways:
        if ways is not None:
            is_passed_on = not all(map(ways[1].leads_in, ways[0].moves_of(ways[1].flow)))
            with namespaces.of_side(journal):
                return _alive_here(ways[1].inner) or is_passed_on
    with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
        return _alive_here(flow) or rules.is_moved(flow)


def _remove(journal: Journal) -> None:
    """The record; and with the last one that tells of the connection its rules, unless it is alive here. A serve that
    was killed before its decision may have left a connection to a program, which is none."""
    carrying.end(journal)
    if journal.side == journals.DESTINATION and journal.verdict() != "committed":
        _undo_staged(journal)
        return
    first = journal.field("intent") or journal.field("staged")
    if first is not None and not _others_of(first["flow"], journal):
        flow = Flow.from_json(first["flow"])
        with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
            # What was dumped here and is alive here was made again from its images, and is not to stay fenced.
            if not _alive_here(flow) or _images_of(journal) is not None or _came_back(journal):
                rules.stay(flow)
                rules.unfence(flow)
                DivertAtDestination().undo(rules, flow)
                returning.speak_directly(rules, flow)
                returning.end_return(rules, flow)
                rules.keep_in(flow)
                if not _alive_here(flow):
                    conntrack.forget(flow)  # whoever made it: a connection that was passed on never ends there
            graft.forget(journal, rules)
            rules.sweep()
            is_alive = _alive_here(flow)
        with outside.rules_of(journal) as ways:
            if ways is not None and not is_alive:
                ways[0].stay(ways[1].flow)
                ways[0].keep_in(ways[1].flow)
                ways[0].sweep()
                conntrack.forget(ways[1].flow)
    _forget(journal)


def _forget(journal: Journal) -> None:
    """The record, what it alone tells of, and a tunnel that no other needs."""
    take_away_remnant(journal)
    with namespaces.of_side(journal):
        journal.remove()
        tunnelled.sweep()


def _came_back(journal: Journal) -> bool:
    """The pass was undone, but not all of it: the connection is alive here and must not stay fenced."""
    return journal.side == journals.ORIGIN and journal.last() in ("aborted", "intent", "claimed")


def _images_of(journal: Journal) -> str | None:
    """Of a dump: the directory."""
    intent = journal.field("intent")
    into = str(intent["into"]) if intent is not None else ""
    return into.removeprefix("images ") if into.startswith("images ") else None


def _others_of(flow: dict[str, Any], but: Journal) -> bool:
    return any(one.directory != but.directory and any(record.get("flow") == flow for record in one.records())
               for one in journals.all_journals())


def _in_use_by_another(journal: Journal) -> bool:
    """Another pass of the same connection is at work: the rules are its own too."""
    first = journal.field("claimed")
    return first is not None and journals.working_on(first["flow"], journal) is not None


def _alive_here(flow: Flow) -> bool:
    """In TIME-WAIT both ends have said all: what could still come is a FIN again, after a lost last ACK."""
    return sockdiag.state_of(flow) not in (None, TcpState.TIME_WAIT)


def sweep_host() -> None:
    """Undo what a `serve` that was killed before its decision had staged, forget the state of a pass whose keeper was
    killed when it was of use no more (before the offer, or after the end), remove rules that no connection needs."""
    for journal in journals.all_journals():
        with contextlib.suppress(TcpcpError), journal.locked(wait=False) as mine:
            if not mine or not journal.exists():
                continue
            if journal.side == journals.ORIGIN and journal.last() not in journals.UNSETTLED:
                journal.forget(STATE_FILE)
            elif journal.side == journals.DESTINATION and journal.verdict() != "committed":
                _undo_staged(journal)
    sweep_rules()


def sweep_rules() -> None:
    """Those that no connection needs, in the calling thread's network namespace."""
    for version, protocol in itertools.product(IP_VERSIONS, Protocol):
        with contextlib.suppress(KernelError), host_rules(version, protocol) as rules:
            _sweep(rules, version)
    with contextlib.suppress(TcpcpError):
        tunnelled.sweep()


def _undo_staged(journal: Journal) -> None:
    if journal.decide("aborted") == "committed":
        return
    staged = journal.field("staged")
    if staged is not None and not _in_use_by_another(journal):
        flow = Flow.from_json(staged["flow"])
        with namespaces.of_side(journal), host_rules(flow.ip_version, flow.protocol) as rules:
            graft.abandon(journal, rules)
            # Passed away before: its fence stays, since packets still come by.
            if not staged.get("keeps_fence") and not rules.is_moved(flow):
                rules.unfence(flow)
            DivertAtDestination().undo(rules, flow)
            returning.speak_directly(rules, flow)
            rules.keep_in(flow)
            rules.sweep()
            if staged.get("tracked"):
                conntrack.forget(flow)
        with outside.rules_of(journal) as ways:
            if ways is not None:
                ways[0].stay(ways[1].flow, list(filter(ways[1].leads_in, ways[0].moves_of(ways[1].flow))))
                ways[0].keep_in(ways[1].flow)
                ways[0].sweep()
                if staged["outside"].get("tracked"):
                    conntrack.forget(ways[1].flow)
    _forget(journal)


def _sweep(rules: HostRules, version: int) -> None:
    rules.sweep()
    with structure_lock():
        routing.sweep_diverts(version, rules.diverted_addresses())



"""The origin's side of a pass: what each action of the handoff does here.

The keeper makes an `Origin`, stages it, and lets the executor run it: then it is the tracer, the owner of the packet
queue and of the hold's table. `Origin.recovered` makes one from the journal after the keeper's death, for `resolve`:
the process is stopped then (state T, from `pin`), the fence stands, and the state lies in the journal; what a live one
does by its tracer and its queue is done by SIGCONT and by the fence.

Order within the freeze, and why (kernel/repair.py, kernel/rules.py, kernel/grace.py have the details):
  stop     all threads, at an instant at which none has bytes of the connection in its hands; tried again until it is
           so. Before the hold, since a try that fails then costs the peer nothing.
  hold     packets wait; a grace period; from here on nothing reaches the socket
  probe    learn ts_recent from a segment that the socket is made to send
  silence  nothing of ours leaves any more
  extract  read everything
  verify   nothing is left in a queue below, and nothing moved since
  fence, pin            once the offer is written: the same by rules that outlive the keeper, and a stop that does
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .. import carrying, endpoints, namespaces, outside, redirect
from ..core import tls
from ..core.endpoint import Flow, IPAddress, Protocol
from ..core.errors import LinkError, ProtocolError, Refused, TcpcpError
from ..core.handoff import Action, Event, OriginState
from ..core.image import encode_inet_sk
from ..core.messages import (
    Abort,
    Aborted,
    Activate,
    Active,
    Commit,
    Imminent,
    Lost,
    Message,
    Prepare,
    Query,
    Stage,
    Staged,
)
from ..core.messages import Refused as RefusedMessage
from ..core.refusals import Refusal
from ..executor import GaveUp, event_of
from ..holding import Holding
from ..inventory import Connection
from ..journal import ANNOUNCED, TOLD, Journal
from ..kernel import netns, process, returning, syscalls, tcpinfo
from ..kernel.rules import HostRules, Silence
from ..redirect import address, carry, returned, tunnelled
from ..redirect.address import Reach
from ..redirect.forward import DivertAtDestination
from ..transport.target import LocalTarget, Target, target_from_json
from .counterpart import Counterpart
from .extraction import Extraction, extraction_of, parts_of
from .process import OriginProcess
from .way import laid, laid_by_link, led_back

STATE_FILE = "state"
_ANSWER_TIMEOUT_S = 3.0
_STAGE_TIMEOUT_S = 15.0
_RETRY_PAUSE_S = 0.5
_PEEK = 1 << 15  # bytes; more than any TLS record has
_SHORTEST_ATTEMPT_S = 1.0
_URGENT = frozenset({OriginState.PREPARING, OriginState.PREPARED, OriginState.OFFERING, OriginState.OFFERED,
                     OriginState.COMMITTED})


@dataclass(frozen=True)
class Options:
    """What a pass was asked for. `idle_ms`: how long to look for a quiet instant; None takes any (`--when now`).
    `tls_anyway`: pass what looks like TLS to a program that cannot have its keys, too; `ecn_anyway`: pass without ECN
    what negotiated it.
    `congestion`: "keep" lets the destination go on with what was learnt of the path, "restart" does not.
    `leave_behind`: let the address move though other sockets here use it.
    `returns`: what the destination says goes to the peer "direct", or back through the "origin".
    `settle_s`: how long to ask the destination again before a pass is left in doubt. `doubt_limit_s`: how long after
    the offer the process may stand still in doubt; then it runs again without the connection."""

    into: str = "auto"
    redirect: str = "auto"
    leave_behind: bool = False
    via: str | None = None
    returns: str = "direct"
    idle_ms: int | None = 200
    max_stall_ms: int = 500
    app_state: bytes = field(default=b"", repr=False)
    prologue: bytes | None = field(default=None, repr=False)
    tls_anyway: bool = False
    ecn_anyway: bool = False
    origin_sees: str = "reset"
    congestion: str = "keep"
    settle_s: float = 10.0
    doubt_limit_s: float = 5.0

    @property
    def allowing(self) -> frozenset[Refusal]:
        """What is passed all the same."""
        return frozenset({Refusal.ECN}) if self.ecn_anyway else frozenset()


class Origin:
    """See the module. One thread uses it, in the origin process's network namespace. In a recovery, `identity`: of
    the process that the journal names, which may have gone; `namespace`: where it was, if that is there."""

    def __init__(self, journal: Journal, connection: Connection, target: Target | LocalTarget,
                 options: Options, identity: process.Identity | None = None,
                 namespace: int | None = None) -> None:
        if connection.flow is None:
            raise Refused("the socket is not connected")
        self.name = "origin"
        self.journal = journal
        self.flow: Flow = connection.flow
        self.options = options
        self.staged: Staged | None = None
        self.plan: redirect.Plan | None = None
        self.path: list[str] = []  # who passed the connection before (onward.py)
        self.active: Active | None = None
        self.holding: Holding | None = None
        self.touched = False
        self.program = OriginProcess(connection, identity, namespace, recovered=identity is not None)
        self.there = Counterpart(target)
        self.end_of_way: carry.End | None = None  # of packets that travel over the link
        self._came_by: Journal | None = None  # where packets are carried to this host, and from it
        self._connection = connection
        self._machine_state = OriginState.READY
        self._control: socket.socket | None = None
        self._rules: HostRules | None = None
        self._redirect: redirect.OriginRedirect | None = None
        self._outside: outside.Outside | None = None  # where the program is in a container behind its host
        self._ways: HostRules | None = None  # where its packets are sent on: there, or with the other rules
        self._older_ways: list[str] = []  # that led them to the program
        self._home = netns.open_own()  # where the command was started
        self._extraction: Extraction | None = None
        self._app_state = options.app_state
        self._extracted_at_ms = 0
        self._offered_at_ms = 0
        self._offered_boot = ""
        self._settle_until: float | None = None
        self._recovered = identity is not None
        self.last_reason = ""
        self.notes: list[str] = []

    # -- staging: everything slow, nothing stopped ---------------------------------------------------------------------

    def stage(self) -> None:
        """Let the destination find its target and make its rules; make ours. Refused: nothing was touched."""
        hello, wire = self.there.hello, self.there.wire
        if hello is not None and hello.boot_id == syscalls.boot_id() \
                and tuple(hello.network) == netns.own():
            raise Refused("the destination is the origin host itself",
                          hint="two hosts, or two network namespaces, are needed")
        self.program.check_end(self.options.origin_sees)
        sock = self._take()
        self._outside = outside.at_origin(self.flow, self._home)
        if self._outside is not None and self.options.returns == "origin":
            raise Refused("--return origin: nothing comes back through the host for a container that is behind it",
                          hint="--return direct")
        entry = encode_inet_sk(self.passed_as, self._connection.state, not os.get_blocking(sock.fileno()),
                               self.program.options, self._connection.inode)
        wire.send(Stage(self.journal.pass_id, self.passed_as.to_json(), self.options.into,
                        self.options.redirect.partition(":")[0], entry,
                        self.options.max_stall_ms, self.options.prologue is not None, self.options.prologue or b"",
                        self.options.idle_ms or 0, endpoints.of(self.flow.protocol).needs(sock), self.path))
        self._stage_here()  # while the destination does the same
        answer = wire.receive(_STAGE_TIMEOUT_S)
        if isinstance(answer, RefusedMessage):
            raise Refused(answer.reason, hint=answer.hint, refusal=answer.refusal)
        if not isinstance(answer, Staged) or answer.pass_id != self.journal.pass_id:
            raise ProtocolError("the destination answered out of turn")
        self.staged = answer
        self._refuse_tls(endpoints.of(self.flow.protocol).first_unread(sock, _PEEK))
        with self._where_packets_are():
            self.plan = self._way(answer)
            self._refuse_minimal_ttl(self.plan)
            returns = self.options.returns == "origin" and self.plan.strategy != redirect.CARRY  # which does so anyway
            if returns and not answer.address_is_local:
                self.plan = led_back(self.plan, self.flow, self._need(self._rules), self._ttl(), self.journal, wire)
            self._redirect = redirect.origin_half(self.plan, self._setting())
            self._redirect.stage(self._need(self._ways), self.passed_as)
        self._announce()

    @property
    def passed_as(self) -> Flow:
        """The connection as its peer, and so everybody else, knows it."""
        return self._outside.flow if self._outside is not None else self.flow

    def _where_packets_are(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is in the network namespace in which they are held and sent on."""
        return self._outside.enter() if self._outside is not None else contextlib.nullcontext()

    def _way(self, staged: Staged) -> redirect.Plan:
        """By the link, where no other is possible, or that is asked for."""
        wanted, hello = self.options.redirect, self.there.hello
        if self._outside is None:
            carrying.clear(self.journal, self.flow, syscalls.boot_id())
            self._came_by = carrying.pass_to_here(self.flow)
        if wanted in ("auto", "none") and staged.address_is_local and hello is not None:
            way_home = carrying.way_home(self._came_by, hello.boot_id, hello.network) if self._came_by else None
            if way_home is not None:
                return carry.back_home(self.flow, *way_home)
        if wanted == redirect.CARRY:
            return self._lay("as asked")
        try:
            carry.refuse_without_route(staged.no_route)
            plan = redirect.choose(wanted, self.passed_as, self._via(), staged.address_is_local,
                                   self.options.leave_behind)
            if self._outside is not None and plan.strategy == "address":
                raise Refused("the address of a container's host does not move with a connection of the container",
                              hint="--redirect auto")
            return laid(plan, self.passed_as, self.journal, self.there.wire, staged.address_is_local)
        except Refused as refused:
            if wanted != "auto" or self.flow.protocol is not Protocol.TCP or self._outside is not None:
                raise
            try:
                return self._lay(refused.message)
            except Refused as other:
                refused.add_note(other.message)
                raise refused from other

    def _lay(self, why: str) -> redirect.Plan:
        """Both ends of a way over the link."""
        if self._outside is not None:
            raise Refused("packets of a container behind its host do not travel over SSH", hint="--redirect auto")
        self.end_of_way, plan = laid_by_link(why, self.flow, self.journal, self.there.wire,
                                             tcpinfo.path_mtu(self.program.need_socket()))
        return plan

    def _setting(self) -> redirect.Setting:
        hello = self.there.hello
        return redirect.Setting(self.journal.pass_id, hello.host if hello is not None else "", self._reach())

    def _reach(self) -> Reach:
        at = self.there.address
        return Reach(self.name, self.journal, self._ask, self.program.namespace,
                     ipaddress.ip_address(at) if at else None)

    def _ask(self, message: Message) -> Message:
        """Over a new link where the old one broke and the pass is over; before that, its end is the pass's."""
        try:
            return self.there.ask(message, _STAGE_TIMEOUT_S)
        except LinkError:
            if self._machine_state is not OriginState.DONE:
                raise
            self.there.disconnect()
            self.there.connect()
            return self.there.ask(message, _STAGE_TIMEOUT_S)

    def _announce(self) -> None:
        """Written first, where the pass has a journal: whoever is killed behind it leaves it to another to withdraw."""
        plan, way = self._need(self.plan), self._need(self._redirect)
        if plan.command and self.journal.exists():
            self.journal.write(ANNOUNCED, plan=plan.to_json(), flow=self.passed_as.to_json(),
                               host=self._setting().destination)
        with netns.enter(self._home):
            way.announce(self.passed_as)

    def unstage(self) -> None:
        """Of a pass that is not to be run: tell the network so, too."""
        if self._redirect is not None:
            with netns.enter(self._home):
                self._redirect.withdraw(self.passed_as)

    def _take(self) -> socket.socket:
        sock = self.program.take()
        self.program.read_options()
        if self.program.is_signalled:
            self.notes.append("the signals of its descriptor (O_ASYNC) were not carried: they are of a process here")
        return sock

    def _taker_knows(self) -> bool:
        """What becomes of the connection is for a program that takes part to say, or for whoever reads a dump."""
        return self.staged is None or self.staged.knows

    def _refuse_tls(self, *queues: bytes) -> None:
        """Refused where one holds TLS and the program at the destination cannot go on with it."""
        if self._taker_knows() or self.options.tls_anyway:
            return
        if any(map(tls.has_records, queues)):
            raise Refused("there are TLS records in the connection's queues, and their keys stay with process "
                          f"{self.program.identity.pid}: an unmodified program cannot read them",
                          hint="--into receiver[:PATH] for an application that takes the session over, or --tls-anyway")

    def _stage_here(self) -> None:
        """What this host needs, whatever the destination answers."""
        self._rules = HostRules(self.flow.ip_version, self.flow.protocol)
        self._rules.prepare_fence()
        if self._outside is None:
            self._ways = self._rules
            self.holding = Holding(self.flow)
        else:
            self._ways = self._outside.rules()
            self._older_ways = self._ways.moves_of(self.passed_as)
            self._outside.ignore_knocks()  # a destination that has sent it on before may send them back
            silence = Silence(self.flow.ip_version, self.flow.protocol)
            with self._where_packets_are():
                self.holding = Holding(self.passed_as, (silence, self.flow))
        self._extraction = extraction_of(self.program, self.flow, self._connection.inode,
                                         path_stays=self.options.congestion == "keep", outside=self.passed_as)
        self.program.ask_whether_registered()

    def _refuse_minimal_ttl(self, plan: redirect.Plan) -> None:
        """Refused where the program asks for a peer that is near: what this host sends on is one hop further away
        (net/ipv4/netfilter/nf_dup_ipv4.c), and a peer on the link (RFC 5082: 255) would not be heard again."""
        name = "IP_MINTTL" if self.flow.ip_version == 4 else "IPV6_MINHOPCOUNT"
        sends_on = plan.strategy in ("forward", redirect.CARRY) or not self._need(self.staged).address_is_local
        if sends_on and self.program.options.get(name):
            raise Refused(f"the program takes no packet that came from further away ({name}), and this host would send "
                          "them on", refusal=Refusal.MINIMAL_TTL,
                          hint="give the destination the address first, or unset it")

    def _ttl(self) -> int:
        """With which the program sends."""
        ttl = self.program.options.get("IP_TTL" if self.flow.ip_version == 4 else "IPV6_UNICAST_HOPS")
        return ttl if isinstance(ttl, int) else 0

    def _via(self) -> IPAddress:
        takes_at = self.staged.takes_at if self.staged is not None else ""
        text = self.options.via or takes_at or self.there.address
        if not text:
            raise Refused("the destination's address for packets is not known (a jump host, or no SSH)",
                          hint="name it with --via")
        try:
            return ipaddress.ip_address(text.split("%")[0])
        except ValueError:
            raise Refused(f"--via {text!r} is not an IP address") from None

    # -- the executor's side -------------------------------------------------------------------------------------------

    def watch(self, control: socket.socket) -> None:
        """A line, or the end, of this socket cancels the pass as long as that is possible."""
        self._control = control

    def follow(self, state: OriginState) -> None:
        """What the machine's state is: the time that may pass depends on it. What follows the switch has no hurry,
        unless packets wait for what comes then."""
        self._machine_state = state
        if state not in _URGENT and self.end_of_way is None:
            syscalls.go_along()

    def failed(self, error: TcpcpError) -> None:
        """The report tells it."""

    def timeout_s(self) -> float | None:
        began = self.holding.began if self.holding is not None else None
        if began is not None and self._machine_state is OriginState.PREPARED:
            return max(0.0, began + self.options.max_stall_ms / 1000 - time.monotonic())
        if self._machine_state in (OriginState.OFFERED, OriginState.DOUBT):
            return min(_ANSWER_TIMEOUT_S, max(_SHORTEST_ATTEMPT_S, self._overdue_in_s()))
        return _ANSWER_TIMEOUT_S

    def _overdue_in_s(self) -> float:
        return self.options.doubt_limit_s - (_now_ms() - self._offered_at_ms) / 1000

    def next_event(self, timeout_s: float | None) -> Event:
        """A message, the link's end, the operator; meanwhile the packet queue is kept from filling."""
        wire = self.there.wire
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        poller = select.poll()
        poller.register(wire.reading, select.POLLIN)
        if self.holding is not None:
            poller.register(self.holding, select.POLLIN)
        if self._control is not None:
            poller.register(self._control, select.POLLIN)
        while True:
            message = wire.take()
            if message is not None:
                return self._received(message)
            left_ms = None if deadline is None else max(0.0, (deadline - time.monotonic()) * 1000)
            ready = poller.poll(left_ms)
            if not ready:
                return Event.TIMEOUT
            for number, _events in ready:
                if self.holding is not None and number == self.holding.fileno():
                    self.holding.collect()
                elif self._control is not None and number == self._control.fileno():
                    self._control = None
                    return Event.CANCEL
                else:
                    wire.read_available()

    def _received(self, message: Message) -> Event:
        event = event_of(message, self.journal.pass_id)
        if isinstance(message, Active):
            self.active = message
        if isinstance(message, (Aborted, Lost)):
            self.last_reason = message.reason
        return event

    def perform(self, action: Action) -> Event | None:
        return self._ACTIONS[action](self)

    # -- before the offer ----------------------------------------------------------------------------------------------

    def _write_intent(self) -> None:
        plan, staged, hello = self.plan, self.staged, self.there.hello
        if plan is None or staged is None or hello is None:
            raise Refused("not staged")
        self._offered_boot = hello.boot_id
        self.journal.write(
            "intent", flow=self.flow.to_json(), pid=self.program.identity.pid,
            start_time=self.program.identity.start_time,
            descriptors=list(self._connection.descriptors), cookie=self._connection.cookie,
            inode=self._connection.inode, network=list(netns.own()),
            outside=self._outside.to_json() if self._outside is not None else None, target=self.there.target.to_json(),
            host=hello.host, destination_boot=hello.boot_id, plan=plan.to_json(), into=staged.into,
            origin_sees=self.options.origin_sees, settle_s=self.options.settle_s,
            doubt_limit_s=self.options.doubt_limit_s)
        self.there.wire.send(Imminent(self.journal.pass_id))
        self._need(self._extraction).warm_up()

    def _quiesce(self) -> None:
        state = self.program.quiesce()
        if state is not None:
            self._app_state = state

    def _stop(self) -> None:
        self.program.stop(self.options.idle_ms, self.options.max_stall_ms / 1000, answered=not self._taker_knows())

    def _hold_packets(self) -> None:
        self.touched = True
        self._need(self.holding).begin()

    def _probe(self) -> None:
        self._need(self._extraction).probe()

    def _extract(self) -> None:
        queues = self._need(self._extraction).read(beside=len(self._app_state))
        self._extracted_at_ms = _now_ms()
        self._refuse_tls(*queues)

    def _send_prepare(self) -> None:
        image, staged = self._need(self._extraction).image, self._need(self.staged)
        began = self._need(self.holding).began or time.monotonic()
        left_s = began + self.options.max_stall_ms / 1000 - time.monotonic()
        self.there.wire.send(Prepare(self.journal.pass_id, staged.nonce, image.inet_sk, image.tcp_stream,
                                       image.extras, self._app_state), timeout_s=max(left_s, 0.01))

    def _save_state(self) -> None:
        """What a recovery needs to activate at the destination again: the very message, without its names. While the
        destination works, there is also time to see whether the program changed an option since they were read."""
        self.program.refuse_changes()
        self.journal.save(STATE_FILE, self._need(self._extraction).saved(self._app_state))

    def _pin(self) -> None:
        self.program.pin()

    def _silence(self) -> None:
        self._need(self.holding).silence()

    def _fence(self) -> None:
        self._need(self._rules).fence(self.flow)
        returned.let_in(self._need(self._rules), self.flow, self._need(self.plan))

    def _verify(self) -> None:
        """What is still on its way over a link would be unheard after the new owner's first word."""
        if self._came_by is not None:
            carrying.flush(self._came_by, self.options.max_stall_ms / 2000)
        self._need(self._extraction).verify()

    def _write_offered(self) -> None:
        """The last moment for the operator to change his mind, or for the command to have died."""
        if self._control is not None and select.select([self._control], [], [], 0)[0]:
            raise Refused("it was cancelled")
        self._offered_at_ms = _now_ms()
        self.journal.write("offered", extracted_at_ms=self._extracted_at_ms, offered_at_ms=self._offered_at_ms)

    def _send_commit(self) -> None:
        self.there.wire.send(Commit(self.journal.pass_id, self._elapsed_ms()))

    def _elapsed_ms(self) -> int:
        return max(0, _now_ms() - self._extracted_at_ms)

    # -- after the commit ----------------------------------------------------------------------------------------------

    def _write_committed(self) -> None:
        self.journal.write("committed")

    def _redirect_packets(self) -> None:
        """First the way, then what was held, in its order, then the direct path for what comes: nothing overtakes."""
        ways, way = self._need(self._ways), self._need(self._redirect)
        returned.let_in(self._need(self._rules), self.flow, self._need(self.plan))  # whoever did may have been killed
        with self._where_packets_are():
            if self._older_ways:  # nothing comes by them meanwhile: it is held in front of them
                ways.stay(self.passed_as, self._older_ways)
            way.commit(ways, self.passed_as)
        self._release(onward=way.held_packets_follow)

    def _release(self, onward: bool) -> None:
        if self.holding is not None:
            self.holding.release(onward)

    def _end(self) -> None:
        """The fence stays, should anything still be said in the old endpoint's name."""
        self.program.end(self.flow, self.options.origin_sees)

    def _write_let_go(self) -> None:
        self.journal.write("let go")

    def _resume(self) -> None:
        self.program.drop_copy()
        self.program.resume()
        self.program.tell("passed")

    def _forget(self) -> None:
        """Nobody will need the state again; a divert that brought the packets here is of no use either."""
        self.journal.forget(STATE_FILE)
        if self._machine_state is OriginState.DONE and address.is_under_way(self.journal):
            return  # that comes first, and `resolve` does both
        # First the word, for which the destination may hold what comes to it directly (merging.py).
        if self._machine_state in (OriginState.DONE, OriginState.LOST) and self.there.is_connected:
            self.there.tell_settled(self.journal.pass_id, _ANSWER_TIMEOUT_S)  # else the operator decided without it
            self.journal.write(TOLD)
        if self._rules is not None and self._machine_state is not OriginState.ROLLED_BACK \
                and self._rules.is_diverted(self.flow):
            DivertAtDestination().undo(self._rules, self.flow)
            returning.speak_directly(self._rules, self.flow)

    def _reroute(self) -> None:
        with netns.enter(self._home):
            self._need(self._redirect).reroute(self.passed_as)

    def _write_done(self) -> None:
        self.journal.write("done")

    def _write_lost(self) -> None:
        self.journal.write("lost")

    # -- undo ----------------------------------------------------------------------------------------------------------

    def _undo(self) -> None:
        """The connection is the origin process's again, as it was. Each step is tried whatever became of the others."""
        problems: list[TcpcpError] = []
        for step in (self._unfence, self._undo_redirect, self.program.resume, lambda: self._release(onward=True),
                     lambda: self.program.tell("resumed"), self.unstage):
            try:
                step()
            except TcpcpError as error:
                problems.append(error)
        if problems:
            for other in problems[1:]:
                problems[0].add_note(str(other))
            raise problems[0]

    def _unfence(self) -> None:
        if self._rules is not None:
            self._rules.unfence(self.flow)
        if self.holding is not None:
            self.holding.unsilence()

    def _undo_redirect(self) -> None:
        if self._ways is not None and self._redirect is not None and not self._older_ways:
            with self._where_packets_are():
                self._redirect.undo(self._ways, self.passed_as)
        if self._rules is not None and self.plan is not None and self.plan.back is not None:
            returning.end_return(self._rules, self.flow)

    def _write_aborted(self) -> None:
        if self.journal.exists():
            self.journal.write("aborted")

    def _send_abort(self) -> None:
        if self.there.is_connected:
            self.there.wire.send(Abort(self.journal.pass_id, "the origin undid the pass"), timeout_s=0.5)

    # -- after a failure: ask again ------------------------------------------------------------------------------------

    def _reconnect(self) -> Event | None:
        """A new link to the destination; GaveUp after `settle_s`, with the pass in doubt. OVERDUE, once, where it was
        asked in vain and the process has stood still for `doubt_limit_s`: no attempt takes longer than that leaves."""
        asked = self._settle_until is not None
        if self._settle_until is None:
            self._settle_until = time.monotonic() + self.options.settle_s
        else:
            time.sleep(_RETRY_PAUSE_S)
        overdue_in_s = math.inf
        if self._machine_state is OriginState.DOUBT:
            overdue_in_s = self._overdue_in_s()
            if self._recovered and self.program.runs:
                overdue_in_s = math.inf  # it runs: the Commit behind the pin was never sent, and nobody waits
            elif self._recovered and not asked:
                overdue_in_s = math.inf  # who asks this late can wait for one whole attempt
            if asked and overdue_in_s <= 0:
                return Event.OVERDUE
        if time.monotonic() > self._settle_until:
            raise GaveUp
        self.there.disconnect()
        self.there.connect(within_s=max(overdue_in_s, _SHORTEST_ATTEMPT_S))
        hello = self.there.hello
        if hello is not None and self._offered_boot and hello.boot_id != self._offered_boot:
            return Event.REBOOTED
        return None

    def _send_query(self) -> None:
        self.there.wire.send(Query(self.journal.pass_id))

    def _send_activate(self) -> None:
        parts = parts_of(self.journal.load(STATE_FILE))
        self.there.wire.send(Activate(self.journal.pass_id, self._elapsed_ms(), *parts))

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of everything. A process that is still stopped runs again, unless the pass was offered: then it stays
        stopped (pinned), and the fence stands."""
        for part in (self._extraction, self.holding, self.program, self.there, self.end_of_way):
            if part is not None:
                part.close()
        if self._rules is not None:
            if self._machine_state in (OriginState.READY, OriginState.ROLLED_BACK):
                self._rules.sweep()
                with self._where_packets_are():
                    self._need(self._ways or self._rules).sweep()
                    tunnelled.sweep()
            self._rules.close()
        if self._ways is not None:
            self._ways.close()
        if self._outside is not None:
            self._outside.close()
        os.close(self._home)

    @staticmethod
    def _need(part: Any) -> Any:
        if part is None:
            raise Refused("the pass was not staged")
        return part

    # -- recovery ------------------------------------------------------------------------------------------------------

    @classmethod
    def recovered(cls, journal: Journal, connection: Connection, settle_s: float) -> Origin:
        """From the journal of a pass that was offered. `connection`: what is left of the endpoint (inventory)."""
        intent, offered = journal.field("intent"), journal.field("offered")
        if intent is None or offered is None:
            raise ProtocolError(f"the journal of pass {journal.pass_id} does not say that it was offered")
        origin = cls(journal, connection, target_from_json(intent["target"]),
                     Options(origin_sees=intent["origin_sees"], settle_s=settle_s,
                             doubt_limit_s=intent.get("doubt_limit_s", Options.doubt_limit_s)),
                     process.Identity(intent["pid"], intent["start_time"]), namespaces.find(journal))
        origin.touched = True
        origin.name = "resolve"
        origin._offered_boot = intent["destination_boot"]
        origin._extracted_at_ms = offered["extracted_at_ms"]
        origin._offered_at_ms = offered.get("offered_at_ms", offered["extracted_at_ms"])
        origin.plan = redirect.Plan.from_json(intent["plan"])
        setting = redirect.Setting(journal.pass_id, intent["host"], origin._reach())
        origin._redirect = redirect.origin_half(origin.plan, setting)
        with netns.enter(origin.program.namespace):
            origin._rules = HostRules(origin.flow.ip_version, origin.flow.protocol)
        origin._outside = outside.of_journal(journal)
        origin._ways = origin._rules if origin._outside is None else origin._outside.rules()
        if origin._outside is not None:
            origin._older_ways = origin._ways.moves_of(origin.passed_as)
        origin.program.take_what_is_left()
        return origin

    _ACTIONS: ClassVar[dict[Action, Callable[[Origin], Event | None]]] = {
        Action.WRITE_INTENT: _write_intent, Action.QUIESCE: _quiesce, Action.STOP: _stop, Action.HOLD: _hold_packets,
        Action.PROBE: _probe, Action.EXTRACT: _extract,
        Action.SEND_PREPARE: _send_prepare, Action.SAVE_STATE: _save_state, Action.PIN: _pin,
        Action.SILENCE: _silence, Action.FENCE: _fence, Action.VERIFY: _verify, Action.WRITE_OFFERED: _write_offered,
        Action.SEND_COMMIT: _send_commit, Action.WRITE_COMMITTED: _write_committed, Action.REDIRECT: _redirect_packets,
        Action.END: _end, Action.RESUME: _resume, Action.FORGET: _forget, Action.REROUTE: _reroute,
        Action.WRITE_DONE: _write_done,
        Action.WRITE_ABORTED: _write_aborted, Action.WRITE_LOST: _write_lost, Action.WRITE_LET_GO: _write_let_go,
        Action.UNDO: _undo,
        Action.SEND_ABORT: _send_abort, Action.RECONNECT: _reconnect, Action.SEND_QUERY: _send_query,
        Action.SEND_ACTIVATE: _send_activate}


def _now_ms() -> int:
    """A clock that all processes of this boot share."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)

"""The destination's side of a pass: what each action of the handoff does here.

`serve` stages it (target found and asked, rules made, a record in the journal), then lets the executor run it. Until
the commit everything can go without a packet: the socket is in repair, and the fence keeps this host from speaking for
the connection or hearing it, whatever a restored socket might want to say.

`Destination.recovered` is for a later serve that is asked about the pass (Query): the verdict in the journal answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import secrets
import socket
import time
from collections.abc import Callable, Container
from typing import Any, ClassVar

from . import carrying, endpoints, graft
from . import outside as outsides
from .core import messages
from .core.endpoint import Flow
from .core.errors import KernelError, LinkTimeout, ProtocolError, Refused, TcpcpError
from .core.handoff import Action, DestinationState, Event
from .core.image import Image
from .core.messages import Message, Stage
from .core.policy import Taker
from .core.refusals import Refusal
from .door import Entry
from .endpoints import Restoration
from .executor import GaveUp, event_of
from .graft import in_place
from .journal import LOST_MARK, Journal
from .kernel import conntrack, netns, process, repair, returning, routing, sockdiag, sockopt, tcpinfo
from .kernel.channel import Channel
from .kernel.process import Identity
from .kernel.rawpacket import Injector
from .kernel.rules import CARRIED, COPIED, MARK, HostRules, host_rules
from .kernel.tap import KnockListener
from .merging import LASTS_S, Merging
from .outside import Outside
from .redirect import CARRY, address, carry, returned, tunnelled
from .redirect.forward import DivertAtDestination
from .rehearsal import rehearse, warm_up
from .tracking import Tracked
from .transport.wire import Wire

#: What may be said until the state comes.
_BESIDE = (messages.Imminent, messages.Dig, messages.Lay, messages.Listen, messages.Adopt, messages.Back)
_BROADCAST = ipaddress.IPv4Address("255.255.255.255")
_LONGEST_MS = 1 << 31  # of the TSval clock: what is later is earlier (RFC 7323 5.3)
_PREPARED_TIMEOUT_S = 10.0
_STANDS_FOR = 2  # times what the origin allows itself before its offer: its word may be under way when that is over
_INTERRUPTED_TIMEOUT_S = 30.0
_LISTENS_S = 1.0  # for a packet that the origin sends every few milliseconds
_LONGEST_WAIT_S = 600.0  # for a state, however long an origin wants to look for a quiet instant
PROLOGUE_FILE = "prologue"
_FORCED = frozenset({"SO_RCVBUF", "SO_SNDBUF", "SO_BUF_LOCK"})  # of a dormant socket: they are not the program's


class Destination:
    """See the module. `outside`: where the program is in a container behind this host; the flow is the inner one then.
    `entry`: what a guarded door says to the pass; None where there is none. `needs`: as of Stage."""

    def __init__(self, journal: Journal, wire: Wire, flow: Flow, into: str, prologue: bytes | None = None,
                 entry: Entry | None = None, needs: Container[str] = (), outside: Outside | None = None) -> None:
        self.name = "destination"
        self.journal = journal
        self.flow = flow
        self.nonce = secrets.token_hex(16)
        self.address_is_local = False
        self.takes_at = ""  # where packets for it go, if not to the host that SSH reached
        self.no_route = ""  # of its own to the peer: why not
        self.channel: Channel | None = None  # of packets that travel over the link
        self._may_be_carried = False
        self.left: list[str] = []
        self.notes: list[str] = []
        self.steps: list[tuple[str, float]] = []
        self._path: list[str] = []
        self._into, self._prologue, self._entry, self._needs = into, prologue, entry, needs
        self._wire = wire
        self._machine_state = DestinationState.READY
        self._graft: graft.Graft | None = None
        self._rules: HostRules | None = None
        self._outside = outside
        self._ways: HostRules | None = None  # by which packets are sent on: outside, or with the other rules
        self._moves: list[str] = []
        self._keeps_fence = False
        self._divert: DivertAtDestination | None = None
        self._merging: Merging | None = None
        self._tracked: Tracked | None = None
        self._is_tracked_by_us = False
        self._tracked_outside: Tracked | None = None
        self._is_tracked_outside_by_us = False
        self._injector: Injector | None = None
        self._sock: socket.socket | None = None
        self._endpoint = endpoints.of(flow.protocol)
        self._state: Restoration | None = None
        self._message: messages.Prepare | messages.Activate | None = None
        self._rehearsed: Image | None = None
        self._elapsed_ms = 0
        self._unfenced = False
        self._ready_s = _PREPARED_TIMEOUT_S  # how long to wait for the state
        self._standing_s = _PREPARED_TIMEOUT_S  # how long a whole program may stand still for an offer
        self._delivered = False
        self._interrupted = False
        self._reason = ""

    # -- staging -------------------------------------------------------------------------------------------------------

    @classmethod
    def staged(cls, stage: Stage, wire: Wire, entry: Entry | None = None, *, is_apart: bool = False,
               outside: Outside | None = None, path: list[str] | None = None) -> Destination:
        """Find the way in, make the rules. The journal is claimed. `is_apart`: the program is in a network namespace of
        its own, where this runs. `outside`, which is this object's from now on: its packets come by way of this host.
        `path`: who passed it before (onward.py). Refused: nothing of it stands."""
        flow = Flow.from_json(stage.flow) if outside is None else outside.inner
        side = cls(Journal(stage.pass_id, "destination"), wire, flow, stage.into,
                   stage.prologue if stage.has_prologue else None, entry, stage.needs, outside)
        side._may_be_carried = stage.redirect in ("auto", CARRY) and not is_apart
        # Until the state comes, the origin may wait for a quiet instant, or for its application.
        side._ready_s = min(max(0, stage.idle_ms) / 1000 + _PREPARED_TIMEOUT_S, _LONGEST_WAIT_S)
        side._standing_s = min(max(0, stage.max_stall_ms) / 1000 * _STANDS_FOR, _PREPARED_TIMEOUT_S)
        side._path = [] if path is None else path
        try:
            side._stage()
            if is_apart and outside is None:
                side.takes_at = str(routing.source_towards(flow.peer.address))
        except BaseException:
            side._discard()
            raise
        return side

    def _stage(self) -> None:
        flow = self.flow
        for end in (flow.local.address, flow.peer.address):
            if any((end.is_loopback, end.is_multicast, end.is_unspecified, end == _BROADCAST)):
                raise Refused(f"a connection with the address {end} cannot live here")
        if flow.peer.address.is_link_local:
            raise Refused(f"the peer {flow.peer.address} has a meaning on its own link only",
                          refusal=Refusal.LINK_LOCAL)
        if routing.is_local(flow.peer.address):
            raise Refused(f"the peer {flow.peer.address} is the destination host itself", refusal=Refusal.LOCAL_PEER)
        try:
            routing.way_to(flow.peer.address)
        except KernelError as error:
            self.no_route = f"the destination has no route to the peer {flow.peer.address}: {error.message}"
            if not self._may_be_carried:
                raise Refused(self.no_route, refusal=Refusal.NO_ROUTE) from None
        self.address_is_local = routing.is_local(flow.local.address)
        used = sockdiag.state_of(flow)
        if used is not None:
            raise Refused(f"the destination has a connection {flow} already (state {used.label})",
                          refusal=Refusal.IN_USE)
        refuse_unfit(self._needs)
        self._graft = graft.find(self._into, flow)
        self._admit(self._graft.takers())
        self._tracked = Tracked(flow, "the destination")
        self._is_tracked_by_us = self._tracked.is_ours
        self._look_outside()
        with host_rules(flow.ip_version, flow.protocol) as rules:
            self._keeps_fence = rules.is_fenced(flow)  # of an earlier pass from here: it outlives this one undone
        self.journal.write("staged", flow=flow.to_json(), into=self._into, network=list(netns.own()),
                           divert=not self.address_is_local,
                           keeps_fence=self._keeps_fence, tracked=self._is_tracked_by_us, way=self._graft.way,
                           outside=self._said_of_outside(), taker=self._graft.taker.to_json(),
                           has_prologue=self._prologue is not None, path=self._path)
        if self._prologue is not None:
            self.journal.save(PROLOGUE_FILE, self._prologue)  # an interrupted activation may need it once more
        for verdict in ("committed", "aborted"):
            self.journal.draft(verdict)
        self.journal.reserve(LOST_MARK)
        self._make_rules()
        self._arrange()
        self._rehearsed = rehearse(flow.ip_version, flow.protocol)
        if self._entry is not None:
            self._entry.tell_accepted(self.into, self._graft.takers())

    def _look_outside(self) -> None:
        if self._outside is not None:
            with self._outside.enter():
                self._tracked_outside = Tracked(self._outside.flow, "the container's host",
                                                translated=self._outside.is_translated)
            self._is_tracked_outside_by_us = self._tracked_outside.is_ours

    def _said_of_outside(self) -> dict[str, Any] | None:
        if self._outside is None:
            return None
        return {**self._outside.to_json(), "tracked": self._is_tracked_outside_by_us}

    @property
    def _comes_as(self) -> Flow:
        """The connection as its peer knows it."""
        return self._outside.flow if self._outside is not None else self.flow

    def _where_packets_come(self) -> contextlib.AbstractContextManager[None]:
        """The calling thread is in the network namespace in which they are led on."""
        return self._outside.enter() if self._outside is not None else contextlib.nullcontext()

    def _make_rules(self) -> None:
        self._rules = HostRules(self.flow.ip_version, self.flow.protocol)
        self._ways = self._rules if self._outside is None else self._outside.rules()
        self._moves = self._ways.moves_of(self._comes_as)
        if self._outside is not None and self._outside.relay is not None:
            # Already now: what the origin sends on before this end hears it must not be sent back to the origin.
            with self._outside.enter():
                relay = self._outside.relay
                self._ways.prepare_move(relay.address, relay.interface)
                self._ways.move(self._outside.flow, relay.address, relay.interface)
        if self._outside is not None:
            self._outside.ignore_knocks()
        if self._tracked_outside is None:
            self._look_outside()
        if self._tracked_outside is not None and self._outside is not None:
            with self._outside.enter():
                self._tracked_outside.enter()
        self._rules.prepare_fence()
        self._rules.fence(self.flow)
        self._tracked = self._tracked or Tracked(self.flow, "the destination")
        self._tracked.enter()
        if not self.address_is_local:
            self._divert = DivertAtDestination()
            self._divert.stage(self._rules, self.flow)
        else:
            with self._where_packets_come():
                self._merging = Merging(self._comes_as)
        self._injector = Injector(self.flow.ip_version, MARK)

    def _arrange(self) -> None:
        way, rules, injector = self._graft, self._rules, self._injector
        if way is None or rules is None or injector is None:
            raise Refused("the pass was not staged")
        way.arrange(self.flow, graft.Ground(self.journal, rules, injector, self._admit, self._prologue))

    def _admit(self, takers: list[Taker]) -> None:
        if self._entry is not None:
            self._entry.admit(takers)

    @property
    def knows(self) -> bool:
        """The program takes part in passes."""
        return self._graft is not None and not self._graft.stops

    @property
    def into(self) -> str:
        return self._graft.description if self._graft is not None else self._into

    # -- the executor's side -------------------------------------------------------------------------------------------

    def follow(self, state: DestinationState) -> None:
        self._machine_state = state

    def failed(self, error: TcpcpError) -> None:
        self._reason = str(error)

    def timeout_s(self) -> float | None:
        stands = self._graft is not None and self._graft.stops
        return {DestinationState.READY: self._ready_s,
                DestinationState.PREPARED: self._standing_s if stands else _PREPARED_TIMEOUT_S,
                DestinationState.INTERRUPTED: _INTERRUPTED_TIMEOUT_S}.get(self._machine_state, _PREPARED_TIMEOUT_S)

    def next_event(self, timeout_s: float | None) -> Event:
        """A word that asks for nothing does not make the time longer: a program may stand still meanwhile."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            message = self._wire.receive(timeout_s)
            while isinstance(message, _BESIDE) and self._machine_state is DestinationState.READY:
                match message:
                    case messages.Dig() | messages.Lay():
                        self._make_way(message)
                    case messages.Listen():
                        self._listen(message)
                    case messages.Adopt():
                        admit = self._entry.admit_address if self._entry is not None else None
                        self._wire.send(address.answer(message, self.flow, self.journal, admit))
                    case messages.Back():
                        self._send_back(message)
                    case messages.Imminent():
                        self._warm_up()
                message = self._wire.receive(None if deadline is None else max(0, deadline - time.monotonic()))
        except LinkTimeout:
            return Event.TIMEOUT
        return self.received(message)

    def _warm_up(self) -> None:
        """The freeze has begun, and the state will be here in two milliseconds: what has to be done with it is quicker
        when it was just done."""
        if self._rehearsed is not None:
            warm_up(self._rehearsed, self.flow.protocol)
            self._rehearsed = None

    def _make_way(self, message: messages.Dig | messages.Lay) -> None:
        """The origin undoes the pass where that is refused."""
        try:
            if self._entry is not None:
                raise Refused("this door takes packets by a common link only, and by no tunnel")
            if isinstance(message, messages.Dig):
                with self._where_packets_come():
                    tunnelled.dig(tunnelled.between(message.here, message.there), self.journal, self._comes_as)
            elif self._outside is not None:
                raise Refused("packets that travel over SSH are not led on into a container behind its host")
            else:
                carrying.clear(self.journal, self.flow, message.boot_id, message.network)
                self.channel = carry.lay_at_destination(self.journal, self.flow, message.mtu, message.boot_id,
                                                        message.network)
                carrying.want(self.journal)
        except TcpcpError as error:
            self._wire.send(messages.Refused(message.pass_id, error.message, error.hint))
        else:
            self._wire.send(messages.Dug(message.pass_id))

    def _listen(self, message: messages.Listen) -> None:
        """Where this host cannot listen, nothing is heard."""
        heard = False
        with contextlib.suppress(TcpcpError), self._where_packets_come(), \
                contextlib.closing(KnockListener(self._comes_as)) as listener:
            heard = listener.hears(message.size, _LISTENS_S)
        self._wire.send(messages.Heard(message.pass_id, heard))

    def _send_back(self, message: messages.Back) -> None:
        """From the commit on; until the origin has heard of it, or not, it is tried."""
        try:
            if self._entry is not None:
                raise Refused("what is said for connections that come by this door goes to the peer directly",
                              hint="leave --return origin away")
            if self._outside is not None:
                raise Refused("what is said for a connection of a container behind its host goes to the peer directly",
                              hint="leave --return origin away")
            way = returned.lead_back(message, self._need_rules(), self.flow)
        except TcpcpError as error:
            self._wire.send(messages.Refused(message.pass_id, error.message, error.hint))
        else:
            self._wire.send(messages.Dug(message.pass_id))
            returned.try_back(way, self.flow, message.size, self._wire)

    def _need_rules(self) -> HostRules:
        if self._rules is None:
            raise Refused("the pass was not staged")
        return self._rules

    def received(self, message: Message) -> Event:
        event = event_of(message, self.journal.pass_id)
        match message:
            case messages.Prepare():
                if not secrets.compare_digest(message.nonce.encode(), self.nonce.encode()):
                    raise ProtocolError("a state that was not made for this pass")
                self._message = message
            case messages.Activate():
                self._message = message
                self._elapsed_ms = _elapsed(message.elapsed_ms)
            case messages.Commit():
                self._elapsed_ms = _elapsed(message.elapsed_ms)
            case messages.Abort():
                self._reason = message.reason
        return event

    def perform(self, action: Action) -> Event | None:
        return self._ACTIONS[action](self)

    # -- before the commit ---------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """A complete connection, dormant. What the origin says about it is believed only where it fits what was
        staged."""
        state = self._decoded()
        if self._graft is None:
            raise Refused("the pass was not staged")
        vessel = self._graft.vessel(self.flow)
        sock = self._sock = vessel.sock
        if vessel.own:
            state.fit(vessel.options, sock.family == socket.AF_INET6)
        state.restore(sock, vessel.options)
        if not vessel.own:  # the flag is the program's, too
            sock.setblocking(True)

    def _decoded(self) -> Restoration:
        message = self._message
        if message is None:
            raise ProtocolError("there is no state to restore")
        state = self._endpoint.restoration(Image(message.inet_sk, message.tcp_stream, message.extras),
                                           self._need_injector, not self.address_is_local)
        state.notes = self.notes
        if state.flow != self._comes_as:
            raise ProtocolError(f"the state is of {state.flow}, staged was {self._comes_as}")
        state.rename(self.flow)
        if state.options.get("SO_MARK") in (MARK, CARRIED, COPIED):
            raise ProtocolError(f"the state has a mark, {MARK:#x} or one of the next, which rules of this tool let by")
        if self._entry is not None:
            self._entry.admit_options(state.options)
        self._state = state
        return state

    def _need_injector(self) -> Injector:
        if self._injector is None:
            raise Refused("the pass was not staged")
        return self._injector

    def _graft_dormant(self) -> None:
        way, sock, message = self._graft, self._sock, self._message
        if way is None or sock is None or message is None:
            raise Refused("the pass was not staged")
        way.graft(self.journal.pass_id, sock, self.flow, message.app_state)

    def _write_prepared(self) -> None:
        self.journal.write("prepared")

    def _send_prepared(self) -> None:
        self._wire.send(messages.Prepared(self.journal.pass_id))

    def _check_target(self) -> None:
        """The last moment to refuse: the program that is to have the connection is still there, and the same."""
        if self._graft is None:
            raise Refused("the pass was not staged")
        self._graft.check()
        if self._entry is not None:
            self._entry.confirm(self._graft.takers())

    # -- the commit point ----------------------------------------------------------------------------------------------

    def _decide_committed(self) -> Event:
        return self._decided(self.journal.decide("committed"))

    def _decide_aborted(self) -> Event:
        if not self.journal.exists():
            self.journal.create()
        return self._decided(self.journal.decide("aborted"))

    def _decided(self, verdict: str) -> Event:
        if verdict == "aborted":
            return Event.DECIDED_ABORTED
        if self._interrupted and self.journal.field("active"):
            return Event.DECIDED_ACTIVE
        return Event.DECIDED_COMMITTED

    def _send_committed(self) -> None:
        self._wire.send(messages.Committed(self.journal.pass_id))

    def _unfence(self) -> None:
        """From here on this host hears the connection and speaks for it."""
        sock, state, rules = self._sock, self._state, self._rules
        if self._delivered or self._unfenced:
            return  # long since; this host may even have passed it on
        if state is None or rules is None:
            raise Refused("the pass was not staged")
        if sock is not None:
            state.open(sock, self._elapsed_ms)
        if self._tracked is not None:
            self._tracked.enter(state.fins)
        if self._outside is not None:
            self._hear_outside(self._outside, state)
        else:
            if self._merging is not None:
                self._merging.begin(state.order())
            rules.take_over(self.flow, self._moves)  # if this host had passed the connection away, it comes home
        self._unfenced = True

    def _hear_outside(self, outside: Outside, state: Restoration) -> None:
        """What comes before the last of these is sent on as before, to the old owner, who holds it."""
        rules, ways = self._rules, self._ways
        if rules is None or ways is None:
            raise Refused("the pass was not staged")
        with outside.enter():
            if self._tracked_outside is not None:
                self._tracked_outside.enter(state.fins)
            rules.unfence(self.flow)
            if self._merging is not None:
                self._merging.begin(state.order())
            ways.stay(outside.flow, [name for name in self._moves if not outside.leads_in(name)])

    def _activate(self) -> None:
        """Alive, and the application's. May be done again after it failed or was interrupted: what is done already is
        left out."""
        if self._delivered:
            return
        sock, state, way = self._sock, self._state, self._graft
        if sock is None or state is None or way is None:
            raise Refused("the pass was not staged")
        way.brace(unwritten=state.has_unwritten)
        state.activate(sock)
        way.activate(self.journal.pass_id)
        sock.close()
        self._sock = None

    def _write_active(self) -> None:
        self.journal.write("active")
        self.journal.forget(PROLOGUE_FILE)
        if self._ways is not None and self._moves:  # a FIN at the last instant may have put it back
            self._ways.stay(self._comes_as, [name for name in self._moves
                                             if self._outside is None or not self._outside.leads_in(name)])
        if self._rules is not None and self._moves:
            returning.end_return(self._rules, self.flow)

    def _write_lost(self) -> None:
        self.journal.set_mark(LOST_MARK)
        self.journal.forget(PROLOGUE_FILE)

    def _send_active(self) -> None:
        self._wire.send(messages.Active(self.journal.pass_id, list(self.left), list(self.notes),
                                        [list(step) for step in self.steps]))

    # -- the other outcomes --------------------------------------------------------------------------------------------

    def _discard(self) -> None:
        """Nothing of the pass stays. A connection that was alive already ends as one whose program ended. A dormant one
        ends before the fence goes, whenever the program closes its copy: until then its timers would speak."""
        if self._graft is not None:
            self._graft.discard(self.journal.pass_id)
        elif self._rules is not None:
            graft.abandon(self.journal, self._rules)
        sock, self._sock = self._sock, None
        if sock is not None:
            # A program's own socket was ended, and this copy of it closed, by the way in.
            if sock.fileno() != -1 and self._endpoint.is_dormant(sock):
                self._endpoint.take_away(sock)
            sock.close()
        self._take_back()

    def _take_back(self) -> None:
        rules = self._rules
        if self._interrupted and sockdiag.state_of(self.flow) is not None:
            return  # it lives here all the same, and these rules bring it its packets
        if rules is not None:
            # A host that has passed this connection away before keeps its fence: packets still come by here.
            if not self._keeps_fence and (self._outside is not None or not rules.is_moved(self.flow)):
                rules.unfence(self.flow)
            if self._divert is not None:
                self._divert.undo(rules, self.flow)
            rules.keep_in(self.flow)
            returning.speak_directly(rules, self.flow)
            rules.sweep()
        if self._is_tracked_by_us:
            conntrack.forget(self.flow)
        if self._outside is not None and self._ways is not None:
            with self._outside.enter():
                if not any(map(self._outside.leads_in, self._moves)):
                    self._ways.stay(self._outside.flow, list(filter(self._outside.leads_in,
                                                                    self._ways.moves_of(self._outside.flow))))
                self._ways.keep_in(self._outside.flow)
                self._ways.sweep()
                if self._is_tracked_outside_by_us:
                    conntrack.forget(self._outside.flow)
        if self.journal.verdict() != "committed":
            self.journal.remove()
        with self._where_packets_come():
            tunnelled.sweep()

    def _send_aborted(self) -> None:
        self._wire.send(messages.Aborted(self.journal.pass_id, self._reason or "it was undone"))

    def _send_lost(self) -> None:
        self._wire.send(messages.Lost(self.journal.pass_id, self._reason or "the destination's program has gone"))

    # -- recovery ------------------------------------------------------------------------------------------------------

    @classmethod
    def recovered(cls, journal: Journal, wire: Wire, entry: Entry | None = None) -> Destination:
        """For a pass that an earlier serve staged."""
        staged = journal.field("staged")
        if staged is None:
            raise ProtocolError(f"the journal knows nothing of pass {journal.pass_id}")
        side = cls(journal, wire, Flow.from_json(staged["flow"]), staged["into"], entry=entry,
                   outside=outsides.of_journal(journal))
        if staged.get("has_prologue") and not journal.field("active"):
            side._prologue = journal.load(PROLOGUE_FILE)
        side.name = "recovery"
        side._interrupted = True
        side.address_is_local = not staged["divert"]
        side._keeps_fence = staged.get("keeps_fence", False)
        side._is_tracked_by_us = staged.get("tracked", False)
        side._is_tracked_outside_by_us = bool((staged.get("outside") or {}).get("tracked"))
        side._rules = HostRules(side.flow.ip_version, side.flow.protocol)
        side._ways = side._rules if side._outside is None else side._outside.rules()
        if staged["divert"]:
            side._divert = DivertAtDestination()
        return side

    def _reclaim(self) -> None:
        """The connection that the interrupted activation left with the application, or else a new one from the state.
        It may have lived with that program, and have ended with it: the peer has moved on since, and nothing is made
        anew. A program that is there and cannot be asked at this moment is asked again, when the origin asks."""
        state = self._decoded()
        staged = self.journal.field("staged")
        if self.journal.has_mark(LOST_MARK) or staged is None:
            raise Refused("the program that had the connection is not there any more")
        taker = Identity(*(self.journal.field(in_place.TAKEN) or staged)["taker"])
        try:
            self._graft = graft.find_again(staged["way"], self.flow, self.journal)
        except Refused:
            if process.is_alive(taker):
                raise GaveUp from None
            raise
        if not self._graft.stops and (self._graft.taker != taker or not taker.pid):
            if process.is_alive(taker):
                raise GaveUp
            raise Refused("the program that had the connection is not there any more")
        left = self._graft.reclaim(self.journal)
        # One that has a new receiver does not remember; but what lives here can only be what it was given.
        self._delivered = left.delivered or (left.sock is None and sockdiag.state_of(self.flow) is not None)
        if self._delivered:
            return
        if left.sock is not None and tcpinfo.flow_of(left.sock).plain != self.flow.plain:
            left.sock.close()
            raise Refused(f"{self._graft.description} has another socket in the place of the connection")
        self._make_rules()
        if left.sock is None:
            self._arrange()
            self._restore()
            self._graft_dormant()
            return
        self._sock = left.sock
        if left.own:
            own = sockopt.read_all(left.sock)
            state.fit({name: value for name, value in own.items() if name not in _FORCED},
                      left.sock.family == socket.AF_INET6)

    def take_channel(self) -> Channel | None:
        """Of a connection that is alive here: the caller's to close."""
        taken = None
        if self._machine_state is DestinationState.ACTIVE:
            taken, self.channel = self.channel, None
        return taken

    def close(self) -> None:
        if self._merging is not None and self._merging.is_on:  # the origin's next word says it, or the end of the link
            self._wire.wait(LASTS_S)
        for part in (self._sock, self._graft, self._merging, self._tracked, self._tracked_outside, self._injector,
                     self._rules, self._ways, self._outside, self.channel):
            if part is not None:
                part.close()

    _ACTIONS: ClassVar[dict[Action, Callable[[Destination], Event | None]]] = {
        Action.RESTORE: _restore, Action.GRAFT: _graft_dormant, Action.WRITE_PREPARED: _write_prepared,
        Action.SEND_PREPARED: _send_prepared, Action.CHECK_TARGET: _check_target,
        Action.DECIDE_COMMITTED: _decide_committed, Action.DECIDE_ABORTED: _decide_aborted,
        Action.UNFENCE: _unfence, Action.DISCARD: _discard, Action.ACTIVATE: _activate,
        Action.RECLAIM: _reclaim, Action.WRITE_ACTIVE: _write_active, Action.WRITE_LOST: _write_lost,
        Action.SEND_COMMITTED: _send_committed,
        Action.SEND_ACTIVE: _send_active, Action.SEND_ABORTED: _send_aborted, Action.SEND_LOST: _send_lost}


def refuse_unfit(needs: Container[str]) -> None:
    """What this kernel, as it is set in this network namespace, cannot do for a connection. `needs`: as of Stage."""
    if Refusal.USEC_TIMESTAMPS in needs and not repair.has_usec_timestamps():
        raise Refused("the connection uses microsecond timestamps, which the destination's kernel does not have",
                      refusal=Refusal.USEC_TIMESTAMPS, hint="Linux 6.7 and later have them")


def _elapsed(milliseconds: int) -> int:
    """By the origin's clock, since it read the state; there is no pass of weeks."""
    if not 0 <= milliseconds < _LONGEST_MS:
        raise ProtocolError("the time since the state was read cannot be")
    return milliseconds

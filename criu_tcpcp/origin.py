"""The origin's side of a pass: what each action of the handoff does here.

The keeper makes an `Origin`, stages it, and lets the executor run it: then it is the tracer, the owner of the packet
queue and of the hold's table. `Origin.recovered` makes one from the journal after the keeper's death, for `resolve`:
the process is stopped then (state T, from `pin`), the fence stands, and the state lies in the journal; what a live one
does by its tracer and its queue is done by SIGCONT and by the fence.

Order within the freeze, and why (kernel/repair.py, kernel/rules.py, kernel/grace.py have the details):
  stop     all threads, at an instant at which none has bytes of the connection in its hands; tried again until it is
  so.
           Before the hold, since a try that fails then costs the peer nothing.
  hold     packets wait; a grace period; from here on nothing reaches the socket
  probe    learn ts_recent from a segment that the socket is made to send
  silence  nothing of ours leaves any more
  extract  read everything
  verify   nothing is left in a queue below, and nothing moved since
  fence, pin            once the offer is written: the same by rules that outlive the keeper, and a stop that does
"""

from __future__ import annotations

import errno
import math
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from . import apps, redirect
from .core import tcp, tls
from .core.endpoint import Flow, IPAddress
from .core.errors import KernelError, LinkError, ProtocolError, Refused, TcpcpError
from .core.handoff import Action, Event, OriginState
from .core.image import Image, encode, encode_inet_sk
from .core.messages import (
    Abort,
    Aborted,
    Activate,
    Active,
    Commit,
    Hello,
    Imminent,
    Lost,
    Message,
    Prepare,
    Query,
    Settled,
    Stage,
    Staged,
)
from .core.messages import Refused as RefusedMessage
from .core.state import MAX_CARRIED, ConnectionState
from .executor import GaveUp, event_of
from .greeting import TIMEOUT_S, greet
from .holding import Holding
from .inventory import Connection
from .journal import TOLD, Journal
from .kernel import netns, process, repair, sockopt, syscalls, tcpinfo
from .kernel.rawpacket import Injector, Sniffer
from .kernel.rules import MARK, HostRules
from .kernel.timestamps import learn_ts_recent
from .kernel.tracee import Tracee
from .redirect.forward import DivertAtDestination
from .rehearsal import rehearse, warm_up
from .transport.link import Link, open_link
from .transport.target import LocalTarget, Target, target_from_json
from .transport.wire import Wire

STATE_FILE = "state"
_ANSWER_TIMEOUT_S = 3.0
_STAGE_TIMEOUT_S = 15.0
_QUIESCE_TIMEOUT_S = 5.0
_BELOW_EMPTY_TIMEOUT_S = 0.2
_PROBE_TIMEOUT_S = 0.05
_RETRY_PAUSE_S = 0.5
_PEEK = 1 << 15  # bytes; more than any TLS record has
_SHORTEST_ATTEMPT_S = 1.0
_URGENT = frozenset({OriginState.PREPARING, OriginState.PREPARED, OriginState.OFFERING, OriginState.OFFERED,
                     OriginState.COMMITTED})
_VARYING = frozenset({"SO_RCVBUF", "SO_SNDBUF"})  # tuned by the kernel all the time


@dataclass(frozen=True)
class Options:
    """What a pass was asked for. `idle_ms`: how long to look for a quiet instant; None takes any (`--when now`).
    `tls_anyway`: pass what looks like TLS to a program that cannot have its keys, too.
    `settle_s`: how long to ask the destination again before a pass is left in doubt. `doubt_limit_s`: how long after
    the offer the process may stand still in doubt; then it runs again without the connection."""

    into: str = "auto"
    redirect: str = "auto"
    via: str | None = None
    idle_ms: int | None = 200
    max_stall_ms: int = 500
    app_state: bytes = field(default=b"", repr=False)
    prologue: bytes | None = field(default=None, repr=False)
    tls_anyway: bool = False
    origin_sees: str = "reset"
    settle_s: float = 10.0
    doubt_limit_s: float = 5.0


class Origin:
    """See the module. One thread uses it, in the origin process's network namespace (`run_in_namespace`)."""

    def __init__(self, journal: Journal, connection: Connection, target: Target | LocalTarget,
                 options: Options, identity: process.Identity | None = None) -> None:
        if connection.flow is None:
            raise Refused("the socket is not connected")
        self.name = "origin"
        self.journal = journal
        self.flow: Flow = connection.flow
        self.options = options
        self.identity = identity or process.identity(connection.pid)
        self.staged: Staged | None = None
        self.plan: redirect.Plan | None = None
        self.active: Active | None = None
        self.peer_hello: Hello | None = None
        self.holding: Holding | None = None
        self.touched = False
        self._connection = connection
        self._target = target
        self._machine_state = OriginState.READY
        self._link: Link | None = None
        self._wire: Wire | None = None
        self._control: socket.socket | None = None
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        # Of a process that has gone there is nothing to open: a recovery then works in this namespace.
        alive = process.is_alive(self.identity)
        self._namespace = process.open_namespace(connection.pid) if alive else os.dup(self._home)
        self._pidfd = syscalls.pidfd_open(connection.pid) if alive else -1
        self._sock: socket.socket | None = None
        self._tracee: Tracee | None = None
        self._rules: HostRules | None = None
        self._redirect: redirect.OriginRedirect | None = None
        self._sniffer: Sniffer | None = None
        self._injector: Injector | None = None
        self._application: apps.Conversation | None = None
        self._socket_options: dict[str, Any] = {}
        self._app_state = options.app_state
        self._ts_recent: int | None = None
        self._state: ConnectionState | None = None
        self._image: Image | None = None
        self._sequences = (0, 0)
        self._rehearsed: Image | None = None
        self._extracted_at_ms = 0
        self._offered_at_ms = 0
        self._offered_boot = ""
        self._settle_until: float | None = None
        self._recovered = False
        self.last_reason = ""

    # -- staging: everything slow, nothing stopped ---------------------------------------------------------------------

    def connect(self, within_s: float = math.inf) -> None:
        """Reach the destination. LinkError says why not; nothing was touched."""
        target = self._target
        if isinstance(target, Target):
            target = replace(target, timeout_s=min(target.timeout_s, within_s))
        with netns.enter(self._home):
            self._link = open_link(target)
        self._wire = Wire(self._link.fileno(), self._link.fileno())
        self.peer_hello = greet(self._link, self._wire, min(TIMEOUT_S, within_s))

    def stage(self) -> None:
        """Let the destination find its target and make its rules; make ours. Refused: nothing was touched."""
        hello = self.peer_hello
        if hello is None:
            raise LinkError("not connected")
        if hello.boot_id == syscalls.boot_id() and tuple(hello.network) == netns.identity("/proc/thread-self/ns/net"):
            raise Refused("the destination is the origin host itself",
                          hint="two hosts, or two network namespaces, are needed")
        self._sock = self._borrow()
        self._socket_options = sockopt.read_all(self._sock)
        entry = encode_inet_sk(self.flow, self._connection.state, not os.get_blocking(self._sock.fileno()),
                               self._socket_options, self._connection.inode)
        self._need_wire().send(Stage(self.journal.pass_id, self.flow.to_json(), self.options.into,
                                     self.options.redirect, entry, self.options.prologue is not None,
                                     self.options.prologue or b""))
        self._stage_here()  # while the destination does the same
        answer = self._need_wire().receive(_STAGE_TIMEOUT_S)
        if isinstance(answer, RefusedMessage):
            raise Refused(answer.reason, hint=answer.hint)
        if not isinstance(answer, Staged) or answer.pass_id != self.journal.pass_id:
            raise ProtocolError("the destination answered out of turn")
        self.staged = answer
        self._refuse_tls(tcpinfo.first_unread(self._sock, _PEEK))
        self.plan = redirect.choose(self.options.redirect, self.flow, self._via(), answer.address_is_local)
        self._redirect = redirect.origin_half(self.plan)
        self._redirect.stage(self._need(self._rules), self.flow)

    def _taker_knows(self) -> bool:
        """What becomes of the connection is for a program that takes part to say, or for whoever reads a dump."""
        return self.staged is None or self.staged.knows

    def _refuse_tls(self, *queues: bytes) -> None:
        """Refused where one holds TLS and the program at the destination cannot go on with it."""
        if self._taker_knows() or self.options.tls_anyway:
            return
        if any(map(tls.has_records, queues)):
            raise Refused("there are TLS records in the connection's queues, and their keys stay with process "
                          f"{self.identity.pid}: an unmodified program cannot read them",
                          hint="--into receiver[:PATH] for an application that takes the session over, or --tls-anyway")

    def _stage_here(self) -> None:
        """What this host needs, whatever the destination answers."""
        self._rules = HostRules(self.flow.ip_version)
        self._rules.prepare_fence()
        self.holding = Holding(self.flow)
        if tcpinfo.read(self._need(self._sock)).options & tcp.OPT_TIMESTAMPS:
            self._sniffer = Sniffer(self.flow)
            self._injector = Injector(self.flow.ip_version, MARK)
        self._application = self._registered_application()
        self._rehearsed = rehearse(self.flow.ip_version)

    def _via(self) -> IPAddress:
        import ipaddress
        text = self.options.via or (self._link.peer_address if self._link else None)
        if not text:
            raise Refused("the destination's address for packets is not known (a jump host, or no SSH)",
                          hint="name it with --via")
        try:
            return ipaddress.ip_address(text.split("%")[0])
        except ValueError:
            raise Refused(f"--via {text!r} is not an IP address") from None

    def _borrow(self) -> socket.socket:
        """The connection's socket, if the process and the descriptor are still what was chosen."""
        if not process.is_alive(self.identity):
            raise Refused(f"process {self.identity.pid} has exited")
        try:
            sock = syscalls.borrow_socket(self._pidfd, self._connection.descriptors[0])
        except KernelError as error:
            if error.errno not in (errno.EBADF, errno.ESRCH, errno.ENOTSOCK):
                raise
            raise Refused(f"process {self.identity.pid} has closed descriptor {self._connection.descriptors[0]} or has "
                          "exited") from None
        if tcpinfo.cookie(sock) != self._connection.cookie:
            sock.close()
            raise Refused(f"descriptor {self._connection.descriptors[0]} of process {self.identity.pid} has become "
                          "another socket")
        state = tcpinfo.read(sock).state
        if state not in tcp.PASSABLE_STATES and not self._recovered:
            sock.close()
            raise Refused(f"the connection of process {self.identity.pid} is in state {state.label} by now")
        return sock

    def _registered_application(self) -> apps.Conversation | None:
        """The application's own half, if it registered this connection."""
        try:
            conversation = apps.connect(apps.registration_path(self.identity.pid), _QUIESCE_TIMEOUT_S)
        except apps.Gone:
            return None
        try:
            if conversation.peer()[0] == self.identity.pid:
                answer, _none = conversation.ask({"op": "registered", "cookie": self._connection.cookie})
                if answer.get("op") == "yes":
                    return conversation
        except apps.Gone:
            pass
        conversation.close()
        return None

    # -- the executor's side -------------------------------------------------------------------------------------------

    def watch(self, control: socket.socket) -> None:
        """A line, or the end, of this socket cancels the pass as long as that is possible."""
        self._control = control

    def follow(self, state: OriginState) -> None:
        """What the machine's state is: the time that may pass depends on it. What follows the switch has no hurry."""
        self._machine_state = state
        if state not in _URGENT:
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
        wire = self._need_wire()
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
        plan, staged, hello = self.plan, self.staged, self.peer_hello
        if plan is None or staged is None or hello is None:
            raise Refused("not staged")
        self._offered_boot = hello.boot_id
        self.journal.write(
            "intent", flow=self.flow.to_json(), pid=self.identity.pid, start_time=self.identity.start_time,
            descriptors=list(self._connection.descriptors), cookie=self._connection.cookie,
            inode=self._connection.inode, target=self._target.to_json(), host=hello.host,
            destination_boot=hello.boot_id, plan=plan.to_json(), into=staged.into,
            origin_sees=self.options.origin_sees, settle_s=self.options.settle_s,
            doubt_limit_s=self.options.doubt_limit_s)
        self._need_wire().send(Imminent(self.journal.pass_id))
        if self._rehearsed is not None:
            warm_up(self._rehearsed)

    def _quiesce(self) -> None:
        """A registered application stops at a clean point by itself and hands over its state."""
        if self._application is None:
            return
        try:
            answer, descriptors = self._application.ask({"op": "quiesce", "cookie": self._connection.cookie})
            if answer.get("op") != "quiesced" or len(descriptors) != 1:
                reason = answer.get("error", "no reason")
                raise Refused(f"the origin application does not give the connection up: {reason}")
            self._app_state = apps.unwrap_state(descriptors[0])
        except apps.Gone as error:
            raise Refused(f"the origin application did not quiesce: {error}",
                          hint="has it ended, or closed the connection?") from None

    def _stop(self) -> None:
        idle_ms = None if self._application is not None else self.options.idle_ms
        deadline = time.monotonic() + (idle_ms or 0) / 1000
        while True:
            tracee = Tracee(self.identity.pid)
            tracee.stop(self.options.max_stall_ms / 1000)
            self._tracee = tracee
            busy = (tracee.busy_thread() or self._unanswered()) if idle_ms is not None else None
            if busy is None:
                break
            tracee.resume()
            self._tracee = None
            if time.monotonic() > deadline:
                raise Refused(f"no quiet instant of process {self.identity.pid} within {idle_ms} ms: {busy}",
                              hint="--when idle:MS waits longer, --when now takes any instant")
            time.sleep(0.001)
        self._borrow().close()  # nothing became something else before the stop
        if self._sock is not None and tcpinfo.has_urgent_data(self._sock):
            raise Refused("urgent data is waiting, which cannot be carried")

    def _unanswered(self) -> str | None:
        """Why another program could not go on here: this one has read something, and has sent nothing since. The
        kernel's clock for that has ticks of 1 to 10 ms (CONFIG_HZ); within one tick, an answer is believed."""
        if self._taker_knows():
            return None
        info = tcpinfo.read(self._need(self._sock))
        owes = info.last_data_recv_ms < info.last_data_sent_ms or not info.data_segments_out
        return "what the peer said last is not answered" if owes and info.data_segments_in else None

    def _hold_packets(self) -> None:
        self.touched = True
        self._need(self.holding).begin()

    def _probe(self) -> None:
        if self._sniffer is not None:
            self._ts_recent = learn_ts_recent(self._need(self._sock), self.flow, self._sniffer,
                                              self._need(self._injector), _PROBE_TIMEOUT_S)

    def _extract(self) -> None:
        """Behind the silence: what the kernel still sent by its timers would be unsent in the state, and the
        destination takes no acknowledgement of what it has not sent. What it tries to send now is refused, and stays
        unsent (net/ipv4/tcp_output.c, tcp_write_xmit)."""
        sock = self._need(self._sock)
        stamps = self._sniffer.newest() if self._sniffer is not None else None
        with syscalls.failing("fcntl(F_GETFL)"):
            nonblocking = not os.get_blocking(sock.fileno())
        self._state = repair.read_state(sock, self._socket_options, nonblocking, self._ts_recent,
                                        stamps[0] if stamps is not None else None)
        self._refuse_tls(self._state.received, self._state.outgoing)
        self._extracted_at_ms = _now_ms()
        self._sequences = (self._state.rcv_nxt, self._state.write_seq)
        self._image = encode(self._state, self._connection.inode)
        if len(self._state.outgoing) + len(self._state.received) + len(self._app_state) > MAX_CARRIED:
            raise Refused(f"the queues and the application's state are over {MAX_CARRIED >> 20} MiB together")

    def _send_prepare(self) -> None:
        image, staged = self._need(self._image), self._need(self.staged)
        began = self._need(self.holding).began or time.monotonic()
        left_s = began + self.options.max_stall_ms / 1000 - time.monotonic()
        self._need_wire().send(Prepare(self.journal.pass_id, staged.nonce, image.inet_sk, image.tcp_stream,
                                       image.extras, self._app_state), timeout_s=max(left_s, 0.01))

    def _save_state(self) -> None:
        """What a recovery needs to activate at the destination again: the very message, without its names. While the
        destination works, there is also time to see whether the program changed an option since they were read."""
        changed = {name for name, value in sockopt.read_all(self._need(self._sock)).items()
                   if value != self._socket_options.get(name)} - _VARYING
        if changed:
            raise Refused(f"the program has just changed {', '.join(sorted(changed))} on the socket",
                          hint="try again")
        image = self._need(self._image)
        self.journal.save(STATE_FILE, b"".join(
            len(part).to_bytes(8, "big") + part
            for part in (image.inet_sk, image.tcp_stream, image.extras, self._app_state)))

    def _pin(self) -> None:
        self._need(self._tracee).pin()

    def _silence(self) -> None:
        self._need(self.holding).silence()

    def _fence(self) -> None:
        self._need(self._rules).fence(self.flow)

    def _verify(self) -> None:
        """Nothing of ours is below any more, and nothing moved since it was read. A segment that was past the rule when
        that was made is counted from its birth (skb_set_owner_w), so no grace period is needed."""
        sock = self._need(self._sock)
        deadline = time.monotonic() + _BELOW_EMPTY_TIMEOUT_S
        while tcpinfo.bytes_below(sock):
            if time.monotonic() > deadline:
                raise Refused("segments of the connection are stuck in this host's output queues")
            time.sleep(0.0002)
        if repair.sequences(sock) != self._sequences:
            raise Refused("the connection moved while it was being passed")

    def _write_offered(self) -> None:
        """The last moment for the operator to change his mind, or for the command to have died."""
        if self._control is not None and select.select([self._control], [], [], 0)[0]:
            raise Refused("it was cancelled")
        self._offered_at_ms = _now_ms()
        self.journal.write("offered", extracted_at_ms=self._extracted_at_ms, offered_at_ms=self._offered_at_ms)

    def _send_commit(self) -> None:
        self._need_wire().send(Commit(self.journal.pass_id, self._elapsed_ms()))

    def _elapsed_ms(self) -> int:
        return max(0, _now_ms() - self._extracted_at_ms)

    # -- after the commit ----------------------------------------------------------------------------------------------

    def _write_committed(self) -> None:
        self.journal.write("committed")

    def _redirect_packets(self) -> None:
        """First the way, then what was held, in its order, then the direct path for what comes: nothing overtakes."""
        rules, way = self._need(self._rules), self._need(self._redirect)
        way.commit(rules, self.flow)
        self._release(onward=way.held_packets_follow)

    def _release(self, onward: bool) -> None:
        if self.holding is not None:
            self.holding.release(onward)

    def _end(self) -> None:
        """The old endpoint goes without a packet; the fence stays, should anything still be said in its name."""
        sock = self._sock
        if sock is None or not self._is_still(sock):  # ended before; the program may have connected it anew
            return
        if self.options.origin_sees == "eof":
            repair.end_as_eof(sock)
        else:
            repair.end_silently(sock)

    def _is_still(self, sock: socket.socket) -> bool:
        try:
            return tcpinfo.flow_of(sock) == self.flow
        except KernelError:  # ENOTCONN
            return False

    def _write_let_go(self) -> None:
        self.journal.write("let go")

    def _resume(self) -> None:
        """Without a copy of the socket here: the program's close would not be the last one, so that an epoll instance
        went on telling of it, by a number that means nothing any more (epoll(7), questions 6)."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        self._run_again()
        self._tell_application("passed")

    def _tell_application(self, what: str) -> None:
        if self._application is None:
            return
        try:
            self._application.send({"op": what, "cookie": self._connection.cookie})
        except apps.Gone as error:
            raise LinkError(f"the origin application could not be told: {error}") from None

    def _forget(self) -> None:
        """Nobody will need the state again; a divert that brought the packets here is of no use either."""
        self.journal.forget(STATE_FILE)
        if self._rules is not None and self._machine_state is not OriginState.ROLLED_BACK \
                and self._rules.is_diverted(self.flow):
            DivertAtDestination().undo(self._rules, self.flow)
        if self._machine_state in (OriginState.DONE, OriginState.LOST):
            self._tell_settled()

    def _tell_settled(self) -> None:
        """The destination keeps its verdict until it hears this, and says that it did; the link may have broken."""
        if self._link is None:
            return  # the operator decided without it
        try:
            self._settle()
        except LinkError:
            self._close_link()
            self.connect()
            self._settle()

    def _settle(self) -> None:
        self._need_wire().send(Settled(self.journal.pass_id))
        if not isinstance(self._need_wire().receive(_ANSWER_TIMEOUT_S), Settled):
            raise LinkError("the destination did not confirm that the pass is settled")
        self.journal.write(TOLD)

    def _write_done(self) -> None:
        self.journal.write("done")

    def _write_lost(self) -> None:
        self.journal.write("lost")

    # -- undo ----------------------------------------------------------------------------------------------------------

    def _undo(self) -> None:
        """The connection is the origin process's again, as it was. Each step is tried whatever became of the others."""
        problems: list[TcpcpError] = []
        for step in (self._unfence, self._undo_redirect, self._run_again, lambda: self._release(onward=True),
                     lambda: self._tell_application("resumed")):
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
        if self._rules is not None and self._redirect is not None:
            self._redirect.undo(self._rules, self.flow)

    def _run_again(self) -> None:
        """By its tracer; after the keeper's death by SIGCONT, which also takes back a SIGSTOP that has not taken
        effect."""
        if self._tracee is not None:
            self._tracee.resume()
            self._tracee = None
        elif self._recovered and process.is_alive(self.identity):
            with syscalls.failing("pidfd_send_signal(SIGCONT)"):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def _write_aborted(self) -> None:
        if self.journal.exists():
            self.journal.write("aborted")

    def _send_abort(self) -> None:
        if self._wire is not None:
            self._wire.send(Abort(self.journal.pass_id, "the origin undid the pass"), timeout_s=0.5)

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
            if self._recovered and process.run_state(self.identity.pid) != "T":
                overdue_in_s = math.inf  # it runs: the Commit behind the pin was never sent, and nobody waits
            elif self._recovered and not asked:
                overdue_in_s = math.inf  # who asks this late can wait for one whole attempt
            if asked and overdue_in_s <= 0:
                return Event.OVERDUE
        if time.monotonic() > self._settle_until:
            raise GaveUp
        self._close_link()
        self.connect(within_s=max(overdue_in_s, _SHORTEST_ATTEMPT_S))
        if self.peer_hello is not None and self._offered_boot and self.peer_hello.boot_id != self._offered_boot:
            return Event.REBOOTED
        return None

    def _send_query(self) -> None:
        self._need_wire().send(Query(self.journal.pass_id))

    def _send_activate(self) -> None:
        parts = _split_state(self.journal.load(STATE_FILE))
        self._need_wire().send(Activate(self.journal.pass_id, self._elapsed_ms(), *parts))

    # -- the end -------------------------------------------------------------------------------------------------------

    def _close_link(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = self._wire = None

    def close(self) -> None:
        """Let go of everything. A process that is still stopped runs again, unless the pass was offered: then it stays
        stopped (pinned), and the fence stands."""
        for part in (self._sniffer, self._injector, self._application, self.holding, self._sock):
            if part is not None:
                part.close()
        if self._rules is not None:
            if self._machine_state in (OriginState.READY, OriginState.ROLLED_BACK):
                self._rules.sweep()
            self._rules.close()
        self._close_link()
        for descriptor in (self._home, self._namespace, self._pidfd):
            if descriptor != -1:
                os.close(descriptor)

    @property
    def namespace(self) -> int:
        """The origin process's network namespace, for `netns.enter`."""
        return self._namespace

    def _need_wire(self) -> Wire:
        if self._wire is None:
            raise LinkError("there is no link to the destination")
        return self._wire

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
                     process.Identity(intent["pid"], intent["start_time"]))
        origin.touched = origin._recovered = True
        origin.name = "resolve"
        origin._offered_boot = intent["destination_boot"]
        origin._extracted_at_ms = offered["extracted_at_ms"]
        origin._offered_at_ms = offered.get("offered_at_ms", offered["extracted_at_ms"])
        origin.plan = redirect.Plan.from_json(intent["plan"])
        origin._redirect = redirect.origin_half(origin.plan)
        with netns.enter(origin._namespace):
            origin._rules = HostRules(origin.flow.ip_version)
        try:
            origin._sock = origin._borrow()
        except (Refused, KernelError):
            origin._sock = None  # the program closed it, or ended: nothing is left to end
        return origin

    _ACTIONS: ClassVar[dict[Action, Callable[[Origin], Event | None]]] = {
        Action.WRITE_INTENT: _write_intent, Action.QUIESCE: _quiesce, Action.STOP: _stop, Action.HOLD: _hold_packets,
        Action.PROBE: _probe, Action.EXTRACT: _extract,
        Action.SEND_PREPARE: _send_prepare, Action.SAVE_STATE: _save_state, Action.PIN: _pin,
        Action.SILENCE: _silence, Action.FENCE: _fence, Action.VERIFY: _verify, Action.WRITE_OFFERED: _write_offered,
        Action.SEND_COMMIT: _send_commit, Action.WRITE_COMMITTED: _write_committed, Action.REDIRECT: _redirect_packets,
        Action.END: _end, Action.RESUME: _resume, Action.FORGET: _forget, Action.WRITE_DONE: _write_done,
        Action.WRITE_ABORTED: _write_aborted, Action.WRITE_LOST: _write_lost, Action.WRITE_LET_GO: _write_let_go,
        Action.UNDO: _undo,
        Action.SEND_ABORT: _send_abort, Action.RECONNECT: _reconnect, Action.SEND_QUERY: _send_query,
        Action.SEND_ACTIVATE: _send_activate}


def _now_ms() -> int:
    """A clock that all processes of this boot share."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1000)


def _split_state(data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    parts = []
    while data:
        length = int.from_bytes(data[:8], "big")
        parts.append(data[8:8 + length])
        data = data[8 + length:]
    if len(parts) != 4:
        raise ProtocolError("the state in the journal is cut short")
    return parts[0], parts[1], parts[2], parts[3]


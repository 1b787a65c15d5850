"""The origin process: its end of the connection, its stop, and what it takes part in itself.

It knows nothing of passes, unless it has registered (application.py): then it stops at a clean point by itself, hands
over its own state for the connection, and hears what became of it. What a live keeper does by its tracer, one that was
recovered does by signals: the process is in state T then, from `pin`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import time

from .. import apps, endpoints, obstacles
from ..core.endpoint import Flow, Protocol
from ..core.errors import KernelError, LinkError, Refused
from ..core.options import VARYING, OptionValue
from ..inventory import Connection
from ..kernel import iouring, process, sockopt, syscalls, tcpinfo
from ..kernel.tracee import Tracee

_QUIESCE_TIMEOUT_S = 5.0
_TRY_PAUSE_S = 0.001  # between two looks for a quiet instant


class OriginProcess:
    """See the module. `sock` is our copy of the program's socket, and `options` is what was set on it, once both were
    taken; `namespace` is its network's, for `netns.enter`."""

    def __init__(self, connection: Connection, identity: process.Identity | None = None,
                 namespace: int | None = None, *, recovered: bool = False) -> None:
        self.identity = identity or process.identity(connection.pid)
        self.sock: socket.socket | None = None
        self.options: dict[str, OptionValue] = {}
        self._connection = connection
        self._protocol = connection.flow.protocol if connection.flow is not None else Protocol.TCP
        self._endpoint = endpoints.of(self._protocol)
        self._recovered = recovered
        alive = process.is_alive(self.identity)
        if namespace is None:  # where that has gone, a recovery works in this one
            namespace = (process.open_namespace(connection.pid) if alive
                         else os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        self.namespace = namespace
        self._pidfd = syscalls.pidfd_open(connection.pid) if alive else -1
        self._rings: tuple[int, ...] = ()
        self._tracee: Tracee | None = None
        self._application: apps.Conversation | None = None

    # -- its socket ----------------------------------------------------------------------------------------------------

    def take(self) -> socket.socket:
        """Our copy of its socket. Refused where the process or the descriptor is not what was chosen any more."""
        self.sock = self._borrow()
        return self.sock

    def take_what_is_left(self) -> None:
        """The same, unless the program closed it or ended: then nothing is left to end."""
        try:
            self.take()
        except (Refused, KernelError):
            self.sock = None

    def read_options(self) -> None:
        self.options = sockopt.read_all(self.need_socket())
        self._rings = iouring.descriptors(process.descriptors(self.identity.pid))

    def refuse_changes(self) -> None:
        """Refused where the program has set an option since they were read."""
        changed = {name for name, value in sockopt.read_all(self.need_socket()).items()
                   if value != self.options.get(name)} - VARYING
        if changed:
            raise Refused(f"the program has just changed {', '.join(sorted(changed))} on the socket",
                          hint="try again")

    @property
    def is_signalled(self) -> bool:
        """A process of this host is told of what happens at the descriptor, by a signal."""
        with syscalls.failing("fcntl(F_GETFL)"):
            return bool(fcntl.fcntl(self.need_socket().fileno(), fcntl.F_GETFL) & os.O_ASYNC)

    @property
    def is_nonblocking(self) -> bool:
        with syscalls.failing("fcntl(F_GETFL)"):
            return not os.get_blocking(self.need_socket().fileno())

    def need_socket(self) -> socket.socket:
        if self.sock is None:
            raise Refused("the pass was not staged")
        return self.sock

    def _borrow(self) -> socket.socket:
        pid, descriptor = self.identity.pid, self._connection.descriptors[0]
        if not process.is_alive(self.identity):
            raise Refused(f"process {pid} has exited")
        try:
            sock = syscalls.borrow_socket(self._pidfd, descriptor)
        except KernelError as error:
            if error.errno not in (errno.EBADF, errno.ESRCH, errno.ENOTSOCK):
                raise
            raise Refused(f"process {pid} has closed descriptor {descriptor} or has exited") from None
        if tcpinfo.cookie(sock) != self._connection.cookie:
            sock.close()
            raise Refused(f"descriptor {descriptor} of process {pid} has become another socket")
        why_gone = self._endpoint.why_gone(sock)
        if why_gone is not None and not self._recovered:
            sock.close()
            raise Refused(f"the connection of process {pid} {why_gone}")
        return sock

    # -- what it takes part in itself ----------------------------------------------------------------------------------

    def ask_whether_registered(self) -> None:
        """The application's own half is used from here on, if it registered this connection."""
        try:
            conversation = apps.connect(apps.registration_path(self.identity.pid), _QUIESCE_TIMEOUT_S)
        except apps.Gone:
            return
        try:
            if conversation.peer()[0] == self.identity.pid:
                answer, _none = conversation.ask({"op": "registered", "cookie": self._connection.cookie})
                if answer.get("op") == "yes":
                    self._application = conversation
                    return
        except apps.Gone:
            pass
        conversation.close()

    def quiesce(self) -> bytes | None:
        """A registered application stops at a clean point by itself and hands over its state; None of any other."""
        if self._application is None:
            return None
        try:
            answer, descriptors = self._application.ask({"op": "quiesce", "cookie": self._connection.cookie})
            if answer.get("op") != "quiesced" or len(descriptors) != 1:
                reason = answer.get("error", "no reason")
                raise Refused(f"the origin application does not give the connection up: {reason}")
            return apps.unwrap_state(descriptors[0])
        except apps.Gone as error:
            raise Refused(f"the origin application did not quiesce: {error}",
                          hint="has it ended, or closed the connection?") from None

    def tell(self, what: str) -> None:
        """A registered application hears what became of its connection: "passed" or "resumed"."""
        if self._application is None:
            return
        try:
            self._application.send({"op": what, "cookie": self._connection.cookie})
        except apps.Gone as error:
            raise LinkError(f"the origin application could not be told: {error}") from None

    # -- its stop ------------------------------------------------------------------------------------------------------

    def stop(self, idle_ms: int | None, within_s: float, *, answered: bool) -> None:
        """All threads, within `within_s`, at an instant at which none has bytes of the connection in its hands; looked
        for as long as `idle_ms` says (None: any instant will do, as it does where the application quiesced), beside the
        stops themselves: on a busy machine one may take longer. `answered`: the peer's last word, too."""
        if self._application is not None:
            idle_ms = None
        deadline = time.monotonic() + (idle_ms or 0) / 1000
        self._let_the_peer_fill_gaps(deadline)
        while True:
            tracee = Tracee(self.identity.pid)
            began = time.monotonic()
            tracee.stop(within_s)
            deadline += time.monotonic() - began
            self._tracee = tracee
            busy = None
            if idle_ms is not None:
                busy = tracee.busy_thread() or (self._endpoint.unanswered(self.need_socket()) if answered else None)
            if busy is None:
                break
            tracee.resume()
            self._tracee = None
            if time.monotonic() > deadline:
                raise Refused(f"no quiet instant of process {self.identity.pid} within {idle_ms} ms: {busy}",
                              hint="--when idle:MS waits longer, --when now takes any instant")
            time.sleep(_TRY_PAUSE_S)
        self._borrow().close()  # nothing became something else before the stop
        obstacle = obstacles.INSIDE[self._protocol](self.need_socket()) or obstacles.in_rings(
            iouring.read(self.identity.pid, self._rings), self._connection.inode)
        if obstacle is not None:  # it has come since staging
            raise obstacle.refused("the connection")

    def _let_the_peer_fill_gaps(self, deadline: float) -> None:
        """What arrived behind a segment that was lost cannot be read. The peer sends it again, but it knows by SACK
        that it was here, takes us for a receiver that reneges (net/ipv4/tcp_input.c, tcp_check_sack_reneging), and
        waits some 10 ms: the missing segment takes less, as a rule. One that stays away does not forbid the pass."""
        while time.monotonic() < deadline and self._endpoint.has_gap(self.need_socket()):
            time.sleep(_TRY_PAUSE_S)

    def pin(self) -> None:
        """From here on it stays stopped even when this process ends."""
        if self._tracee is None:
            raise Refused("the process is not stopped")
        self._tracee.pin()

    def resume(self) -> None:
        """By its tracer; after the keeper's death by SIGCONT, which also takes back a SIGSTOP that has not taken
        effect."""
        if self._tracee is not None:
            self._tracee.resume()
            self._tracee = None
        elif self._recovered and process.is_alive(self.identity):
            with syscalls.failing("pidfd_send_signal(SIGCONT)"):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    @property
    def runs(self) -> bool:
        return process.run_state(self.identity.pid) != "T"

    # -- its end of the connection -------------------------------------------------------------------------------------

    def check_end(self, sees: str) -> None:
        """Refused where its program cannot be shown that."""
        self._endpoint.check_end(sees)

    def end(self, flow: Flow, sees: str) -> None:
        """The old endpoint goes without a packet. `sees`: "eof", or "reset" (ECONNABORTED)."""
        if self.sock is None or not self._is_still(flow):  # ended before; the program may have connected it anew
            return
        self._endpoint.end(self.sock, flow, sees)

    def _is_still(self, flow: Flow) -> bool:
        try:
            return tcpinfo.flow_of(self.need_socket()) == flow
        except KernelError:  # ENOTCONN
            return False

    def drop_copy(self) -> None:
        """Before it runs without the connection: with a copy here the program's close would not be the last one, so
        that an epoll instance went on telling of it, by a number that means nothing any more (epoll(7), question 6)."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def close(self) -> None:
        """A process that is still stopped runs again, unless it is pinned: that ends with the tracer, by the kernel."""
        self.drop_copy()
        if self._application is not None:
            self._application.close()
        for descriptor in (self.namespace, self._pidfd):
            if descriptor != -1:
                os.close(descriptor)

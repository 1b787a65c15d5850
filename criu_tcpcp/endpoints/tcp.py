"""TCP: by repair mode (kernel/repair.py), with a state of two queues and the numbers between them (core/state.py)."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from ..core import tcp
from ..core.endpoint import Flow
from ..core.image import Image, decode
from ..core.options import OptionValue
from ..core.refusals import Refusal
from ..core.reorder import Order, SegmentOrder
from ..core.restoreplan import activation_steps, clock_steps, dormant_steps
from ..core.state import ConnectionState, fitted
from ..core.tcp import TcpState
from ..kernel import repair, tcpinfo
from ..kernel.rawpacket import Injector, extent
from .carried import Carried


class TcpRestoration(Carried[ConnectionState]):
    """As of `endpoints.Restoration`."""

    @property
    def has_unwritten(self) -> bool:
        return bool(self.state.unsent_bytes) or self.state.fin_unsent

    @property
    def fins(self) -> int:
        sent = self.state.tcp_state in tcp.FIN_QUEUED_STATES and not self.state.fin_unsent
        return self.state.fin_received + sent

    def fit(self, own: Mapping[str, OptionValue], ipv6_socket: bool) -> None:
        self.state = fitted(self.state, own, ipv6_socket)

    def _restorer(self, sock: socket.socket) -> repair.Restorer:
        flow = self.flow
        restorer = repair.Restorer(sock, transparent=self._transparent,
                                   inject=lambda segment: self._injector().deliver(flow, segment))
        restorer.reports = self.notes
        return restorer

    def restore(self, sock: socket.socket, fresh: Mapping[str, OptionValue]) -> None:
        self._restorer(sock).run(dormant_steps(self.state, fresh))

    def open(self, sock: socket.socket, elapsed_ms: int) -> None:
        """Its clock must be right before a segment leaves."""
        if repair.is_in_repair(sock):
            self._restorer(sock).run(clock_steps(self.state, elapsed_ms))

    def activate(self, sock: socket.socket) -> None:
        written = None if repair.is_in_repair(sock) else repair.written_since(sock, self.state)
        self._restorer(sock).run(activation_steps(self.state, written))

    def order(self) -> Order:
        version = self.flow.ip_version
        return SegmentOrder(self.state.rcv_nxt, lambda packet: extent(packet, version))


class TcpEndpoint:
    """As of `endpoints.Endpoint`."""

    def why_gone(self, sock: socket.socket) -> str | None:
        state = tcpinfo.read(sock).state
        return None if state in tcp.PASSABLE_STATES else f"is in state {state.label} by now"

    def unanswered(self, sock: socket.socket) -> str | None:
        """The program has read something, and has sent nothing since. The kernel's clock for that has ticks of 1 to
        10 ms (CONFIG_HZ); within one tick, an answer is believed. One that has shut down for writing answers nothing
        any more."""
        info = tcpinfo.read(sock)
        if info.state in tcp.FIN_QUEUED_STATES:
            return None
        owes = info.last_data_recv_ms < info.last_data_sent_ms or not info.data_segments_out
        return "what the peer said last is not answered" if owes and info.data_segments_in else None

    def needs(self, sock: socket.socket) -> list[str]:
        return [Refusal.USEC_TIMESTAMPS] if tcpinfo.read(sock).options & tcp.OPT_USEC_TS else []

    def has_gap(self, sock: socket.socket) -> bool:
        return tcpinfo.has_gap(sock)

    def first_unread(self, sock: socket.socket, count: int) -> bytes:
        return tcpinfo.first_unread(sock, count)

    def check_end(self, sees: str) -> None:
        """Both can be shown."""

    def end(self, sock: socket.socket, flow: Flow, sees: str) -> None:
        if sees == "eof":
            repair.end_as_eof(sock)
        else:
            repair.end_silently(sock)

    def restoration(self, image: Image, injector: Callable[[], Injector], transparent: bool) -> TcpRestoration:
        return TcpRestoration(decode(image), injector, transparent)

    def is_dormant(self, sock: socket.socket) -> bool:
        return repair.is_in_repair(sock)

    def is_empty(self, sock: socket.socket) -> bool:
        return tcpinfo.read(sock).state is TcpState.CLOSE

    def is_alive(self, sock: socket.socket) -> bool:
        return tcpinfo.read(sock).state in tcp.PASSABLE_STATES

    def empty(self, sock: socket.socket) -> None:
        """The error that waits is of the connection that it was."""
        repair.end_silently(sock)
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)

    def take_away(self, sock: socket.socket) -> None:
        repair.end_as_eof(sock)

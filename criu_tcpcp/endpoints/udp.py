"""UDP: a connected socket, with a state of datagrams that wait (core/datagram.py). There is no repair mode: a dormant
one is deaf (core/datagramplan.py), and the fence does the rest."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping

from ..core.datagram import DatagramState, fitted
from ..core.datagramimage import decode
from ..core.datagramplan import activation_steps, dormant_steps, opening_steps
from ..core.endpoint import Flow
from ..core.errors import Refused
from ..core.image import Image
from ..core.options import OptionValue
from ..core.reorder import Order, WayOrder
from ..kernel import datagrams
from ..kernel.rawpacket import Injector
from ..kernel.rules import MARK
from .carried import Carried


class UdpRestoration(Carried[DatagramState]):
    """As of `endpoints.Restoration`."""

    has_unwritten = False
    fins = 0

    def fit(self, own: Mapping[str, OptionValue], ipv6_socket: bool) -> None:
        self.state = fitted(self.state, own, ipv6_socket)

    def _restorer(self, sock: socket.socket) -> datagrams.DatagramRestorer:
        restorer = datagrams.DatagramRestorer(sock, self.flow, transparent=self._transparent, injector=self._injector)
        restorer.notes = self.notes
        return restorer

    def restore(self, sock: socket.socket, fresh: Mapping[str, OptionValue]) -> None:
        self._restorer(sock).run(dormant_steps(self.state, fresh))

    def open(self, sock: socket.socket, elapsed_ms: int) -> None:
        self._restorer(sock).run(opening_steps(self.state))

    def activate(self, sock: socket.socket) -> None:
        self._restorer(sock).run(activation_steps(self.state))

    def order(self) -> Order:
        place = 8 if self.flow.ip_version == 4 else 7  # RFC 791 3.1, RFC 8200 3
        return WayOrder(lambda packet: packet[place] if len(packet) > place else 0)


class UdpEndpoint:
    """As of `endpoints.Endpoint`."""

    def why_gone(self, sock: socket.socket) -> str | None:
        return None if datagrams.is_connected(sock) else "is not connected any more"

    def unanswered(self, sock: socket.socket) -> str | None:
        """The kernel does not note when a program spoke last. Nor need one datagram be the answer to another."""
        return None

    def needs(self, sock: socket.socket) -> list[str]:
        return []

    def has_gap(self, sock: socket.socket) -> bool:
        """What is lost stays away."""
        return False

    def first_unread(self, sock: socket.socket, count: int) -> bytes:
        """A look at an empty datagram would leave a trace."""
        return b""

    def check_end(self, sees: str) -> None:
        if sees == "eof":
            raise Refused("UDP has no end of stream that the origin's program could be shown",
                          hint="leave --origin-sees away: its next operation fails with ECONNREFUSED")

    def end(self, sock: socket.socket, flow: Flow, sees: str) -> None:
        with contextlib.closing(Injector(flow.ip_version, MARK)) as injector:
            datagrams.end(sock, flow, injector)

    def restoration(self, image: Image, injector: Callable[[], Injector], transparent: bool) -> UdpRestoration:
        return UdpRestoration(decode(image), injector, transparent)

    def is_dormant(self, sock: socket.socket) -> bool:
        return datagrams.is_deaf(sock)

    def is_empty(self, sock: socket.socket) -> bool:
        return not datagrams.is_connected(sock)

    def is_alive(self, sock: socket.socket) -> bool:
        return datagrams.is_connected(sock) and sock.getpeername() != sock.getsockname()

    def empty(self, sock: socket.socket) -> None:
        """A socket that is bound stays so (net/ipv4/af_inet.c, __inet_bind)."""
        if sock.getsockname()[1]:
            raise Refused("a UDP socket that has an address already cannot get another one")

    def take_away(self, sock: socket.socket) -> None:
        if self.is_alive(sock):
            datagrams.retire(sock)

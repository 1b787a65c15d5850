"""What differs between the protocols whose connections are passed: one file each, one interface.

The order of a pass is one for all of them (core/handoff.py), and so are hold, fence, redirect and ways in. An
`Endpoint` answers what the two sides ask about a socket of its protocol; a `Restoration` is the destination's end of
one connection, from the state that came until it is alive.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import Protocol as Interface

from ..core.endpoint import Flow, Protocol
from ..core.image import Image
from ..core.options import OptionValue
from ..core.reorder import Order
from ..kernel.rawpacket import Injector


class Restoration(Interface):
    """`notes`: what could not be carried and does no harm. `rename`: here it has another address. `restore` leaves the
    socket dormant: it neither speaks nor hears, and closing it is silent. `open`: from then on it hears; `elapsed_ms`,
    by the origin's clock, since the state was read. `activate` may be called again after it failed or was interrupted.
    `fins`: how many of its two ends were said in the network. `order`: how the peer's packets are put in order where
    they come by two ways."""

    notes: list[str]

    @property
    def flow(self) -> Flow: ...
    @property
    def options(self) -> Mapping[str, OptionValue]: ...
    @property
    def has_unwritten(self) -> bool: ...
    @property
    def fins(self) -> int: ...
    def rename(self, flow: Flow) -> None: ...
    def fit(self, own: Mapping[str, OptionValue], ipv6_socket: bool) -> None: ...
    def restore(self, sock: socket.socket, fresh: Mapping[str, OptionValue]) -> None: ...
    def open(self, sock: socket.socket, elapsed_ms: int) -> None: ...
    def activate(self, sock: socket.socket) -> None: ...
    def order(self) -> Order: ...


class Endpoint(Interface):
    """`why_gone`: why this socket, which was a connection, is none to be passed any more; `unanswered`: why another
    program could not go on here; both None where nothing is in the way. `needs`: what not every destination can do, by
    the name of the refusal. `has_gap`: something waits behind what has not come yet. `first_unread`: the first bytes
    that wait, as far as they can be looked at without a trace.
    `end`: the old endpoint goes without a packet; Refused by `check_end` where the program cannot be shown `sees`.
    `empty`: a program's socket gives up, without a packet, whatever it was connected to (Refused where it cannot), and
    `is_empty`; `is_alive`: it has a connection, which may be dormant; `take_away`: the program is not to have it, and
    finds the other end closed, as far as the protocol knows that.
    `restoration`: `injector` is asked for when it is needed; `transparent` where the local address is not this host's.
    ProtocolError where the image is none."""

    def why_gone(self, sock: socket.socket) -> str | None: ...
    def unanswered(self, sock: socket.socket) -> str | None: ...
    def needs(self, sock: socket.socket) -> list[str]: ...
    def has_gap(self, sock: socket.socket) -> bool: ...
    def first_unread(self, sock: socket.socket, count: int) -> bytes: ...
    def check_end(self, sees: str) -> None: ...
    def end(self, sock: socket.socket, flow: Flow, sees: str) -> None: ...
    def restoration(self, image: Image, injector: Callable[[], Injector], transparent: bool) -> Restoration: ...
    def is_dormant(self, sock: socket.socket) -> bool: ...
    def is_empty(self, sock: socket.socket) -> bool: ...
    def is_alive(self, sock: socket.socket) -> bool: ...
    def empty(self, sock: socket.socket) -> None: ...
    def take_away(self, sock: socket.socket) -> None: ...


def of_socket(sock: socket.socket) -> Endpoint:
    return of(Protocol.UDP if sock.type == socket.SOCK_DGRAM else Protocol.TCP)


def of(protocol: Protocol) -> Endpoint:
    from . import tcp, udp
    kinds: dict[Protocol, Callable[[], Endpoint]] = {Protocol.TCP: tcp.TcpEndpoint, Protocol.UDP: udp.UdpEndpoint}
    return kinds[protocol]()
